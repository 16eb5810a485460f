"""A request to stop is one line, also while modules are imported; an orphan ends in any case."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# `slow` takes its time to be imported, as torch does; the stage imports it before or in its work.
SLOW = "import pathlib, time\npathlib.Path('importing').touch()\ntime.sleep(30)\n"
STAGE = """
{before}
import dataclasses
from vlfoundry.infra.core.stage import Stage, main
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    seed: int
def run(config, context):
    {inside}
STAGE = Stage(name="toy", config=Config, inputs=(), outputs=(), run=run)
raise SystemExit(main(STAGE))
"""
# What is raised in there is lost.
DROPPED = """class Slow:
        def __del__(self):
            pathlib.Path('importing').touch()
            time.sleep(1)
    import pathlib, time
    Slow()
    time.sleep(30)
"""
WORK = "import pathlib, time; pathlib.Path('importing').touch(); time.sleep(30)"


def project(root: Path, before: str, inside: str) -> None:
    (root / "slow.py").write_text(SLOW)
    (root / "params.yaml").write_text("seed: 1\n")
    (root / "stages").mkdir()
    (root / "stages/__init__.py").write_text((ROOT / "stages/__init__.py").read_text())
    (root / "stages/toy.py").write_text(STAGE.format(before=before, inside=inside))
    (root / "infra").symlink_to(ROOT / "infra")
    shutil.copytree(ROOT / "vlfoundry", root / "vlfoundry", symlinks=True)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("before", "inside"), [("import slow", "pass"), ("", "import slow"), ("", WORK), ("", DROPPED)]
)
def test_one_line_and_exit_code_130(
    tmp_path: Path, before: str, inside: str, signum: signal.Signals
) -> None:
    project(tmp_path, before, inside)
    process = subprocess.Popen(
        [sys.executable, "-m", "vlfoundry.stages.toy"], cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    while not (tmp_path / "importing").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    time.sleep(0.05)
    process.send_signal(signum)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert output.splitlines()[-1].endswith("stopped; run it again to go on")


def test_an_orphan_that_cannot_end_is_ended(tmp_path: Path) -> None:
    """Its ranks are stopped and its guard is gone."""
    code = f"""
import os, sys, time, signal
sys.path.insert(0, {str(ROOT)!r})
from vlfoundry.infra.core import interrupts
interrupts.ORPHAN_GRACE_S = 1
from vlfoundry.infra.core.process import die_with_parent
pid = os.fork()
if pid == 0:
    die_with_parent()
    parent = os.getppid()
    signal.signal(signal.SIGTERM, lambda *_: interrupts.end_if_orphaned(parent))
    print(os.getpid(), flush=True)
    while True:
        time.sleep(60)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    orphan = int(parent.stdout.readline())
    parent.kill()
    began = time.monotonic()
    parent.stdout.read()  # until nobody has its other end
    assert 0.5 < time.monotonic() - began < 10
    assert (
        not Path(f"/proc/{orphan}/stat").exists()
        or "Z" in os.popen(f"cut -d' ' -f3 /proc/{orphan}/stat").read()
    )
