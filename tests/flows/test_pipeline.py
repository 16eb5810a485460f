"""The flow on a toy pipeline: what runs, what is skipped, what is recorded, how it stops."""

import io
import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.support.toy_project import (
    comes_to,
    processes_marked,
    sh,
    steer,
    wait_for_the_end,
    wait_until,
)
from vlfoundry.flows.graph import load_graph
from vlfoundry.flows.terminal import Terminal

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-m", "vlfoundry.flows.cli", "run"]
# A stage that is busy until it is interrupted, saves, and leaves as ours do.
BUSY = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path("work/started").touch()
try:
    time.sleep(300)
except KeyboardInterrupt:
    pathlib.Path("work/saved").touch()
    print("saved")
    sys.exit(130)
"""
# One that does not listen.
DEAF = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)
pathlib.Path("work/started").touch()
time.sleep(300)
"""


def ask(url: str, path: str, **body: Any) -> list[dict[str, Any]]:
    """POST to Prefect's API."""
    request = urllib.request.Request(
        f"{url}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return json.load(opener.open(request, timeout=60))


def run_here(root: Path) -> tuple[Any, Any, str]:
    """Run the flow in this process; (the Run, its final state, what the terminal showed)."""
    from vlfoundry.flows.pipeline import run_flow
    from vlfoundry.flows.walk import Run

    stream = io.StringIO()
    run = Run(root=root, graph=load_graph(root), terminal=Terminal(stream), grace_s=1)
    return run, run_flow(run), stream.getvalue()


def states(run: Any) -> dict[str, str]:
    return {result.name: result.state for result in run.ordered_results()}


def test_runs_what_changed_and_records_it(toy: Path, prefect_server: str) -> None:
    run, state, shown = run_here(toy)
    assert states(run) == dict.fromkeys(["prepare", "train@a", "train@b", "score"], "ran")
    assert state.is_completed()
    assert "  train@a │ hello from train-a" in shown
    assert "Running stage" not in shown
    ours = {"id": {"any_": [str(state.state_details.flow_run_id)]}}

    def tasks() -> dict[str, str]:
        found = ask(prefect_server, "task_runs/filter", flow_runs=ours)
        return {task["name"]: task["state_type"] for task in found}

    comes_to(tasks, dict.fromkeys(["prepare", "train@a", "train@b", "score"], "COMPLETED"))
    lock = (toy / "dvc.lock").read_bytes()
    (toy / "dvc.lock").unlink()
    sh(toy, sys.executable, "-m", "dvc", "repro", "--quiet", "--no-run-cache", "--force")
    assert (toy / "dvc.lock").read_bytes() == lock  # DVC alone comes to the same

    run, state, _ = run_here(toy)
    assert set(states(run).values()) == {"up to date"}
    assert state.is_completed()
    artifacts = ask(
        prefect_server, "artifacts/filter",
        flow_runs={"id": {"any_": [str(state.state_details.flow_run_id)]}},
    )  # fmt: skip
    assert [artifact["key"] for artifact in artifacts] == ["graph"]
    assert "s0 --> s1" in artifacts[0]["data"]

    steer(toy, "train-b", "sys.exit('cannot train')")
    (toy / "params.yaml").write_text("seed: 1\nstart: scratch\ntrain:\n  lr: 0.5\n")
    run, state, shown = run_here(toy)
    assert states(run) == {
        "prepare": "up to date", "train@a": "ran", "train@b": "failed", "score": "not run",
    }  # fmt: skip
    assert state.is_failed()
    assert "cannot train" in run.results["train@b"].tail


def test_ctrl_c_saves_and_says_how_to_go_on(toy: Path, prefect_server: str, mark: str) -> None:
    steer(toy, "prepare", BUSY)
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    process = subprocess.Popen(
        COMMAND, cwd=toy, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    wait_until((toy / "work" / "started").exists, "the start of the stage")
    busy = subprocess.run(COMMAND, cwd=toy, env=environment, capture_output=True, text=True)
    assert busy.returncode == 2
    assert f"a run (process {process.pid}) goes on" in busy.stderr
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert (toy / "work" / "saved").exists()
    assert "run the same command again to go on" in output
    assert "ERROR" not in output  # DVC's, of a stage that was asked to stop
    assert processes_marked(mark) == []
    newest = ask(prefect_server, "flow_runs/filter", sort="START_TIME_DESC", limit=1)
    assert newest[0]["state_type"] == "CANCELLED"


def test_a_second_ctrl_c_ends_it_at_once_in_one_line(toy: Path, mark: str) -> None:
    steer(toy, "prepare", DEAF)
    code = (
        "import asyncio, pathlib\n"
        "from vlfoundry.flows.graph import load_graph\n"
        "from vlfoundry.flows.walk import Run, walk\n"
        "root = pathlib.Path('.')\n"
        "asyncio.run(walk(Run(root=root, graph=load_graph(root), grace_s=2)))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=toy, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )  # fmt: skip
    wait_until((toy / "work" / "started").exists, "the start of the stage")
    assert process.stdout
    process.send_signal(signal.SIGINT)
    while "once more to stop at once" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read()
    assert process.wait(5) == 130
    assert rest == "stopped at once; the next run goes on where the stages last saved\n"
    wait_for_the_end(mark, limit_s=20)


def test_kill_9_of_the_flow_leaves_no_orphan(toy: Path, mark: str) -> None:
    steer(toy, "prepare", BUSY)
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    process = subprocess.Popen(COMMAND, cwd=toy, env=environment, stdout=subprocess.DEVNULL)
    wait_until((toy / "work" / "started").exists, "the start of the stage")
    alive = "\n".join(processes_marked(mark))
    assert "uvicorn" in alive  # the run's own server is among those that must go
    assert "work.py prepare" in alive
    process.kill()
    process.wait()
    wait_for_the_end(mark, limit_s=20)
    assert (toy / "work" / "saved").exists()
