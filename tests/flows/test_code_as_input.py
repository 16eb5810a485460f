"""Code as an input of a step, in a checkout with a stage of its own: what is stale after which
change, what a person declares harmless, and what both `dvc repro` and a run make of it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlfoundry.infra.core.git import git

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
WALK = """
import asyncio, pathlib
from vlfoundry.flows.graph import load_graph
from vlfoundry.flows.walk import Run, walk
run = Run(root=pathlib.Path.cwd(), graph=load_graph(pathlib.Path.cwd()))
asyncio.run(walk(run))
assert all(result.good for result in run.results.values())
"""
FOLDERS = ("eval", "flows", "infra", "models")
STAGE = '''"""Counts to a number, slowly."""

import time
from dataclasses import dataclass

from vlfoundry.infra.core.progress import Progress
from vlfoundry.infra.core.stage import Context, Stage, main


@dataclass(frozen=True, kw_only=True)
class CountConfig:
    """Options."""

    steps: int
    pause_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is read of params.yaml."""

    count: CountConfig


def run(config: Config, context: Context) -> None:
    """Count on from where it was stopped."""
    place = context.work / "at"
    begin = int(place.read_text()) if place.is_file() else 0
    context.log(f"begins at {begin}")
    with Progress(config.count.steps, start=begin) as progress:
        for step in range(begin, config.count.steps):
            time.sleep(config.count.pause_s)
            place.write_text(str(step + 1))
            progress.update()
    first = int(context.path("data/first.txt").read_text())
    made = context.output("artifacts/count/model")
    made.mkdir()
    (made / "config.json").write_text(str(first + config.count.steps))


STAGE = Stage(
    name="count",
    config=Config,
    inputs=("data/first.txt",),
    outputs=("artifacts/count/model",),
    run=run,
)

if __name__ == "__main__":
    raise SystemExit(main(STAGE))
