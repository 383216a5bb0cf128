"""Packages of the wheel: the folders at the top of the repository, installed below `hasten`."""

from setuptools import find_packages, setup

FOLDERS = ("accel", "kernels", "cluster", "jobs", "conf")

setup(
    packages=[
        "hasten",
        *(f"hasten.{name}" for folder in FOLDERS for name in find_packages(include=[folder, f"{folder}.*"])),
    ],
    package_dir={"hasten": "hasten", **{f"hasten.{folder}": folder for folder in FOLDERS}},
)
