from hasten.jobs.bench._document import replace_section


def test_a_section_is_replaced_where_it_stands_and_the_others_stay(tmp_path):
    document = tmp_path / "docs" / "benchmarks.md"
    replace_section(document, "one", "first")
    replace_section(document, "two", "### inner\n\nsecond")
    replace_section(document, "one", "| a |\n\nnew")
    text = document.read_text()
    assert text.startswith("# Benchmarks\n")
    assert text.endswith("## one\n\n| a |\n\nnew\n\n## two\n\n### inner\n\nsecond\n")
    assert "first" not in text


def test_writing_the_same_section_again_changes_nothing(tmp_path):
    document = tmp_path / "benchmarks.md"
    document.write_text("# Title\n\nBy hand.\n\n## mine\n\nbody\n\n## mine too\n\nother\n")
    before = document.read_text()
    replace_section(document, "mine", "body")
    assert document.read_text() == before
