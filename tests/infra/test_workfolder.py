"""Every run key has a folder, also what an older version left, and nothing is lost on the way."""

import os
from pathlib import Path

import pytest

from tests.support.small_disk import small_disk
from vlfoundry.infra.core import workfolder
from vlfoundry.infra.core.workfolder import (
    GONE,
    KEY_FILE,
    claim,
    current,
    folders,
    key_of,
    set_aside,
)

ADDRESS = "sft@full"
KEYS = ["1a" * 32, "2b" * 32, "3c" * 32]


def silent(_line: str) -> None:
    """Nobody listens."""


def contents(folder: Path) -> dict[str, str]:
    """Files below it, without the key's own."""
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != KEY_FILE
    }


def old_layout(root: Path) -> None:
    """As versions before left it: the last state in the step's own folder, others beside it."""
    for name, key, step in (
        ("sft-full", KEYS[0], 11),
        (f"sft-full.old-{KEYS[1][:12]}", KEYS[1], 5),
        ("sft-full.old-unknown", None, 7),
    ):
        place = root / "work" / name
        (place / f"checkpoints/step-{step:06d}").mkdir(parents=True)
        (place / f"checkpoints/step-{step:06d}/rank0").write_text(name)
        (place / "steps.jsonl").write_text(f"{step}\n")
        if key:
            (place / KEY_FILE).write_text(key)


def whole(root: Path) -> bool:
    home = root / "work/sft-full"
    return [contents(home / key[:12]) for key in KEYS[:2]] == [
        {"checkpoints/step-000011/rank0": "sft-full", "steps.jsonl": "11\n"},
        {
            "checkpoints/step-000005/rank0": f"sft-full.old-{KEYS[1][:12]}",
            "steps.jsonl": "5\n",
        },
    ]


def test_what_an_older_version_left_is_taken_over(tmp_path: Path) -> None:
    old_layout(tmp_path)
    assert current(tmp_path, ADDRESS) == tmp_path / "work/sft-full"
    assert claim(tmp_path, ADDRESS, KEYS[1], silent) == tmp_path / "work/sft-full" / KEYS[1][:12]
    assert whole(tmp_path)
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == [
        "sft-full",
        "sft-full.old-unknown",
    ]
    assert sorted(path.name for path in (tmp_path / "work/sft-full").iterdir()) == [
        key[:12] for key in KEYS[:2]
    ]


def test_a_kill_on_the_way_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each of its renames in turn."""
    rename, limit = Path.rename, 0
    while True:
        root, done = tmp_path / str(limit), [0]
        old_layout(root)

        def killed(self: Path, target: Path, done: list[int] = done, limit: int = limit) -> Path:
            if done[0] == limit:
                raise KeyboardInterrupt
            done[0] += 1
            return rename(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", killed)
            try:
                claim(root, ADDRESS, KEYS[2], silent)
                break
            except KeyboardInterrupt:
                pass
        claim(root, ADDRESS, KEYS[2], silent)
        assert whole(root), limit
        assert len(folders(root / "work/sft-full")) == 3
        limit += 1
    assert limit == 6  # two files and the key, two folders, the new one


def test_the_last_one_of_an_older_version_is_the_last_one(tmp_path: Path) -> None:
    """It had been begun before another one, and had come back; its marker was as old as it."""
    old_layout(tmp_path)
    for name, time in (("sft-full", 1000), (f"sft-full.old-{KEYS[1][:12]}", 2000)):
        os.utime(tmp_path / "work" / name / KEY_FILE, (time, time))
    claim(tmp_path, ADDRESS, KEYS[2], silent)
    found = [key_of(path) for path in folders(tmp_path / "work/sft-full")]
    assert sorted(found[:2], key=str) == [KEYS[0], KEYS[2]]
    assert found[2] == KEYS[1]


def test_no_state_takes_the_place_of_another(tmp_path: Path) -> None:
    """Two of one run key, however they came to be, and folders within one of nobody: that is what
    an older version makes of the new layout if it is run once more."""
    home = tmp_path / "work/sft-full"
    (claim(tmp_path, ADDRESS, KEYS[0], silent) / "steps.jsonl").write_text("of the new layout")
    (claim(tmp_path, ADDRESS, KEYS[2], silent) / "steps.jsonl").write_text("within")
    home.rename(tmp_path / "work/sft-full.old-unknown")
    old_layout(tmp_path / "other")
    (tmp_path / "other/work/sft-full").rename(home)
    claim(tmp_path, ADDRESS, KEYS[0], silent)
    found = {path.name: (path / "steps.jsonl").read_text() for path in folders(home)}
    assert found == {
        KEYS[0][:12]: "11\n", f"{KEYS[0][:12]}.1": "of the new layout", KEYS[2][:12]: "within",
    }  # fmt: skip


def test_a_link_stays_where_it_is(tmp_path: Path) -> None:
    """One that leads from beside a step leads nowhere from inside of it."""
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / KEY_FILE).write_text(KEYS[0])
    (tmp_path / "work").mkdir()
    link = tmp_path / f"work/sft-full.old-{KEYS[0][:12]}"
    link.symlink_to("../scratch")
    claim(tmp_path, ADDRESS, KEYS[1], silent)
    assert key_of(link) == KEYS[0]


def test_what_is_being_deleted_is_no_state(tmp_path: Path) -> None:
    own = claim(tmp_path, ADDRESS, KEYS[0], silent)
    own.rename(own.with_name(own.name + GONE))
    assert folders(own.parent) == []
    assert current(tmp_path, ADDRESS) is None
    assert claim(tmp_path, ADDRESS, KEYS[0], silent) == own
    assert folders(own.parent) == [own]


def test_a_folder_that_goes_meanwhile_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`vlfoundry gc` beside a report."""
    for key in KEYS[:2]:
        claim(tmp_path, ADDRESS, key, silent)
    read = workfolder.key_of

    def gone_after(folder: Path) -> str | None:
        found = read(folder)
        if found == KEYS[0]:
            folder.rename(folder.with_name(folder.name + GONE))
        return found

    monkeypatch.setattr(workfolder, "key_of", gone_after)
    assert [path.name for path in folders(tmp_path / "work/sft-full")] == [KEYS[1][:12]]


