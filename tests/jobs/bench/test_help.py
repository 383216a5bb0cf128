import subprocess
import sys

from hasten.jobs.bench.job import names

SCRIPT = """
import sys
from hasten.jobs.bench.job import find, names
for name in names():
    assert find(name).options.__module__ == f"hasten.jobs.bench.{name}", name
print(*({"torch", "transformers", "ray", "mlflow", "matplotlib"} & sys.modules.keys()))
"""


def test_options_of_benchmarks_are_read_without_heavy_imports():
    found = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def test_parts_of_benchmarks_are_no_benchmarks():
    assert {"compress", "decode", "wait"} <= set(names())
    assert not {"measurements", "decoding", "processes", "peers"} & set(names())
