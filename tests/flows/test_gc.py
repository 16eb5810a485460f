"""Only `vlfoundry gc --delete` deletes training state, and of nobody who may still want it."""

import fcntl
import json
import os
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import vlfoundry.flows.cli
from vlfoundry.flows import gc
from vlfoundry.infra.core.workfolder import KEY_FILE, claim, lock_file

WEEKLY = "work/workspaces/weekly/work/generative"
KEYS = {letter: letter * 64 for letter in "abcdef"}


def state(root: Path, step: str, key: str, size: int, day: int) -> Path:
    folder = root / "work" / step / KEYS[key][:12]
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "x").write_bytes(b"0" * size)
    (folder / KEY_FILE).write_text(KEYS[key])
    for path in (folder / "checkpoints" / "x", folder / KEY_FILE):
        os.utime(path, (day * 86_400, day * 86_400))
    return folder


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three states of stage 1, one of stage 3, one in a workspace with a second one, and what an
    older version set aside."""
    (tmp_path / ".dvc").mkdir()
    (tmp_path / "dvc.yaml").touch()
    for key, size, day in (("a", 3_000_000, 9), ("b", 1000, 5), ("c", 70, 12)):
        state(tmp_path, "contrastive", key, size, day)
    state(tmp_path, "sft-full", "d", 500, 2)
    weekly = tmp_path / "work/workspaces/weekly"
    state(weekly, "generative", "e", 50_000, 7)
    state(weekly, "generative", "f", 60, 8)
    earlier = tmp_path / "work/sft-simple.old-unknown.2"
    earlier.mkdir(parents=True)
    (earlier / "x").write_bytes(b"0" * 700)
    os.utime(earlier / "x", (3 * 86_400, 3 * 86_400))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def short(path: Path) -> str:
    return path.name if "old" in path.name else path.name[0]


def free(root: Path) -> dict[str, int]:
    """What it would delete, by the first letter of its run key, and its bytes."""
    return {short(found.folder): found.size_bytes for found in gc.states(root) if not found.kept}


def kept(root: Path) -> dict[str, str]:
    return {short(found.folder): found.kept for found in gc.states(root) if found.kept}


def only(root: Path, letter: str) -> list[gc.State]:
    return [found for found in gc.states(root) if short(found.folder) == letter]


def run(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(vlfoundry.flows.cli.app, ["gc", *arguments])
    assert done.exit_code == code, done.output
    return done.output


def test_what_nobody_needs_is_listed_and_deleted_when_told(project: Path) -> None:
    assert free(project) == {
        "sft-simple.old-unknown.2": 700, "b": 1064, "e": 50_064, "a": 3_000_064,
    }  # fmt: skip
    assert kept(project) == dict.fromkeys("cdf", "the last of its step")
    before = sorted(project.rglob("*"))
    other, last = "of other parameters, inputs or code than the last run", "the last of its step"
    listed = run().splitlines()
    assert [re.split("  +", line.strip()) for line in listed] == [
        ["nobody needs:"],
        ["work/sft-simple.old-unknown.2", "0.0 MB", "last used 1970-01-04", gc.LEFT],
        ["work/contrastive/bbbbbbbbbbbb", "0.0 MB", "last used 1970-01-06", other],
        [f"{WEEKLY}/eeeeeeeeeeee", "0.1 MB", "last used 1970-01-08", other],
        ["work/contrastive/aaaaaaaaaaaa", "3.0 MB", "last used 1970-01-10", other],
        ["kept:"],
        ["work/sft-full/dddddddddddd", "0.0 MB", "last used 1970-01-03", last],
        [f"{WEEKLY}/ffffffffffff", "0.0 MB", "last used 1970-01-09", last],
        ["work/contrastive/cccccccccccc", "0.0 MB", "last used 1970-01-13", last],
        ["4 of 7 folders would be deleted, 3.1 MB; `vlfoundry gc --delete` does it"],
    ]
    assert len({line.index("last used") for line in listed if "last used" in line}) == 1
    assert sorted(project.rglob("*")) == before
    assert run("--delete").endswith("3.1 MB freed\n")
    assert free(project) == {}
    assert len(kept(project)) == 3
    assert run().endswith("0 of 3 folders would be deleted, 0.0 MB\n")


def test_what_made_the_results_is_kept(project: Path) -> None:
    place = project / "artifacts/contrastive/lineage.json"
    place.parent.mkdir(parents=True)
    place.write_text(json.dumps({"run_key": KEYS["b"]}))
    assert "b" not in free(project)
    assert kept(project)["b"] == "made what lies in artifacts/"


def test_what_runs_is_kept_also_if_it_begins_after_the_list(project: Path) -> None:
    lock = lock_file(project, "contrastive")
    lock.parent.mkdir(parents=True)
    found = gc.states(project)
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert set(free(project)) == {"sft-simple.old-unknown.2", "e"}
        assert kept(project)["a"] == "the step runs now"
        done = gc.delete(project, found)
    assert done.freed_bytes == 700 + 50_064
    assert [line.rpartition(": ")[2] for line in done.needed] == ["contrastive runs now"] * 2
    assert done.failed == []
    assert set(free(project)) == {"a", "b"}


def test_what_was_gone_on_with_after_the_list_is_kept(project: Path) -> None:
    """And its run has ended by then."""
    found = gc.states(project)
    claim(project, "contrastive", KEYS["a"], lambda _line: None)
    assert [line.rpartition(": ")[2] for line in gc.delete(project, found).needed] == [
        "the last of its step"
    ]
    assert set(kept(project)) == set("adf")  # c was the last in the list, and so not deleted
    assert set(free(project)) == {"c"}


def test_a_run_need_not_wait_while_it_deletes(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / ".dvc/tmp/stages").mkdir(parents=True)
    remove, begun = gc.shutil.rmtree, list[str]()

    def slowly(folder: Path, **options: object) -> None:
        with lock_file(project, "contrastive").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if it must wait
            key = gc.key_of(folder) or ""
            begun.append(key)
            claim(project, "contrastive", key, lambda _line: None)
        remove(folder, **options)

    monkeypatch.setattr(gc.shutil, "rmtree", slowly)
    assert gc.delete(project, only(project, "a")).freed_bytes == 3_000_064
    assert begun == [KEYS["a"]]
    (own,) = only(project, "a")
    assert own.kept == "the last of its step"
    assert own.size_bytes == 64
    assert not list((project / "work").rglob("*.gone"))


def test_two_at_once_and_beside_a_run(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first has begun to delete is nothing to fail for; rubbish needs no lock."""
    found, remove = gc.states(project), gc.shutil.rmtree
    begun = list[Path]()

    def another(folder: Path, **options: object) -> None:
        begun.append(folder)
        if len(begun) == 1:
            second = gc.delete(project, gc.states(project))
            assert (second.failed, second.needed) == ([], [])
        remove(folder, **options)

    monkeypatch.setattr(gc.shutil, "rmtree", another)
    first = gc.delete(project, found)
    assert (first.failed, first.needed) == ([], [])
    assert len(begun) == 1 + 4  # the second takes them all, also what the first has
    assert free(project) == {}
    monkeypatch.undo()
    monkeypatch.chdir(project)
    state(project, "contrastive", "a", 9, 3).rename(project / "work/contrastive/aaaaaaaaaaaa.gone")
    lock = lock_file(project, "contrastive")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert gc.delete(project, gc.states(project)).freed_bytes == 9 + 64


