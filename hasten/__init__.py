"""hasten makes large language models cheaper to run.

The folders `accel`, `kernels`, `cluster`, `jobs` and `conf` are installed as subpackages. In a checkout they are beside
this folder, at the top of the repository, from where they can be imported without an installation.
"""

# No other module is imported here: with `python -m hasten` the current folder is still on the import path.
import os

_CHECKOUT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
if os.path.isfile(os.path.join(_CHECKOUT, "pyproject.toml")) and os.path.isdir(os.path.join(_CHECKOUT, "accel")):
    __path__.append(_CHECKOUT)
