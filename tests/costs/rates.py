"""Rates of a machine that does 1e9 of every unit of work in a second."""

from hasten.accel.costs.estimate import Rates

RATES = Rates(
    flops=1e9,
    exact_flops=1e9,
    elements=1e9,
    launch=1e-6,
    memory=1e9,
    store=1e9,
    read=1e9,
    disk=1e8,
    network=1e9,
    start=5.0,
    finish=4.0,
    session=6.0,
    worker_bytes=500,
    driver_bytes=700,
)