def test_a_step_s_folder_may_be_a_disk(tmp_path: Path) -> None:
    """On which an older version kept its state, and nothing leads there by renaming."""
    home, said = tmp_path / "work/sft-full", []
    with small_disk(home, 1 << 20):
        old_layout(tmp_path)
        (home / "lost+found").mkdir()
        (tmp_path / "work/sft-full.old-link").symlink_to("sft-full.old-unknown")
        for _ in range(2):
            claim(tmp_path, ADDRESS, KEYS[1], said.append)
        assert contents(home / KEYS[0][:12])["steps.jsonl"] == "11\n"
        assert contents(home / KEYS[1][:12]) == {}
        assert sorted(path.name for path in home.iterdir()) == [
            *(key[:12] for key in KEYS[:2]), "lost+found",
        ]  # fmt: skip
    beside = tmp_path / "work" / f"sft-full.old-{KEYS[1][:12]}"
    assert contents(beside)["steps.jsonl"] == "5\n"
    assert set_aside(home)[:2] == [beside, tmp_path / "work/sft-full.old-link"]
    assert said[0].startswith(f"work/{beside.name} is of just this run and could not be renamed")
    assert len(said) == 2  # and that it starts anew; the second time it goes on


def test_a_step_s_folder_may_be_a_mount_point(tmp_path: Path) -> None:
    home = tmp_path / "work/sft-full"
    home.mkdir(parents=True)
    (home / "lost+found").mkdir()
    inode = home.stat().st_ino
    claim(tmp_path, ADDRESS, KEYS[0], silent)
    assert home.stat().st_ino == inode
    assert sorted(path.name for path in home.iterdir()) == [KEYS[0][:12], "lost+found"]


def test_the_current_one_made_what_lies_there_or_was_used_last(tmp_path: Path) -> None:
    assert current(tmp_path, ADDRESS) is None
    for number, key in enumerate(KEYS):
        marker = claim(tmp_path, ADDRESS, key, silent) / KEY_FILE
        os.utime(marker, (1000 + number, 1000 + number))
    found = current(tmp_path, ADDRESS)
    assert found
    assert key_of(found) == KEYS[2]
    lineage = tmp_path / "artifacts/sft/full/lineage.json"
    lineage.parent.mkdir(parents=True)
    for text, key in ((f'{{"run_key": "{KEYS[0]}"}}', KEYS[0]), ('{"run_', KEYS[2])):
        lineage.write_text(text)
        found = current(tmp_path, ADDRESS)
        assert found
        assert key_of(found) == key
    claim(tmp_path, ADDRESS, KEYS[1], silent)  # its use counts, not its making
    assert key_of(folders(tmp_path / "work/sft-full")[0]) == KEYS[1]


def test_a_folder_that_is_half_made_is_nobody_s(tmp_path: Path) -> None:
    part = workfolder.folder(tmp_path, ADDRESS, KEYS[0]).with_suffix(workfolder.PART)
    part.mkdir(parents=True)
    assert folders(tmp_path / "work/sft-full") == []
    claim(tmp_path, ADDRESS, KEYS[0], silent)
    assert [path.name for path in (tmp_path / "work/sft-full").iterdir()] == [KEYS[0][:12]]
