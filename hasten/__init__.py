"""hasten makes large language models cheaper to run.

The folders `accel`, `kernels`, `cluster`, `jobs` and `conf` are installed as subpackages. In a checkout they are beside
this folder, at the top of the repository, from where they can be imported without an installation.
"""

from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parents[1]
if (_CHECKOUT / "pyproject.toml").is_file() and (_CHECKOUT / "accel").is_dir():
    __path__.append(str(_CHECKOUT))
