"""Copies of what is read by URI, on fsspec's store in memory and on one that can be made to fail."""

import errno
import fcntl
import threading
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from hasten.accel.errors import UserError
from hasten.cluster.storage.remote import Remote, is_uri, localized, locked
from hasten.kernels.cache import default_cache

FILES = {"config.json": b"{}", "a b/part 1#2 [x].bin": b"12345", "model.safetensors": bytes(range(200))}


class Failing(MemoryFileSystem):
    """A store with its own files, which calls `before(name)` before every copy; `copied` are the names so far."""

    protocol = "failing"
    store = {}  # noqa: RUF012  # as its base has it
    pseudo_dirs = [""]  # noqa: RUF012
    copied = []  # noqa: RUF012
    before = staticmethod(lambda name: None)

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("failing://", "memory://", 1))

    def get_file(self, path, target, **options):
        self.before(path)
        super().get_file(path, target, **options)
        self.copied.append(path)

    def pipe_file(self, path, value, **options):
        self.before(path)
        super().pipe_file(path, value, **options)


fsspec.register_implementation("failing", Failing, clobber=True)


@pytest.fixture(autouse=True)
def store(monkeypatch):
    for system in (MemoryFileSystem, Failing):
        system.store.clear()
        system.pseudo_dirs[:] = [""]
    Failing.copied.clear()
    monkeypatch.setattr(Failing, "before", staticmethod(lambda name: None))
    return fsspec.filesystem("failing")


def fill(uri, files=FILES):
    system, path = fsspec.url_to_fs(uri)
    for name, content in files.items():
        system.pipe_file(f"{path}/{name}", content)


def contents(folder: Path):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://bucket/llama", True),
        ("file:///models/llama", True),
        ("/models/llama", False),
        ("embedded:target", False),
        ("hub:name:split", False),
        ("org/name", False),
    ],
)
def test_uris_are_told_from_paths_and_names(text, expected):
    assert is_uri(text) is expected


def test_the_cache_is_where_hasten_cache_says(monkeypatch):
    monkeypatch.setenv("HASTEN_CACHE", "/shared/cache")
    assert default_cache() == Path("/shared/cache")


def test_a_folder_is_copied_under_its_name_and_once(tmp_path):
    fill("failing://bucket/my llama")
    seen = []
    copy = localized("failing://bucket/my llama", tmp_path, "model", lambda done, total: seen.append((done, total)))
    assert copy.name == "my llama"
    assert copy.is_absolute()
    assert contents(copy) == FILES
    assert seen[-1] == (207, 207)
    assert len(Failing.copied) == 3
    assert localized("failing://bucket/my llama", tmp_path) == copy
    assert len(Failing.copied) == 3


def test_a_single_file_is_copied_with_its_ending(tmp_path):
    fill("memory://data", {"prompts one.jsonl": b"{}\n"})
    copy = localized("memory://data/prompts one.jsonl", tmp_path, "prompts")
    assert copy.name == "prompts one.jsonl"
    assert copy.read_bytes() == b"{}\n"


def test_what_lies_at_a_file_uri_is_used_in_place(tmp_path):
    assert localized(f"file://{tmp_path}/my llama", tmp_path / "cache") == tmp_path / "my llama"
    assert not (tmp_path / "cache").exists()


def test_a_copy_that_broke_off_goes_on_with_the_missing_files(tmp_path, monkeypatch):
    fill("failing://bucket/llama")

    def broken(name):
        if name.endswith("model.safetensors"):
            raise ConnectionError("connection reset")

    monkeypatch.setattr(Failing, "before", staticmethod(broken))
    with pytest.raises(UserError, match=r"model=failing://bucket/llama cannot be read .*connection reset"):
        localized("failing://bucket/llama", tmp_path)
    before = set(Failing.copied)
    assert {name.rpartition("/")[2] for name in before} == {"config.json", "part 1#2 [x].bin"}
    monkeypatch.setattr(Failing, "before", staticmethod(lambda name: None))
    assert contents(localized("failing://bucket/llama", tmp_path)) == FILES
    assert sorted(Failing.copied) == sorted([*before, "/bucket/llama/model.safetensors"])


def test_a_half_copied_file_is_not_taken_for_whole(tmp_path, monkeypatch):
    fill("failing://bucket/llama")
    whole = MemoryFileSystem.get_file

    def cut(self, path, target, **options):
        Path(target).write_bytes(b"1")
        raise KeyboardInterrupt

    monkeypatch.setattr(MemoryFileSystem, "get_file", cut)
    with pytest.raises(KeyboardInterrupt):
        localized("failing://bucket/llama", tmp_path)
    monkeypatch.setattr(MemoryFileSystem, "get_file", whole)
    copy = localized("failing://bucket/llama", tmp_path)
    assert contents(copy.parent) == {f"llama/{name}": content for name, content in FILES.items()}