@pytest.mark.parametrize("removed", ["nothing", "the marker"])
def test_a_kill_while_it_deletes_leaves_what_the_next_one_takes(
    project: Path, monkeypatch: pytest.MonkeyPatch, removed: str
) -> None:
    def killed(folder: Path, **_options: object) -> None:
        if removed == "the marker":
            (folder / KEY_FILE).unlink(missing_ok=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gc.shutil, "rmtree", killed)
        for letter in ("a", "sft-simple.old-unknown.2"):
            with pytest.raises(KeyboardInterrupt):
                gc.delete(project, only(project, letter))
    assert not (project / "work/contrastive/aaaaaaaaaaaa").exists()
    assert {found.why for letter in ("a", "sft-simple.old-unknown.2.gone")
            for found in only(project, letter)} == {"half deleted"}  # fmt: skip
    state(project, "contrastive", "a", 9, 3)  # and the same once more
    assert run("--delete").endswith("3.1 MB freed\n")
    assert [path.name for path in (project / "work/contrastive").iterdir()] == ["c" * 12]
    assert not list((project / "work").glob("sft-simple*"))


def test_links_are_deleted_and_not_followed(project: Path) -> None:
    outside = project / "outside"
    outside.mkdir()
    (outside / "precious").write_text("mine")
    (project / "work/contrastive/bbbbbbbbbbbb/checkpoints/link").symlink_to(outside)
    assert free(project)["b"] < 1100 + 200
    run("--delete")
    assert (outside / "precious").read_text() == "mine"


