"""Packs hasten's own code into a zip file, which a cluster unpacks for a submitted job."""

import subprocess
import zipfile
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from hasten.accel.errors import UserError
from hasten.import_path import ROOT

PACKAGES = ("accel", "cluster", "conf", "hasten", "jobs", "kernels")
# The checkout, or the site-packages folder with the installed `hasten`.
_ROOT = Path(ROOT)
_ENTRY = "hasten/jobs/cli/main.py"


def source(env: str | None) -> str:
    """`tree`, `installed`, `none` or the path of a wheel. env: the same; None takes what this process runs from."""
    if env is None:
        return "tree" if _is_checkout() else "installed"
    if env == "tree" and not _is_checkout():
        raise UserError(f"--env tree: hasten runs from {_ROOT}, which is no checkout: use --env installed")
    if env not in ("tree", "installed", "none") and not Path(env).is_file():
        raise UserError(f"--env {env} is wrong: expected tree, installed, none or the path of a wheel")
    return env


def pack(chosen: str, path: Path) -> None:
    """Write the zip file for a result of source() other than `none`; equal code gives equal bytes.

    tree: files that git tracks or would track. installed: the packages of this process.
    """
    if chosen not in ("tree", "installed"):
        _pack_wheel(Path(chosen), path)
        return
    files = {_installed_name(path): path.read_bytes() for path in (_tree() if chosen == "tree" else _all())}
    # With this, importlib.metadata gives the version of the sent code, not that of a hasten installed on the cluster.
    files |= _distribution_info()
    _write(path, sorted(files.items()))


def _is_checkout() -> bool:
    return (_ROOT / "pyproject.toml").is_file()


def _tree() -> Iterator[Path]:
    command = ["git", "-C", str(_ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *PACKAGES]
    try:
        # Only if the checkout has a repository of its own: in a copy of the tree, git would use one further up.
        listed = subprocess.run(command, capture_output=True, check=True).stdout if (_ROOT / ".git").exists() else b""
    except (OSError, subprocess.SubprocessError):
        listed = b""
    files = [_ROOT / name.decode() for name in listed.split(b"\0") if name]
    # git lists deleted files until the deletion is committed.
    yield from (file for file in files if file.is_file()) if files else _all()


def _all() -> Iterator[Path]:
    for package in PACKAGES if _is_checkout() else ("hasten",):
        for path in (_ROOT / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path


def _installed_name(file: Path) -> str:
    """Path relative to the import root. In a checkout, the subpackages are beside `hasten`, not in it."""
    name = file.relative_to(_ROOT).as_posix()
    return name if name.startswith("hasten/") else f"hasten/{name}"


def _distribution_info() -> dict[str, bytes]:
    try:
        version = metadata.distribution("hasten").version
    except metadata.PackageNotFoundError:
        return {}
    text = f"Metadata-Version: 2.1\nName: hasten\nVersion: {version}\n"
    return {f"hasten-{version}.dist-info/METADATA": text.encode()}


def _pack_wheel(wheel: Path, path: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            files = [(name, archive.read(name)) for name in sorted(archive.namelist()) if not name.endswith("/")]
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"--env {wheel} is no wheel ({error})") from None
    if _ENTRY not in dict(files):
        raise UserError(f"--env {wheel} is no wheel of hasten: it does not contain {_ENTRY}")
    _write(path, files)


def _write(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files:
            # Without a timestamp: the cluster recognises a package that it already has by its bytes.
            entry = zipfile.ZipInfo(name)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            # Level 1: most of the bytes are weights, which the default shrinks by 2 % more in 2.5 times the time.
            archive.writestr(entry, content, compresslevel=1)
