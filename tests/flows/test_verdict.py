"""What the gate says is what the run says: in its last lines, its exit code and Prefect's state."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.toy_project import DVC_YAML, commit_all, sh, steer
from vlfoundry.flows.graph import load_graph
from vlfoundry.flows.launch import EXIT_FAILED, EXIT_REJECTED, finish
from vlfoundry.flows.terminal import Terminal
from vlfoundry.infra.core.dvccache import cache_folder
from vlfoundry.infra.registry.gto import list_models

pytestmark = pytest.mark.slow

GATE_YAML = (
    DVC_YAML
    + """\
  gate:
    cmd: python work.py gate
    deps: [artifacts/score]
    outs: [artifacts/gate]
"""
)
MODEL = "artifacts/train/a"


def decide(root: Path, *, passed: bool) -> None:
    """Let the toy's gate say this when it runs."""
    reasons = [] if passed else ["FAIL toy_a zero_shot/top1: 3.0% is below 8.0%"]
    decision = {
        "passed": passed, "candidate": "toy_a", "model": MODEL, "reasons": reasons,
        "warnings": ["WARN toy_a caption/chrf: 3.0% is below 8.0%"],
        "checks": [{"passed": passed}, {"passed": True}],
    }  # fmt: skip
    steer(root, "gate", f"(out / 'gate.json').write_text({json.dumps(decision)!r})")


@pytest.fixture
def judged(toy: Path) -> Path:
    (toy / "dvc.yaml").write_text(GATE_YAML)
    commit_all(toy)
    return toy


def run(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vlfoundry.flows.cli", "run", *arguments],
        cwd=root, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_a_gate_that_says_no(judged: Path, prefect_server: str) -> None:
    decide(judged, passed=False)
    ended = run(judged)
    assert ended.returncode == EXIT_REJECTED == 3, ended.stdout + ended.stderr
    assert ended.stdout.splitlines()[-3:] == [
        "WARN toy_a caption/chrf: 3.0% is below 8.0%",
        "gate: toy_a was NOT promoted; 1 of 2 checks failed",
        "    FAIL toy_a zero_shot/top1: 3.0% is below 8.0%",
    ]
    assert list_models(judged) == ()
    again = run(judged)  # nothing to do, and still not promoted
    assert again.returncode == EXIT_REJECTED
    assert "nothing to do" in again.stdout
    part = run(judged, "--stage", "score")  # nobody asked for a verdict
    assert part.returncode == 0
    assert "gate" not in part.stdout


def test_the_state_that_automations_see(judged: Path, prefect_server: str) -> None:
    from vlfoundry.flows.pipeline import run_flow
    from vlfoundry.flows.walk import Run

    for passed, name in ((False, "Rejected"), (True, "Promoted")):
        decide(judged, passed=passed)
        (judged / "params.yaml").write_text(f"seed: {passed:d}\nstart: scratch\ntrain: {{lr: 1}}\n")
        made = Run(
            root=judged, graph=load_graph(judged), terminal=Terminal(io.StringIO()), after=finish
        )
        state = run_flow(made)
        assert state is not None
        assert (state.name, state.type.value) == (name, "COMPLETED")
        assert "promoted" in state.message.lower()
    assert [model.ref for model in list_models(judged)] == ["toy_a@v0.1.0"]


def test_what_cannot_be_registered_is_a_failure_that_the_next_run_mends(
    judged: Path, prefect_server: str
) -> None:
    """The candidate's object is damaged after the run that made it; nothing has noticed yet."""
    decide(judged, passed=True)
    assert run(judged, "--stage", "score").returncode == 0
    sh(judged, sys.executable, "-m", "dvc", "repro", "--quiet", "gate")
    damage(judged, "weights")
    # What DVC remembers of the workspace (size and time) must not save us here.
    weights = judged / MODEL / "weights"
    weights.write_bytes(weights.read_bytes()[:-1] + b"X")
    closing = finish(judged)
    assert closing.failed
    assert closing.verdict is None
    assert "NOT registered" in closing.lines[-1]
    assert "deleted as damaged: artifacts/train/a: run again" in closing.lines[-1]
    mended = run(judged)
    assert mended.returncode == 0, mended.stdout
    assert "champion: toy_a@v0.1.0" in mended.stdout.splitlines()[-1]


def damage(root: Path, name: str) -> Path:
    """Flip the last byte of the cache's object of a file of `MODEL`, as a disk might."""
    import hashlib

    md5 = hashlib.md5((root / MODEL / name).read_bytes()).hexdigest()
    path = cache_folder(root) / "files" / "md5" / md5[:2] / md5[2:]
    content = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    path.chmod(0o444)
    return path


@pytest.mark.parametrize("listing", [False, True])
def test_a_damaged_object_of_the_cache_is_not_handed_out(
    judged: Path, prefect_server: str, listing: bool
) -> None:
    """A byte of a file's object flips, or of the list of an output's files, and the artifact is
    gone: the stage runs again and makes the same bytes."""
    decide(judged, passed=True)
    assert run(judged).returncode == 0
    before = {p.name: p.read_bytes() for p in (judged / MODEL).iterdir()}
    lock = (judged / "dvc.lock").read_bytes()
    if listing:
        for path in (cache_folder(judged) / "files/md5").rglob("*.dir"):
            path.chmod(0o644)
            path.write_bytes(path.read_bytes().replace(b"weights", b"wEights"))
    else:
        damage(judged, "weights")
    sh(judged, "rm", "-r", MODEL)
    ended = run(judged)
    assert ended.returncode == 0, ended.stdout
    assert listing or "damaged in DVC's cache and deleted there: artifacts/train/a" in ended.stdout
    assert {p.name: p.read_bytes() for p in (judged / MODEL).iterdir()} == before
    assert (judged / "dvc.lock").read_bytes() == lock


def test_a_failed_registration_is_an_exit_code(judged: Path, monkeypatch, prefect_server) -> None:
    import vlfoundry.flows.launch
    from vlfoundry.infra.core.errors import DataError

    def refuse(root):
        raise DataError("not what dvc.lock says")

    monkeypatch.setattr("vlfoundry.infra.registry.gto.register_passed", refuse)
    monkeypatch.chdir(judged)
    decide(judged, passed=True)
    shown = io.StringIO()
    assert vlfoundry.flows.launch.run_pipeline(judged, terminal=Terminal(shown)) == EXIT_FAILED
    assert "NOT registered: not what dvc.lock says" in shown.getvalue().splitlines()[-1]
