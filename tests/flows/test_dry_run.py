"""`vlfoundry run --dry-run` says what a run would do, and changes nothing."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.support.toy_project import sh
from vlfoundry.flows.cli import app
from vlfoundry.flows.workspace import Variation, workspace

pytestmark = pytest.mark.slow


def files(root: Path) -> dict[str, tuple[int, int]]:
    """Time of change and size of all that is there, git's and DVC's own files included."""
    facts = {p: p.lstat() for p in root.rglob("*")}
    return {
        p.relative_to(root).as_posix(): (fact.st_mtime_ns, fact.st_size)
        for p, fact in facts.items()
    }


def dry_run(root: Path, *arguments: str) -> list[str]:
    """What it prints; nothing of the project is another one afterwards."""
    before = files(root)
    ended = CliRunner().invoke(app, ["run", "--dry-run", *arguments])
    assert (ended.exit_code, ended.exception) == (0, None), ended.output
    assert files(root) == before
    return ended.stdout.splitlines()


def said(lines: list[str]) -> dict[str, str]:
    """Stage -> up to date, would run, from the cache."""
    states = "up to date|would run|from the cache"
    found = [re.fullmatch(rf"(\S+) +({states})(: .*)?", line) for line in lines]
    return {match[1]: match[2] for match in found if match}


def test_what_would_run_and_why(trained: Path) -> None:
    lines = dry_run(trained)
    assert said(lines) == {
        "prepare": "up to date", "train@a": "up to date", "train@b": "up to date",
        "score": "would run",
    }  # fmt: skip
    assert lines[-1] == "1 of 4 stages would run, 0 would come from DVC's cache"
    assert said(dry_run(trained, "--stage", "train@b")) == {
        "prepare": "up to date", "train@b": "up to date",
    }  # fmt: skip
    (trained / "source.txt").write_text("other rows\n")
    lines = dry_run(trained)
    assert set(said(lines).values()) == {"would run"}
    assert "prepare " in lines[0]
    assert "modified source.txt" in lines[0]


def test_what_the_cache_has_is_not_run(trained: Path) -> None:
    shutil.rmtree(trained / "artifacts/train/a")
    shutil.rmtree(trained / "artifacts/prepare")
    assert said(dry_run(trained, "--stage", "train")) == {
        "prepare": "from the cache", "train@a": "from the cache", "train@b": "from the cache",
    }  # fmt: skip
    for path in (trained / ".dvc/cache/files").rglob("*"):
        if path.is_file() and b"train-a" in path.read_bytes():
            path.unlink()
    assert said(dry_run(trained, "--stage", "train"))["train@a"] == "would run"


@pytest.mark.parametrize("of", [["--set", "train.lr=0.5"], ["--profile", "base"]])
def test_a_variation_is_foretold_as_it_comes(trained: Path, of: list[str]) -> None:
    lines = dry_run(trained, *of, "--stage", "train")
    foretold = {"prepare": "from the cache", "train@a": "would run", "train@b": "would run"}
    assert said(lines) == foretold
    assert lines[0].endswith(", which would be made")
    assert lines[-1] == "2 of 3 stages would run, 1 would come from DVC's cache"
    assert len(sh(trained, "git", "worktree", "list").splitlines()) == 1

    variation = Variation(
        profile=of[1] if of[0] == "--profile" else None,
        overrides=(of[1],) if of[0] == "--set" else (),
    )
    with workspace(trained, variation, say=lambda _: None) as lock:
        ended = subprocess.run(
            [sys.executable, "-m", "dvc", "repro", "train"],
            cwd=lock.root, capture_output=True, text=True, check=True, timeout=120,
        )  # fmt: skip
    happened = {
        name: "would run" if f"Running stage '{name}'" in ended.stdout else "from the cache"
        for name in foretold
    }
    assert happened == foretold, ended.stdout
    lines = dry_run(trained, *of, "--stage", "train")
    assert lines[0] == f"workspace: {lock.root}"
    assert set(said(lines).values()) == {"up to date"}


def test_what_is_not_there_is_named(trained: Path) -> None:
    (trained / "source.txt").unlink()
    *_, last = dry_run(trained)
    assert last == "it could not start: " + (
        "prepare reads source.txt, which does not exist; put it there"
    )


def test_mistakes_are_found_as_by_a_run(trained: Path) -> None:
    for words, found in ((["--stage", "nope"], "no stage"), (["--set", "nope=1"], "not exist")):
        before = files(trained)
        ended = CliRunner().invoke(app, ["run", "--dry-run", *words])
        assert found in str(ended.exception)
        assert files(trained) == before
