"""Argument parser of the commands: argparse, with errors of one line as everywhere in hasten."""

import argparse
from typing import NoReturn

from hasten.accel.errors import UserError


class Parser(argparse.ArgumentParser):
    """Parser of `hasten COMMAND …`; a wrong argument is a UserError, --help exits with 0."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(
            prog=f"hasten {command}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def error(self, message: str) -> NoReturn:
        """UserError with argparse's message."""
        raise UserError(f"{message}; see {self.prog} --help")
