"""Run keys change with what a result depends on, and with nothing else."""

from pathlib import Path

import pytest

from infra.errors import DataError
from infra.fingerprint import fingerprint
from infra.runkey import import_closure, run_key


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    for package in ("stages", "infra"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
    (tmp_path / "infra/io.py").write_text("import os\n")
    (tmp_path / "infra/lazy.py").write_text("X = 1\n")
    (tmp_path / "infra/lazy.json").write_text("{}")
    (tmp_path / "infra/other.py").write_text("X = 2\n")
    (tmp_path / "stages/one.py").write_text(
        "from infra import io\n\n\ndef run():\n    import infra.lazy\n"
    )
    return tmp_path


def test_the_closure_follows_lazy_imports_and_nothing_else(sources: Path) -> None:
    names = [path.as_posix() for path in import_closure("stages.one", sources)]
    assert names == [
        "infra/__init__.py",
        "infra/io.py",
        "infra/lazy.json",
        "infra/lazy.py",
        "stages/__init__.py",
        "stages/one.py",
    ]


def test_the_key_depends_on_parameters_inputs_and_reached_sources(sources: Path) -> None:
    def key(lr: float = 0.1, data: str = "d1") -> str:
        closure = import_closure("stages.one", sources)
        return run_key("one", {"lr": lr}, {"data": data}, closure, sources)

    first = key()
    assert key() == first
    assert key(lr=0.2) != first
    assert key(data="d2") != first
    (sources / "infra/other.py").write_text("X = 3\n")
    assert key() == first
    (sources / "infra/lazy.py").write_text("X = 4\n")
    assert key() != first


def test_a_folder_s_fingerprint_sees_names_and_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a").write_text("1")
    first = fingerprint(folder)
    (folder / "a").rename(folder / "b")
    assert fingerprint(folder) != first
    with pytest.raises(DataError, match="does not exist"):
        fingerprint(tmp_path / "nothing")
