"""DVC's locks after kills: waited for, cleared, and never a word about deleting them by hand."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.support.toy_project import PARAMS_YAML, sh, steer, wait_until
from vlfoundry.flows import dvclocks
from vlfoundry.flows.dvclocks import RWLOCK, clear_stale
from vlfoundry.flows.graph import load_graph
from vlfoundry.infra.core.errors import DataError

pytestmark = pytest.mark.slow

DVC = [sys.executable, "-m", "dvc"]
VLFOUNDRY = [sys.executable, "-m", "vlfoundry.flows.cli"]


def entry(pid: int) -> dict[str, object]:
    return {"pid": pid, "cmd": "dvc repro prepare"}


@pytest.mark.parametrize("text", ["", "{", '{"write": {"/a": {"pid"', "\0\0"])
def test_a_half_written_file_is_cleared(toy: Path, text: str) -> None:
    (toy / RWLOCK).parent.mkdir(parents=True, exist_ok=True)
    (toy / RWLOCK).write_text(text)
    clear_stale(toy)
    assert not (toy / RWLOCK).exists()
    assert len(load_graph(toy).nodes) == 4


def test_entries_of_processes_that_are_no_dvc_are_cleared(toy: Path) -> None:
    """Such a process has the number of a DVC that was killed."""
    zombie = subprocess.Popen([sys.executable, "-c", "import dvc"])
    time.sleep(0.5)
    living = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "dvc"])
    out = str(toy / "artifacts/prepare")
    (toy / RWLOCK).parent.mkdir(parents=True, exist_ok=True)
    (toy / RWLOCK).write_text(
        json.dumps(
            {
                "write": {out: entry(os.getppid()), "/other": entry(living.pid)},
                "read": {out: [entry(zombie.pid), entry(os.getpid()), entry(living.pid)]},
            }
        )
    )
    clear_stale(toy)
    known = json.loads((toy / RWLOCK).read_text())
    living.kill()
    living.wait()
    zombie.wait()
    assert known == {"write": {"/other": entry(living.pid)}, "read": {out: [entry(living.pid)]}}


def test_a_look_does_not_wait_for_what_runs(toy: Path) -> None:
    sh(toy, *DVC, "repro", "--quiet", "train@b")
    (toy / "params.yaml").write_text(PARAMS_YAML.replace("0.001", "0.002"))
    steer(toy, "train-a", "pathlib.Path('work/started').touch(); time.sleep(60)")
    other = subprocess.Popen([*DVC, "repro", "--quiet", "train@a"], cwd=toy)
    wait_until((toy / "work/started").exists, "the start of the stage")
    said: list[str] = []
    graph = load_graph(toy, said.append, beside=True)
    states = {node.name: graph.state(node.name) for node in graph.nodes}
    again = subprocess.run(
        [*VLFOUNDRY, "run", "--dry-run"], cwd=toy, capture_output=True, text=True, timeout=50
    )
    other.kill()
    other.communicate()
    assert (said, graph.running) == ([], {"train@a": other.pid})
    assert states == {
        "prepare": "up to date", "train@a": "running", "train@b": "stale", "score": "stale"
    }  # fmt: skip
    assert graph.reason("train@a") == f"process {other.pid} runs it now"
    assert again.returncode == 0, again.stderr
    assert re.search(r"^train@b +would run: changed deps", again.stdout, re.MULTILINE)


def test_what_a_kill_left_of_the_file_is_not_waited_for(toy: Path) -> None:
    (toy / RWLOCK).parent.mkdir(parents=True, exist_ok=True)
    (toy / RWLOCK).touch()
    began, said = time.monotonic(), list[str]()
    assert len(load_graph(toy, said.append).nodes) == 4
    assert said == []
    assert time.monotonic() - began < dvclocks.PATIENCE_S / 2


def test_another_dvc_is_waited_for(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steer(toy, "prepare", "pathlib.Path('work/started').touch(); time.sleep(4)")
    other = subprocess.Popen([*DVC, "repro", "--quiet", "prepare"], cwd=toy)
    wait_until((toy / "work/started").exists, "the start of the stage")
    said: list[str] = []
    with_lock = threading.Thread(target=lambda: hold(toy, 3))
    with_lock.start()
    time.sleep(1)
    assert len(load_graph(toy, said.append).nodes) == 4
    with_lock.join()
    assert len(said) == 1
    assert said[0].startswith("waiting for ")
    monkeypatch.setattr(dvclocks, "PATIENCE_S", 0.5)
    holding = subprocess.Popen([sys.executable, "-c", HOLD, "20"], cwd=toy)
    time.sleep(2)
    with pytest.raises(DataError, match=r"still works in .* run again when it has ended") as caught:
        load_graph(toy, said.append)
    assert "remove" not in str(caught.value)
    holding.kill()
    other.communicate()


HOLD = """
import sys, time
from dvc.repo import Repo
repo = Repo(".")
with repo.lock:
    time.sleep(float(sys.argv[1]))
"""


def hold(root: Path, seconds: float) -> None:
    subprocess.run([sys.executable, "-c", HOLD, str(seconds)], cwd=root, check=True)


@pytest.mark.parametrize("text", ["", "junk: [", "\0\1", "words", "- a\n", "schema: '2.0\n"])
def test_a_damaged_dvc_lock_says_what_to_do(toy: Path, text: str) -> None:
    (toy / "dvc.lock").write_text(text)
    with pytest.raises(DataError, match=r"delete dvc\.lock and run again") as caught:
        load_graph(toy)
    assert "\n" not in str(caught.value)


def test_a_cut_dvc_lock_heals(toy: Path) -> None:
    sh(toy, *DVC, "repro", "--quiet", "prepare")
    whole = (toy / "dvc.lock").read_text()
    lines = whole.splitlines(keepends=True)
    hashes = [i for i, line in enumerate(lines) if "md5: " in line]
    (toy / "dvc.lock").write_text("".join(lines[: hashes[0]]))
    assert "prepare" in load_graph(toy).changed
    before = "".join(lines[: hashes[-1]])
    line = lines[hashes[-1]]
    for cut in ("4", "4e", "77ab", ""):  # the first is a number to YAML
        (toy / "dvc.lock").write_text(before + line[: line.index("md5: ") + 5] + cut)
        with pytest.raises(DataError, match=r"dvc\.lock is damaged; "):
            load_graph(toy)
    (toy / "dvc.lock").write_text(whole)
    assert "prepare" not in load_graph(toy).changed
