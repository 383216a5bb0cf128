"""hasten's own code as one zip file, for a cluster to unpack beside a job."""

import subprocess
import zipfile
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

import hasten
from hasten.accel.errors import UserError

PACKAGES = ("accel", "cluster", "conf", "hasten", "jobs", "kernels")
# A checkout, or the folder of installed packages that holds `hasten`.
_ROOT = Path(hasten.__file__).resolve().parents[1]
_ENTRY = "hasten/jobs/cli/main.py"


def source(env: str | None) -> str:
    """`tree`, `installed`, `none` or a wheel's path: env, or, where it is None, what this process itself runs from."""
    if env is None:
        return "tree" if _is_checkout() else "installed"
    if env == "tree" and not _is_checkout():
        raise UserError(f"--env tree: hasten runs from {_ROOT} here, which is no checkout: use --env installed")
    if env not in ("tree", "installed", "none") and not Path(env).is_file():
        raise UserError(f"--env {env} is wrong: expected tree, installed, none or the path of a wheel")
    return env


def pack(chosen: str, path: Path) -> None:
    """Write the zip file of what source() returned, but not of `none`; equal code makes equal bytes.

    tree: files that git tracks or would track; installed: the packages of this process.
    """
    if chosen not in ("tree", "installed"):
        _pack_wheel(Path(chosen), path)
        return
    files = {_installed_name(each): each.read_bytes() for each in (_tree() if chosen == "tree" else _all())}
    # The version, which is read from here, is that of the code and not of a hasten that the cluster may have.
    files |= _distribution_info()
    _write(path, sorted(files.items()))


def _is_checkout() -> bool:
    return (_ROOT / "pyproject.toml").is_file()


def _tree() -> Iterator[Path]:
    command = ["git", "-C", str(_ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *PACKAGES]
    try:
        # A copy of the tree inside somebody else's repository must not ask that one.
        listed = subprocess.run(command, capture_output=True, check=True).stdout if (_ROOT / ".git").exists() else b""
    except (OSError, subprocess.SubprocessError):
        listed = b""
    found = [_ROOT / name.decode() for name in listed.split(b"\0") if name]
    # Deleted files are listed until that is committed.
    yield from (each for each in found if each.is_file()) if found else _all()


def _all() -> Iterator[Path]:
    for package in PACKAGES if _is_checkout() else ("hasten",):
        for each in (_ROOT / package).rglob("*"):
            if each.is_file() and "__pycache__" not in each.parts:
                yield each


def _installed_name(file: Path) -> str:
    """Name below the import root: in a checkout, all packages but `hasten` itself lie beside it."""
    name = file.relative_to(_ROOT).as_posix()
    return name if name.startswith("hasten/") else f"hasten/{name}"


def _distribution_info() -> dict[str, bytes]:
    try:
        found = metadata.distribution("hasten")
    except metadata.PackageNotFoundError:
        return {}
    text = f"Metadata-Version: 2.1\nName: hasten\nVersion: {found.version}\n"
    return {f"hasten-{found.version}.dist-info/METADATA": text.encode()}


def _pack_wheel(wheel: Path, path: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            files = [(name, archive.read(name)) for name in sorted(archive.namelist()) if not name.endswith("/")]
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"--env {wheel} is no wheel ({error})") from None
    if _ENTRY not in dict(files):
        raise UserError(f"--env {wheel} is no wheel of hasten: there is no {_ENTRY} in it")
    _write(path, files)


def _write(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files:
            # Without the time of writing: a package that the cluster has is found by its bytes.
            entry = zipfile.ZipInfo(name)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content)
