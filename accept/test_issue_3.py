"""Issue 3: the InternVL family equals the official one, and its weights go in and out."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.accept

ROOT = Path(__file__).parents[1]
HERE = ROOT / "tests" / "eval" / "golden"
SHARED = Path(os.environ.get("VLFOUNDRY_GOLDEN", ROOT.parent / "shared" / "golden"))
Record = Callable[[str, Any], None]


def compare(folders: list[Path], log: Path) -> tuple[int, str]:
    """Exit status of `vlfoundry parity`, and its last line."""
    command = [sys.executable, "-m", "flows.cli", "parity", *map(str, folders)]
    with log.open("w") as stream:
        status = subprocess.run(command, cwd=ROOT, stdout=stream, check=False).returncode
    return status, log.read_text("utf-8").splitlines()[-1]


def test_our_golden_folders(tmp_path: Path, record_property: Record) -> None:
    status, verdict = compare(sorted(p for p in HERE.iterdir() if p.is_dir()), tmp_path / "log")
    record_property("verdict", verdict)
    assert status == 0, verdict


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no golden folders in {SHARED}")
def test_all_golden_folders(tmp_path: Path, record_property: Record) -> None:
    """Every recorded number, on one rank, on two tensor ranks, through two pipeline stages."""
    log = tmp_path / "log"
    status, verdict = compare(sorted(SHARED.iterdir()), log)
    record_property("verdict", verdict)
    text = log.read_text("utf-8")
    for layout in ("tensor 2", "pipeline 2"):
        record_property(layout, len(re.findall(rf"^ *{layout}/.* pass", text, re.MULTILINE)))
    assert status == 0, verdict
    assert "does not apply" not in text


@pytest.mark.parametrize(("bench", "least"), [("tiling", 3.0), ("decode", 1.5)])
def test_speed(bench: str, least: float, tmp_path: Path, record_property: Record) -> None:
    """Ratios of CPU-seconds, both sides in turns in one run."""
    out = tmp_path / f"{bench}.jsonl"
    subprocess.run(
        [sys.executable, "-m", "benchmarks.harness", bench, "--out", str(out)],
        cwd=ROOT, check=True,
    )  # fmt: skip
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    record_property("rows", rows)
    assert rows
