"""Whether a place can be written is said before the work, in one line, and nothing is left."""

import os
import tempfile
from pathlib import Path

import pytest

from tests.support.small_disk import MS_RDONLY, fill, small_disk
from vlfoundry.infra.core.errors import UserError
from vlfoundry.infra.core.files import (
    LITTER,
    files_below,
    require_writable,
    require_writable_folder,
    write_atomic,
)
from vlfoundry.infra.core.fingerprint import fingerprint


@pytest.mark.parametrize("name", ["new.json", "a/b/new.json", "old.json", "link.json"])
def test_a_place_that_can_be_written_is_left_as_it_was(tmp_path: Path, name: str) -> None:
    (tmp_path / "old.json").write_text("old")
    (tmp_path / "link.json").symlink_to(tmp_path / "to_be.json")
    before = sorted(tmp_path.rglob("*"))
    require_writable(tmp_path / name, "the scores")
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "old.json").read_text() == "old"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("folder", "is a directory; name a file for the scores"),
        ("link", "is a directory"),
        ("file/x.json", "is not a directory"),
        ("file/a/b/x.json", "is not a directory"),
        ("gone/x.json", "is not a directory"),
        ("x" * 300, "the name is too long"),
        ("a/" + "x" * 300 + "/b", "the name is too long"),
        ("nul\0.json", "cannot write the scores"),
        ("/proc/x.json", "cannot write the scores to /proc/x.json"),
    ],
)
def test_a_place_that_cannot_be_written(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    (tmp_path / "gone").symlink_to(tmp_path / "file")
    with pytest.raises(UserError, match=said) as caught:
        require_writable(tmp_path / name, "the scores")
    assert "\n" not in str(caught.value)


def test_what_takes_anything_is_not_written() -> None:
    require_writable(Path("/dev/null"), "the scores")


def test_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    require_writable_folder(tmp_path / "new" / "model", "the model")
    require_writable_folder(tmp_path, "the model")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(UserError, match="is not a directory"):
        require_writable_folder(tmp_path / "file", "the model")


def test_no_permission() -> None:
    """Root may write anywhere, so it asks as nobody."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        (place / "file").write_text("")
        (place / "file").chmod(0o444)
        place.chmod(0o555)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            for child in ("file", "new", "a/new"):
                with pytest.raises(UserError, match="permission denied"):
                    require_writable(place / child, "the scores")
        finally:
            if root:
                os.seteuid(0)
            place.chmod(0o755)
        assert os.listdir(place) == ["file"]


def test_a_read_only_file_system(tmp_path: Path) -> None:
    with (
        small_disk(tmp_path / "ro", 1 << 20, MS_RDONLY) as place,
        pytest.raises(UserError, match="the file system is read-only"),
    ):
        require_writable(place / "x.json", "the scores")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deps.lock"
    (tmp_path / ".deps.lock.part").write_bytes(b"of a killed process, and longer than the text")
    write_atomic(path, "größer\n")
    assert path.read_bytes() == "größer\n".encode()
    write_atomic(path, b"\xff", mode=0o600)
    assert path.read_bytes() == b"\xff"
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == [path.name]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    with small_disk(tmp_path / "full", 1 << 20) as place:
        (place / "x.json").write_text("old")
        fill(place)
        with pytest.raises(OSError, match="No space left"):
            write_atomic(place / "x.json", b"new" * 5000)
        assert (place / "x.json").read_text() == "old"


def test_what_file_managers_leave_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / ".hidden").write_text("kept")
    (tmp_path / "a" / "x.txt").write_text("kept")
    before = fingerprint(tmp_path)
    for name in (".DS_Store", "._x.txt", "b/._y", "b/Thumbs.db", "desktop.ini"):
        (tmp_path / "a" / name).write_text("litter")
    assert [path.name for path in files_below(tmp_path)] == [".hidden", "x.txt"]
    assert fingerprint(tmp_path) == before


def test_dvc_and_git_leave_out_the_same() -> None:
    for name in (".dvcignore", ".gitignore"):
        lines = (Path(__file__).parents[2] / name).read_text("utf-8").splitlines()
        assert set(LITTER) <= set(lines), name
