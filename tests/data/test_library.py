from hasten.accel.data.library import is_held_out, library_files, read_texts


def test_a_file_is_in_one_split_whatever_the_root(tmp_path):
    for name in ("a.py", "email/b.py", "test/test_c.py", "site-packages/d.py", "__pycache__/e.py", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found = library_files("train", tmp_path), library_files("held_out", tmp_path)
    assert sorted(found[0] + found[1]) == ["a.py", "email/b.py", "test/test_c.py"]
    assert all(not is_held_out(name) for name in found[0])
    assert all(is_held_out(name) for name in found[1])


def test_about_one_file_in_twenty_is_held_out():
    held_out = sum(is_held_out(f"package/module_{number}.py") for number in range(2000))
    assert 70 < held_out < 130  # 100, and three standard deviations of a fair draw


def test_empty_files_and_files_that_are_not_text_are_skipped(tmp_path):
    (tmp_path / "good.py").write_text("x = 'é'\n", encoding="utf-8")
    (tmp_path / "latin.py").write_bytes(b"x = '\xe9'\n")
    (tmp_path / "empty.py").write_bytes(b"")
    assert list(read_texts(tmp_path, ["empty.py", "good.py", "latin.py"])) == ["x = 'é'\n"]
