"""Outputs behind a URI, on fsspec's store in memory, with every file that goes there or leaves it written down."""

import logging

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from hasten.accel.errors import UserError
from hasten.cluster.storage.mirror import Mirror

URI = "memory://bucket/my output"
CHECKPOINT = {
    ".hasten/fingerprint.json": "{}",
    ".hasten/block-00000.json": "[]",
    "config.json": "{}",
    "model-00001-of-00002.safetensors": "one",
    "model-00002-of-00002.safetensors": "two",
    "model.safetensors.index.json": "{}",
    "tokenizer.json": "{}",
}


@pytest.fixture
def changes(monkeypatch):
    """What was sent to the store, and what removed from it with a `-` before, by name and in order."""
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    found = []
    for function, sign in (("put_file", ""), ("rm_file", "-")):
        original = getattr(MemoryFileSystem, function)

        def noted(self, *arguments, original=original, sign=sign, **options):
            path = arguments[1 if sign == "" else 0]
            if not path.endswith(".check"):
                found.append(sign + path.removeprefix("/bucket/my output").removeprefix("/"))
            return original(self, *arguments, **options)

        monkeypatch.setattr(MemoryFileSystem, function, noted)
    return found


def write(folder, files=CHECKPOINT):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def stored():
    system = fsspec.filesystem("memory")
    return {
        name.removeprefix("/bucket/my output/"): system.cat_file(name).decode()
        for name in system.find("/bucket/my output")
    }


def opened(cache):
    """A mirror as a process makes it that starts."""
    mirror = Mirror(URI, cache)
    with mirror.held():
        mirror.fetch()
    return mirror


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_whose_it_is_goes_first_and_what_completes_it_last(tmp_path, changes):
    mirror = opened(tmp_path)
    write(mirror.path)
    assert mirror.push() == len(CHECKPOINT)
    assert stored() == CHECKPOINT
    assert changes == [
        ".hasten/fingerprint.json",
        ".hasten/block-00000.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "tokenizer.json",
        "model.safetensors.index.json",
        "config.json",
    ]


def test_while_the_run_goes_on_what_completes_it_is_kept_back(tmp_path, changes):
    mirror = opened(tmp_path)
    write(mirror.path, CHECKPOINT | {"model-00003.tmp": "half"})
    mirror.push(final=False)
    assert set(stored()) == set(CHECKPOINT) - {"config.json", "model.safetensors.index.json"}
    mirror.push()
    assert stored() == CHECKPOINT
    assert len(changes) == len(CHECKPOINT)


def test_sending_that_broke_off_goes_on_with_the_rest(tmp_path, changes, monkeypatch):
    mirror = opened(tmp_path)
    write(mirror.path)
    send = MemoryFileSystem.put_file

    def broken(self, path, target, **options):
        if target.endswith("model-00002-of-00002.safetensors"):
            raise ConnectionError("connection reset")
        return send(self, path, target, **options)

    monkeypatch.setattr(MemoryFileSystem, "put_file", broken)
    with pytest.raises(UserError, match=r"output=memory://bucket/my output cannot be written .*connection reset"):
        mirror.push()
    assert "config.json" not in stored()
    monkeypatch.setattr(MemoryFileSystem, "put_file", send)
    changes.clear()
    again = opened(tmp_path)
    assert contents(again.path) == CHECKPOINT
    again.push()
    assert changes == [
        "model-00002-of-00002.safetensors",
        "tokenizer.json",
        "model.safetensors.index.json",
        "config.json",
    ]
    assert stored() == CHECKPOINT


def test_a_fresh_machine_gets_what_the_store_has_and_sends_only_the_rest(tmp_path, changes):
    first = opened(tmp_path / "first")
    partial = {name: text for name, text in CHECKPOINT.items() if "00002.s" not in name and name != "config.json"}
    write(first.path, partial)
    first.push()
    changes.clear()
    second = opened(tmp_path / "second")
    assert contents(second.path) == partial
    write(second.path, {name: CHECKPOINT[name] for name in CHECKPOINT.keys() - partial.keys()})
    second.push()
    assert set(changes) == CHECKPOINT.keys() - partial.keys()
    assert stored() == CHECKPOINT