def test_a_file_that_changes_meanwhile_is_refused_and_not_kept(tmp_path, monkeypatch, store):
    fill("failing://bucket/llama")
    changed = []

    def change(name):
        if not changed:
            changed.append(name)
            # As long as before: its size does not tell.
            MemoryFileSystem.pipe_file(store, "/bucket/llama/config.json", b"[]")

    monkeypatch.setattr(Failing, "before", staticmethod(change))
    with pytest.raises(UserError, match="model=failing://bucket/llama changed while it was copied"):
        localized("failing://bucket/llama", tmp_path)
    assert (localized("failing://bucket/llama", tmp_path) / "config.json").read_bytes() == b"[]"


def test_what_changed_since_gets_another_copy_and_the_first_one_stays(tmp_path):
    fill("memory://bucket/llama")
    first = localized("memory://bucket/llama", tmp_path)
    fill("memory://bucket/llama", {"config.json": b"[]"})
    second = localized("memory://bucket/llama", tmp_path)
    assert (first / "config.json").read_bytes() == b"{}"
    assert (second / "config.json").read_bytes() == b"[]"


def test_weights_for_other_programs_are_left_where_safetensors_are(tmp_path):
    fill("memory://llama", {**FILES, "original/consolidated.00.pth": b"1", "pytorch_model.bin": b"1"})
    assert contents(localized("memory://llama", tmp_path)) == FILES


def test_processes_that_copy_the_same_wait_for_each_other(tmp_path):
    fill("failing://bucket/llama")
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(localized("failing://bucket/llama", tmp_path))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert contents(found[0]) == FILES
    assert len(Failing.copied) == 3


def test_a_file_system_without_locks_keeps_nobody_out(tmp_path, monkeypatch):
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path / "lock", "another run writes it"):
        fill("memory://llama")
        assert contents(localized("memory://llama", tmp_path)) == FILES


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("memory://nothing/there", "model=memory://nothing/there does not exist"),
        ("nope://bucket/llama", "model=nope://bucket/llama has an unknown scheme"),
        ("memory://", "model=memory:// names no file or folder"),
    ],
)
def test_a_wrong_uri_is_one_line(uri, message, tmp_path):
    with pytest.raises(UserError, match=message) as refusal:
        localized(uri, tmp_path)
    assert "\n" not in str(refusal.value)


def test_a_missing_package_is_named_with_the_extra_that_brings_it(tmp_path, monkeypatch):
    def missing(*arguments, **options):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "url_to_fs", missing)
    with pytest.raises(UserError, match=r"model=s3://bucket/llama needs a package .*pip install 'hasten\[cloud\]'"):
        localized("s3://bucket/llama", tmp_path)


def test_missing_credentials_are_named_with_where_they_are_read(tmp_path, monkeypatch):
    class NoCredentialsError(Exception):
        pass

    def refuse(self, path, **options):
        raise NoCredentialsError("Unable to locate credentials")

    fill("failing://bucket/llama")
    monkeypatch.setattr(MemoryFileSystem, "find", refuse)
    with pytest.raises(UserError, match=r"Unable to locate credentials\): check the credentials; s3 reads AWS_"):
        localized("failing://bucket/llama", tmp_path)


def test_a_disk_without_room_is_said_before_anything_is_copied(tmp_path, monkeypatch):
    fill("failing://bucket/llama")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 10})())
    with pytest.raises(UserError, match=r"model=failing://bucket/llama takes 0\.0 GiB.*cache=FOLDER"):
        localized("failing://bucket/llama", tmp_path)
    assert Failing.copied == []


def test_a_cache_that_cannot_be_made_is_named(tmp_path):
    fill("memory://llama")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cache=.*/file cannot be written to \(Not a directory\).*give cache=FOLDER"):
        localized("memory://llama", tmp_path / "file")


def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path, monkeypatch):
    fill("memory://llama")
    found = {"/llama/../../evil": {"name": "/llama/../../evil", "size": 1, "type": "file"}}
    monkeypatch.setattr(MemoryFileSystem, "find", lambda self, path, **options: found)
    with pytest.raises(UserError, match=r"the unsafe name 'llama/\.\./\.\./evil'"):
        localized("memory://llama", tmp_path)


def test_a_removed_file_may_be_gone_already():
    fill("memory://llama")
    remote = Remote("memory://llama", "output")
    remote.remove("llama/config.json")
    remote.remove("llama/config.json")
    assert "llama/config.json" not in remote.files()