'''


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("code") / "checkout"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "vlfoundry", root / "vlfoundry", symlinks=True,
                    ignore=shutil.ignore_patterns("__pycache__"))  # fmt: skip
    (root / "stages").mkdir()
    (root / "stages/__init__.py").write_text("")
    (root / "stages/count.py").write_text(STAGE)
    (root / "params.yaml").write_text(
        "seed: 5\ncode: {strict_versions: false}\ncount: {steps: 3}\n"
    )
    (root / "data").mkdir()
    (root / "data/first.txt").write_text("37")
    for name in (".gitignore", ".dvcignore", ".dvc/config"):
        (root / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, root / name)
    (root / "dvc.yaml").write_text("stages: {}\n")
    git(root, "init", "--quiet")
    git(root, "config", "user.name", "Ada Lovelace")
    git(root, "config", "user.email", "ada@example.org")
    said(root, "graph", "--write")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "-m", "A project")
    return root


@pytest.fixture
def project(checkout: Path):
    """As it was committed, with nothing made."""
    yield checkout
    git(checkout, "checkout", "--quiet", ".")
    git(checkout, "clean", "-dffxq", "-e", ".dvc/tmp")


def command(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return command_of(root, "-m", *arguments)


def command_of(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=root, capture_output=True, text=True, check=False,
        env=os.environ | {"DVC_NO_ANALYTICS": "1"},
    )  # fmt: skip


def said(root: Path, *arguments: str) -> str:
    done = command(root, "vlfoundry", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def repro(root: Path) -> str:
    done = command(root, "dvc", "repro")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def walk(root: Path) -> None:
    """What `vlfoundry run` does, without a record on a server."""
    done = command_of(root, "-c", WALK)
    assert done.returncode == 0, done.stdout + done.stderr


def edit(root: Path, name: str, old: str, new: str) -> None:
    text = (root / name).read_text("utf-8")
    assert text.count(old) == 1, (name, old)
    (root / name).write_text(text.replace(old, new))


def stale(root: Path) -> dict[str, str]:
    stages = json.loads(said(root, "status", "--json"))["stages"]
    return {stage["name"]: stage["reason"] for stage in stages if stage["reason"]}


def lock(root: Path) -> str:
    return (root / "dvc.lock").read_text("utf-8")


def lineage(root: Path) -> dict:
    return json.loads((root / "artifacts/count/lineage.json").read_text("utf-8"))


def reword(root: Path) -> None:
    """Comments, docstrings, formatting, annotations, and a module that is declared neutral."""
    edit(root, "stages/count.py", '"""Count on from where it was stopped."""', "# on it goes")
    edit(root, "stages/count.py", "context: Context) -> None:", "context: 'Context'):")
    edit(
        root, "stages/count.py", 'place = context.work / "at"', "place = (\n  context.work / 'at')"
    )
    edit(root, "infra/core/progress.py", "LINE_INTERVAL_S = 10.0", "LINE_INTERVAL_S = 9.0")
    edit(root, "flows/walk.py", "import asyncio\n", "import asyncio\n\nX = 1\n")


def counting(root: Path, steps: int) -> subprocess.Popen[bytes]:
    """A `dvc repro` that has taken some of its steps."""
    edit(root, "params.yaml", "{steps: 3}", f"{{steps: {steps}, pause_s: 0.1}}")
    running = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro"], cwd=root, stdout=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not any(int(path.read_text() or 0) > 4 for path in (root / "work").rglob("at")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return running


def test_what_means_nothing_leaves_everything_up_to_date(project: Path) -> None:
    first = repro(project)
    assert "begins at 0" in first
    before = lock(project)
    reword(project)
    assert stale(project) == {}
    assert "0 of 1 stages to run" in said(project, "run")
    assert "begins at" not in repro(project)
    assert lock(project) == before
    assert "the code of 1 steps that have run means what it did" in said(project, "upgrade")


def test_what_means_something_makes_its_step_stale_and_says_why(project: Path) -> None:
    repro(project)
    edit(project, "stages/count.py", "range(begin, ", "range(begin + 0, ")
    assert stale(project) == {"count": "changed deps: code (stages.count)"}
    upgraded = said(project, "upgrade").splitlines()
    assert "count: its code means something else now (stages.count)" in upgraded
    assert "begins at 0" in repro(project)
    assert stale(project) == {}


def test_a_run_records_what_dvc_records(project: Path) -> None:
    walk(project)
    by_run = lock(project)
    assert by_run.index("  code:") < by_run.index("  count:")
    assert "begins at" not in repro(project)
    assert lock(project) == by_run
    (project / "dvc.lock").unlink()
    shutil.rmtree(project / "artifacts")
    repro(project)
    assert lock(project) == by_run
    edit(project, "stages/count.py", "range(begin, ", "range(begin + 0, ")
    walk(project)
    by_run = lock(project)
    assert "begins at" not in repro(project)
    assert lock(project) == by_run


def test_stopped_patched_and_accepted_it_goes_on_where_it_was(project: Path) -> None:
    running = counting(project, 70)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    first = next((project / "work").rglob("code.json"))
    began = json.loads(first.read_text())
    edit(project, "stages/count.py", "range(begin, ", "range(begin + 0, ")
    declared = said(project, "accept", "count", "--because", "adding nought")
    assert "(stages.count)" in declared
    done = repro(project)
    begin = int(done.partition("begins at ")[2].split()[0])
    assert 4 < begin < 70
    found = lineage(project)
    assert found["accepted"] | {"code": "", "on": ""} == {
        "step": "count", "code": "", "counts_as": began["code"], "because": "adding nought",
        "by": "Ada Lovelace <ada@example.org>", "on": "", "modules": ["stages.count"],
    }  # fmt: skip
    assert found["accepted"]["code"] == found["code"] != began["code"]
    assert stale(project) == {}
    shown = said(project, "lineage", "artifacts/count/model")
    assert "(stages.count), said Ada Lovelace <ada@example.org> on 20" in shown
    assert shown.rstrip().split("\n")[2].endswith(": adding nought")


def test_patched_while_it_runs_what_it_began_with_is_recorded(project: Path) -> None:
    running = counting(project, 60)
    edit(project, "stages/count.py", "range(begin, ", "range(begin + 0, ")
    began = json.loads(next((project / "work").rglob("code.json")).read_text())
    assert command(project, "vlfoundry.infra.core.code").returncode == 0  # somebody asks meanwhile
    stamp = project / "artifacts/code/count.json"
    assert began["code"] not in stamp.read_text()
    assert running.wait(120) == 0
    assert began["code"] in stamp.read_text()
    assert lineage(project)["code"] == began["code"]
    assert stale(project) == {"count": "changed deps: code (stages.count)"}


def test_accepted_what_stands_stays(project: Path) -> None:
    repro(project)
    before = lock(project)
    for earlier, later in (("(begin, ", "(begin + 0, "), ("(begin + 0, ", "(begin - 0, ")):
        edit(project, "stages/count.py", earlier, later)
        assert list(stale(project)) == ["count"]
        said(project, "accept", "count", "--because", "nought")
        assert stale(project) == {}
    assert "begins at" not in repro(project)
    assert lock(project) == before
    refused = command(project, "vlfoundry", "accept", "count", "--because", "nought")
    assert refused.returncode == 2
    assert (
        "count: its code counts as that of artifacts/count/lineage.json already" in refused.stderr
    )
    git(project, "checkout", "--quiet", "stages")  # back to what it was
    assert stale(project) == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("count@full", "--because", "x"), "all variants of count share their code; write count"),
        (("counts", "--because", "x"), r"no step 'counts'; expected one of ['count']"),
        (("count", "--because", " "), "--because is empty"),
        (("count", "--because", "x"), "no earlier code is known"),
    ],
)
def test_what_cannot_be_accepted(project: Path, arguments: tuple[str, ...], message: str) -> None:
    done = command(project, "vlfoundry", "accept", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (project / "accepted.yaml").exists()


def test_other_libraries_are_told_and_counted_where_asked(project: Path) -> None:
    repro(project)
    path = project / "artifacts/count/lineage.json"
    made = json.loads(path.read_text())
    version = made["libraries"]["numpy"]
    made["libraries"]["numpy"] = "1.9.0"
    path.write_text(json.dumps(made))
    shown = said(project, "upgrade")
    assert f"count: other libraries: numpy 1.9.0 -> {version} (up to date," in shown
    edit(project, "params.yaml", "false", "true")
    assert f"numpy 1.9.0 -> {version}" in stale(project)["count"]


def test_a_newer_format_is_refused_by_name(project: Path) -> None:
    edit(project, "dvc.yaml", "project_format: 2, written_by: vlfoundry 0.1.0",
         "project_format: 3, written_by: vlfoundry 7.1")  # fmt: skip
    expected = "project format 3, written by vlfoundry 7.1; this is vlfoundry 0.1.0, which knows"
    for arguments in (("vlfoundry", "status"), ("vlfoundry", "run"), ("dvc", "repro")):
        done = command(project, *arguments)
        assert done.returncode != 0
        assert expected in " ".join((done.stdout + done.stderr).split())


def test_an_upgrade_keeps_stages_of_one_s_own(project: Path) -> None:
    own = "  # --- mine\n  mine:\n    cmd: echo 1 > mine.txt\n    outs: [mine.txt]\n"
    text = (project / "dvc.yaml").read_text("utf-8")
    old = text.replace("timeout_s: 43200", "timeout_s: 60").replace(
        "project_format: 2", "project_format: 1"
    )
    (project / "dvc.yaml").write_text(old + own)
    shown = said(project, "upgrade")
    assert (
        "dvc.yaml is rendered again (it was of vlfoundry 0.1.0, format 1; this is format 2)"
        in shown
    )
    found = (project / "dvc.yaml").read_text("utf-8")
    assert found.startswith(text)
    assert "cmd: echo 1 > mine.txt" in found
    assert set(stale(project)) == {"count", "mine"}
    assert "dvc.yaml is as this version writes it" in said(project, "upgrade")
