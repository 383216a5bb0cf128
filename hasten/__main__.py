"""The hasten command, also as `python -m hasten`."""

import sys

from hasten.import_path import leave_out_current_folder

# Before anything else is imported, which could be a file of the current folder.
leave_out_current_folder()

from hasten.jobs.cli.main import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