def test_other_contents_of_the_same_size_are_sent_and_the_old_ones_are_no_complete_output_meanwhile(tmp_path, changes):
    first = opened(tmp_path)
    write(first.path)
    first.push()
    changes.clear()
    write(first.path, {"model-00001-of-00002.safetensors": "eno", "config.json": "[]"})
    first.push(final=False)
    assert changes == ["-config.json", "model-00001-of-00002.safetensors"]
    first.push()
    assert changes[2:] == ["config.json"]
    assert stored() == CHECKPOINT | {"model-00001-of-00002.safetensors": "eno", "config.json": "[]"}


def test_what_a_run_removed_is_removed_from_the_store(tmp_path, changes):
    mirror = opened(tmp_path)
    write(mirror.path)
    mirror.push()
    changes.clear()
    again = opened(tmp_path)
    (again.path / "tokenizer.json").unlink()
    again.push()
    assert changes == ["-tokenizer.json"]
    assert set(stored()) == CHECKPOINT.keys() - {"tokenizer.json"}


def test_what_somebody_cleaned_away_here_is_fetched_again_and_not_removed_from_the_store(tmp_path, changes):
    mirror = opened(tmp_path)
    write(mirror.path)
    mirror.push()
    (mirror.path / "tokenizer.json").unlink()
    again = opened(tmp_path)
    again.push()
    assert contents(again.path) == CHECKPOINT == stored()


def test_of_a_store_that_changed_since_nothing_old_is_sent(tmp_path, changes, caplog):
    caplog.set_level(logging.WARNING)
    mirror = opened(tmp_path)
    write(mirror.path)
    mirror.push()
    other = opened(tmp_path / "elsewhere")
    write(other.path, {".hasten/fingerprint.json": "[]"})
    other.push()
    changes.clear()
    write(mirror.path, {"model-00003.safetensors": "of the old settings"})
    again = opened(tmp_path)
    assert contents(again.path) == CHECKPOINT | {".hasten/fingerprint.json": "[]"}
    assert "has changed since" in caplog.text
    assert again.push() == 0


def test_an_output_that_was_deleted_begins_anew(tmp_path, changes):
    mirror = opened(tmp_path)
    write(mirror.path)
    mirror.push()
    fsspec.filesystem("memory").rm("/bucket/my output", recursive=True)
    assert contents(opened(tmp_path).path) == {}


def test_what_a_killed_run_left_and_never_sent_stays(tmp_path, changes):
    write(opened(tmp_path).path)
    again = opened(tmp_path)
    assert contents(again.path) == CHECKPOINT
    again.push()
    assert stored() == CHECKPOINT


def test_what_is_thrown_away_here_stays_in_the_store(tmp_path, changes):
    mirror = opened(tmp_path)
    write(mirror.path)
    mirror.push()
    mirror.discard()
    assert not mirror.path.exists()
    assert stored() == CHECKPOINT
    assert contents(opened(tmp_path).path) == CHECKPOINT


def test_a_file_of_results_comes_with_its_settings_beside_it(tmp_path, changes):
    mirror = opened(tmp_path)
    mirror.path.write_text("{}\n")
    mirror.path.with_name(mirror.path.name + ".meta.json").write_text("{}")
    mirror.push()
    assert changes == [".meta.json", ""]
    other = opened(tmp_path / "elsewhere")
    assert other.path.read_text() == "{}\n"
    assert other.path.with_name(other.path.name + ".meta.json").read_text() == "{}"


def test_a_folder_of_somebody_else_is_refused_and_not_fetched(tmp_path, changes):
    fsspec.filesystem("memory").pipe_file("/bucket/my output/holiday.jpg", b"1")
    with pytest.raises(UserError, match="output=memory://bucket/my output holds something else"):
        opened(tmp_path)
    assert stored() == {"holiday.jpg": "1"}


def test_a_store_that_takes_nothing_is_refused_at_the_start(tmp_path, changes, monkeypatch):
    def refuse(self, path, value, **options):
        raise PermissionError("Access Denied")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", refuse)
    with pytest.raises(UserError, match=r"output=.* cannot be written \(Access Denied\): check the credentials"):
        opened(tmp_path)


def test_a_second_run_with_the_same_output_is_refused(tmp_path, changes):
    mirror = Mirror(URI, tmp_path)
    with mirror.held(), pytest.raises(UserError, match="another run writes output="), Mirror(URI, tmp_path).held():
        pass
