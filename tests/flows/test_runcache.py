"""Stages that DVC's cache knows are restored in one process, to what `dvc repro` would leave."""

import asyncio
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.toy_project import PARAMS_YAML, processes_marked, sh
from vlfoundry.flows import walk as walking
from vlfoundry.flows.dvclocks import RWLOCK
from vlfoundry.flows.graph import load_graph, lock_is_whole
from vlfoundry.flows.runcache import Restored, command_line, read_line
from vlfoundry.flows.terminal import Terminal
from vlfoundry.flows.walk import Run, restore, walk
from vlfoundry.infra.core.dvccache import md5_of, object_path

pytestmark = pytest.mark.slow

ALL = ["prepare", "train@a", "train@b", "score"]


@pytest.fixture(scope="module")
def done_template(toy_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy, all of it run by DVC itself."""
    root = Path(shutil.copytree(toy_template, tmp_path_factory.mktemp("done") / "toy"))
    environment = {**os.environ, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "dvc", "repro", "--quiet"]
    subprocess.run(command, cwd=root, env=environment, check=True, timeout=120)
    return root


@pytest.fixture
def done(done_template: Path, toy: Path) -> Path:
    shutil.rmtree(toy)
    return Path(shutil.copytree(done_template, toy))


def restored(root: Path) -> tuple[Run, str]:
    """What became of the stages, and what was said."""
    said = io.StringIO()
    run = Run(root=root, graph=load_graph(root), terminal=Terminal(said))
    asyncio.run(restore(run))
    return run, said.getvalue()


def states(run: Run) -> dict[str, str]:
    return {result.name: result.state for result in run.ordered_results()}


def files(root: Path) -> dict[str, bytes]:
    found = sorted(path for path in (root / "artifacts").rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in found}


def test_all_that_is_known_comes_back_with_the_same_lock(done: Path) -> None:
    lock, made = (done / "dvc.lock").read_bytes(), files(done)
    shutil.rmtree(done / "artifacts")
    (done / "dvc.lock").unlink()
    assert load_graph(done).restorable == set(ALL)

    run, said = restored(done)
    assert states(run) == dict.fromkeys(ALL, "restored")
    assert [line.split()[1] for line in said.splitlines()] == [f"{name}:" for name in ALL]
    assert (files(done), (done / "dvc.lock").read_bytes()) == (made, lock)
    assert load_graph(done).stale == frozenset()
    assert not list((done / ".dvc" / "tmp").glob("dvc.lock*"))


def test_outputs_come_back_by_the_lock_alone(done: Path) -> None:
    """As in a clone whose cache was pulled without the run cache."""
    lock, made = (done / "dvc.lock").read_bytes(), files(done)
    shutil.rmtree(done / "artifacts")
    shutil.move(done / ".dvc/cache/runs", done / "runs")
    run, _ = restored(done)
    assert states(run) == dict.fromkeys(ALL, "restored")
    assert (files(done), (done / "dvc.lock").read_bytes()) == (made, lock)
    known = {path.relative_to(done / "runs") for path in (done / "runs").rglob("*")}
    cache = done / ".dvc/cache/runs"
    assert {path.relative_to(cache) for path in cache.rglob("*")} == known  # as DVC adds them


def test_what_another_input_made_is_not_taken_for_this_ones(done: Path) -> None:
    """dvc.lock has outputs, and of other parameters."""
    first, made = (done / "dvc.lock").read_bytes(), files(done)
    (done / "params.yaml").write_text(PARAMS_YAML.replace("seed: 1", "seed: 2"))
    assert load_graph(done).restorable == frozenset()
    sh(done, sys.executable, "-m", "dvc", "repro", "--quiet")
    assert (done / "dvc.lock").read_bytes() != first
    (done / "params.yaml").write_text(PARAMS_YAML)
    run, _ = restored(done)
    assert states(run) == dict.fromkeys(ALL, "restored")
    assert (files(done), (done / "dvc.lock").read_bytes()) == (made, first)


def test_nothing_below_a_stage_that_must_run(done: Path) -> None:
    """It is unknown what the stage will make, even if the cache knows what it once made."""
    (done / "params.yaml").write_text(PARAMS_YAML.replace("0.001", "0.002"))
    for name in ("prepare", "score"):
        shutil.rmtree(done / "artifacts" / name)
    run, _ = restored(done)
    assert states(run) == {"prepare": "restored"}
    assert not (done / "artifacts" / "score").exists()
    graph = load_graph(done)
    assert (graph.stale, graph.restorable) == ({"train@a", "train@b", "score"}, frozenset())


def test_without_a_candidate_no_process_is_started(
    done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def started(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(walking, "run_guarded", started)
    (done / "params.yaml").write_text(PARAMS_YAML.replace("seed: 1", "seed: 3"))
    run, _ = restored(done)
    assert run.results == {}


def test_stages_that_only_seemed_stale_are_unchanged(done: Path) -> None:
    shutil.rmtree(done / "artifacts" / "prepare")
    run, _ = restored(done)
    assert states(run) == {
        "prepare": "restored", "train@a": "unchanged", "train@b": "unchanged", "score": "unchanged",
    }  # fmt: skip


def test_a_damaged_object_is_made_again(done: Path) -> None:
    lock, made = (done / "dvc.lock").read_bytes(), files(done)
    thing = object_path(done / ".dvc/cache", md5_of(done / "artifacts/train/a/weights"))
    thing.chmod(0o644)
    thing.write_bytes(b"other" + thing.read_bytes())
    thing.chmod(0o444)
    shutil.rmtree(done / "artifacts")
    (done / "dvc.lock").unlink()

    run, said = restored(done)
    assert states(run) == {"prepare": "restored", "train@b": "restored"}
    assert "damaged in DVC's cache and deleted there: artifacts/train/a; it runs again" in said
    asyncio.run(walk(run))
    assert states(run) == {**dict.fromkeys(ALL, "restored"), "train@a": "ran"}
    assert (files(done), (done / "dvc.lock").read_bytes()) == (made, lock)


def test_another_dvc_at_work_leaves_the_rest_to_the_walk(done: Path) -> None:
    shutil.rmtree(done / "artifacts")
    run = Run(root=done, graph=load_graph(done), terminal=Terminal(io.StringIO()))
    busy = {"pid": os.getpid(), "cmd": "dvc repro"}
    (done / RWLOCK).write_text(json.dumps({"write": {str(done / "artifacts/train/a"): busy}}))
    asyncio.run(restore(run))
    assert states(run) == {}  # what it had restored by then was not recorded
    said = run.terminal.stream.getvalue()  # pyrefly: ignore[missing-attribute]
    assert said.startswith("DVC's cache is asked for each stage by itself now: ")
    assert "is busy" in said


@pytest.mark.parametrize("delay_s", [0.3, 0.5, 0.7, 0.9])
def test_after_a_kill_the_next_one_goes_on(done: Path, mark: str, delay_s: float) -> None:
    lock, made = (done / "dvc.lock").read_bytes(), files(done)
    shutil.rmtree(done / "artifacts")
    (done / "dvc.lock").unlink()
    graph = load_graph(done)
    command = command_line((n.name, *n.upstream) for n in graph.nodes)
    process = subprocess.Popen(command, cwd=done, stdout=subprocess.PIPE)
    time.sleep(delay_s)
    process.kill()
    process.communicate()
    assert processes_marked(mark) == []
    if (done / "dvc.lock").exists():
        assert lock_is_whole((done / "dvc.lock").read_text())
    run, _ = restored(done)
    asyncio.run(walk(run))
    assert (files(done), (done / "dvc.lock").read_bytes()) == (made, lock)


def test_a_stop_ends_it(done: Path, mark: str) -> None:
    """Signals reach the run; the process in between never sees them."""
    shutil.rmtree(done / "artifacts")
    code = (
        "import asyncio, os, pathlib, signal, threading\n"
        "from vlfoundry.flows.graph import load_graph\n"
        "from vlfoundry.flows.walk import Run, restore, walk\n"
        "run = Run(root=pathlib.Path('.'), graph=load_graph(pathlib.Path('.')), grace_s=2)\n"
        "threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "asyncio.run(restore(run))\n"
        "assert run.cancelled\n"
        "asyncio.run(walk(run))\n"
        "print({r.state for r in run.ordered_results()})\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=done, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.endswith("{'not run'}\n")
    assert "asked for each stage" not in ended.stdout
    assert processes_marked(mark) == []


def test_other_lines_are_not_taken_for_ours() -> None:
    told = Restored(stage="a", state="damaged", damaged=("x", "y"))
    assert read_line(told.line()) == told
    for line in ("", "[1]", "{}", '{"stage": "a"}', "Updating lock file"):
        assert read_line(line) is None


def test_what_registers_a_model_sets_no_logging_up_beside_prefect() -> None:
    """gto does when it is imported, with all of logging locked; a thread of Prefect's may hold what
    that needs, and wait for logging."""
    code = (
        "import logging.config, vlfoundry.flows.pipeline\n"
        "logging.config.dictConfig = logging.shutdown = None\n"
        "import gto.api"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
