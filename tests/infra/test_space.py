"""A full disk is said in one line, however deep the cause lies."""

import errno
import os
from pathlib import Path

import pytest

from tests.support.small_disk import fill, small_disk
from vlfoundry.infra.core.errors import DataError
from vlfoundry.infra.core.space import free_bytes, no_space, require_space


def wrapped(cause: BaseException) -> BaseException:
    try:
        try:
            try:
                raise cause
            except BaseException as error:
                raise ValueError("cannot write") from error
        except ValueError:
            raise RuntimeError("Worker failure: ") from None
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
        RuntimeError("Worker failure", OSError(errno.ENOSPC, "x")),
        ExceptionGroup("several", [KeyError("a"), OSError(errno.ENOSPC, "x")]),
        RuntimeError("(sqlite3.OperationalError) database or disk is full"),
    ],
)
def test_every_wrapping(tmp_path: Path, error: Exception) -> None:
    for cause in (error, wrapped(error)):
        full = no_space(cause, tmp_path)
        assert full is not None
        assert str(full).startswith(f"no space left on {tmp_path} (")
        assert str(full).endswith(" MB free); make room and run again")


def test_the_folder_that_the_error_names_comes_first(tmp_path: Path) -> None:
    error = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "a" / "x.bin"))
    assert f"no space left on {tmp_path / 'a'} (" in str(no_space(error, Path("/tmp")))


@pytest.mark.parametrize(
    "error", [OSError(errno.EACCES, "x"), RuntimeError("x"), DataError("No space left on device")]
)
def test_other_errors_stay_what_they_are(tmp_path: Path, error: Exception) -> None:
    assert no_space(wrapped(error), tmp_path) is None
    assert no_space(error, tmp_path, ask_disks=True) is None


def test_a_small_disk(tmp_path: Path) -> None:
    error = RuntimeError("unexpected pos 64 vs 0")  # torch's, of a disk that is full
    with small_disk(tmp_path / "small", 5 << 20) as place:
        assert no_space(error, place, ask_disks=True) is None
        assert free_bytes(place / "not" / "yet") == free_bytes(place) == 5 << 20
        fill(place)
        assert f"no space left on {place} (0 MB free)" in str(
            no_space(error, place, ask_disks=True)
        )
        with pytest.raises(OSError, match="No space left") as caught:
            os.write(os.open(place / "more", os.O_CREAT | os.O_WRONLY), b"x" * 9000)
        assert f"no space left on {place} (0 MB" in str(no_space(caught.value, place))


def test_a_file_system_that_counts_no_blocks_is_not_full() -> None:
    assert os.statvfs("/proc").f_blocks == 0
    require_space(Path("/proc"), Path("/proc/self/nope"))
