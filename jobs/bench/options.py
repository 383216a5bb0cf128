"""Options of a benchmark that defines none itself."""

from dataclasses import dataclass

from hasten.jobs.common.schema import MODEL, Run, option


@dataclass
class BenchConfig(Run):
    """Run a benchmark by name and print its table."""

    model: str = option("embedded:target", f"model to run on: {MODEL}", path="in")
    threads: int = option(1, "threads of every process", at_least=1)