@pytest.mark.parametrize("place", ["run key", "step", "workspace"])
def test_what_lies_behind_a_link_is_left(project: Path, place: str) -> None:
    linked = (
        project
        / {
            "run key": "work/generative/eeeeeeeeeeee",
            "step": "work/generative",
            "workspace": "work/workspaces/other",
        }[place]
    )
    elsewhere = project / "elsewhere"
    (project / "work/workspaces/weekly").rename(elsewhere)
    target = elsewhere / linked.relative_to(project) if place != "workspace" else elsewhere
    state(project, "generative", "c", 70, 12)
    if place == "step":
        (project / "work/generative").rename(project / "work/others")
    linked.symlink_to(target)
    run("--delete")
    assert (elsewhere / "work/generative/eeeeeeeeeeee/checkpoints/x").is_file()
    told = [found for found in gc.states(project) if found.why == gc.BEHIND_A_LINK]
    assert len(told) == {"run key": 1, "step": 2, "workspace": 0}[place]


def test_what_has_a_second_name_elsewhere_frees_nothing(project: Path) -> None:
    folder = project / "work/contrastive/bbbbbbbbbbbb"
    os.link(folder / "checkpoints/x", folder / "best")
    assert free(project)["b"] == 1064
    os.link(folder / "best", project / "elsewhere")
    assert free(project)["b"] == 64


def test_a_file_that_goes_while_it_lists(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As checkpoints of a step that runs do."""
    look = Path.lstat

    def gone(path: Path) -> os.stat_result:
        if path.name == "x":
            path.unlink(missing_ok=True)
        return look(path)

    monkeypatch.setattr(Path, "lstat", gone)
    assert len(gc.states(project)) == 7


def test_what_cannot_be_deleted_is_said_and_the_rest_goes(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read-only folder, and one that cannot be renamed; root may do both, so it is played."""
    remove, rename = os.unlink, Path.rename

    def refused(path: str, **options: object) -> None:
        if path == "x" and "b" * 12 in os.readlink(f"/proc/self/fd/{options['dir_fd']}"):
            raise PermissionError(13, "Permission denied")
        remove(path, **options)

    def stays(path: Path, target: Path) -> Path:
        if path.name == "e" * 12:
            raise OSError(16, "Device or resource busy")
        return rename(path, target)

    monkeypatch.setattr(os, "unlink", refused)
    monkeypatch.setattr(Path, "rename", stays)
    said = run("--delete", code=1)
    assert "work/contrastive/bbbbbbbbbbbb.gone: Permission denied" in said
    assert "work/generative/eeeeeeeeeeee: Device or resource busy" in said
    assert said.endswith("3.0 MB freed\n")
    monkeypatch.undo()
    monkeypatch.chdir(project)
    assert set(free(project)) == {"b", "e"}


def test_what_an_older_version_left(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last one stays, and of those set aside what is needed, or has been of folders."""
    work = project / "work"
    (work / "ingest").mkdir()
    (work / "ingest" / KEY_FILE).write_text(KEYS["a"])
    for name, key, day in (("old-1", "e", 3), ("old-2", "b", 4), ("old-3", "f", 5)):
        for step in ("ingest", "shard"):
            (work / f"{step}.{name}").mkdir()
            (work / f"{step}.{name}" / KEY_FILE).write_text(KEYS[key])
            os.utime(work / f"{step}.{name}" / KEY_FILE, (day * 86_400,) * 2)
    within = work / "filter.old-unknown" / KEYS["c"][:12]
    within.mkdir(parents=True)
    (within / KEY_FILE).write_text(KEYS["c"])
    monkeypatch.setattr(gc, "_needed", lambda _root: gc.Needed(models={KEYS["b"]: "of m@v0.1.0"}))
    why = {found.folder.relative_to(work).as_posix(): found.kept for found in gc.states(project)}
    assert {name: kept for name, kept in why.items() if name[:2] in ("in", "sh", "fi")} == {
        "ingest": "the last of its step, as an older version left it",
        "ingest.old-1": None,
        "ingest.old-2": "of m@v0.1.0",
        "ingest.old-3": None,
        "shard.old-1": None,
        "shard.old-2": "of m@v0.1.0",
        "shard.old-3": "the last of its step",
        "filter.old-unknown": "has folders of run keys, which its step takes over",
    }
