from pathlib import Path

from hasten.accel.models import embedded


def test_an_embedded_model_is_kept_by_its_name_because_the_package_may_move(tmp_path):
    for name in embedded.NAMES:
        assert embedded.reference(embedded.path(name)) == f"embedded:{name}"
        assert embedded.from_reference(f"embedded:{name}") == embedded.path(name)
    for folder in (tmp_path, tmp_path / "target", Path(embedded.__file__).parent):
        assert embedded.from_reference(embedded.reference(folder)) == folder.resolve()
