"""Realistic layers: unequal sizes, and errors that fall fourfold with every bit and differ by orders of magnitude."""

import random
from collections.abc import Callable

import pytest

from hasten.accel.compression.allocators.base import Choice, Unit


@pytest.fixture
def make_units() -> Callable[..., list[Unit]]:
    def make(
        seed: int,
        count: int = 12,
        levels: tuple[int, ...] = (2, 3, 4, 6),
        scale: int = 1,
        noise: float = 0.0,
        equal: bool = False,
    ) -> list[Unit]:
        """Units of about 1000 times scale weights, with the exact bits of groups of 128."""
        rng = random.Random(seed)
        units = []
        for place in range(count):
            weights = 128 * scale * (8 if equal else rng.choice((2, 3, 8, 8, 11, 22)))
            constant = weights * 10 ** rng.gauss(-6, 1)
            choices = [
                Choice(f"w{bits}", weights * bits + weights // 128 * (16 + bits), constant * 4.0**-bits)
                for bits in levels
            ]
            if noise:
                choices = [
                    Choice(choice.level, choice.bits, choice.error * 2 ** rng.gauss(0, noise)) for choice in choices
                ]
            name = f"model.layers.{place // 6}.layer{place % 6}"
            units.append(Unit(name, (name,), place // 6, f"layer{place % 6}", weights, tuple(choices)))
        return units

    return make


@pytest.fixture
def with_parts(make_units) -> Callable[[int], list[Unit]]:
    def make(seed: int) -> list[Unit]:
        """A block that can be dropped as a whole or in two parts, with two layers in each part, and a layer outside."""
        rng = random.Random(seed)

        def part(name: str, inside: str | None) -> Unit:
            dropped = Choice("drop", 0, 10 ** rng.uniform(-6, -4))
            return Unit(name, (), 0, name, 0, (dropped, Choice("keep", 0)), inside)

        layers = make_units(seed, count=5, levels=(2, 3, 4), noise=0.3)
        owners = ["attention", "attention", "mlp", "mlp", None]
        units = [part("attention", "block"), part("mlp", "block"), part("block", None)]
        for layer, owner in zip(layers, owners, strict=True):
            units.append(Unit(layer.name, layer.layers, 0, layer.kind, layer.weights, layer.choices, owner))
        rng.shuffle(units)
        return units

    return make
