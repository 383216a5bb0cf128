"""Entry point of a submitted job on the cluster: `python -m hasten.jobs.cli.submitted WORKDIR JOB words…`."""

import os
import sys

from hasten.import_path import leave_out_current_folder
from hasten.jobs.cli.main import main as hasten


def main(workdir: str, words: list[str]) -> int:
    """Exit code of `hasten WORDS` in the folder workdir; 2 if that folder does not exist on this machine."""
    try:
        os.chdir(workdir)
    except OSError as error:
        reason = f"is no folder on the cluster's head ({error.strerror})"
        print(f"hasten: error: --workdir {workdir} {reason}: name one that the cluster's nodes share", file=sys.stderr)
        return 2
    # Child processes read the current folder from PWD.
    os.environ["PWD"] = workdir
    return hasten(words)


if __name__ == "__main__":
    leave_out_current_folder()
    sys.exit(main(sys.argv[1], sys.argv[2:]))
