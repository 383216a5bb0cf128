"""import-linter over `hasten`, which must be imported first: only then does it name the folders of a checkout."""

from importlinter.cli import lint_imports_command

import hasten  # noqa: F401

if __name__ == "__main__":
    lint_imports_command()
