"""hasten makes large language models cheaper to run.

The folders `accel`, `kernels`, `cluster`, `jobs` and `conf` are installed below this package. In a checkout they lie
beside it, at the top of the repository, and are found there without an installation.
"""

from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parents[1]
if (_CHECKOUT / "pyproject.toml").is_file() and (_CHECKOUT / "accel").is_dir():
    __path__.append(str(_CHECKOUT))
