"""The InternVL family equals the official one, and its weights go in and out."""

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
    command = [sys.executable, "-m", "vlfoundry.flows.cli", "parity", *map(str, folders)]
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


def rows_of(bench: str, tmp_path: Path) -> list[dict[str, Any]]:
    """What a benchmark measured here and now; both sides are timed in turns."""
    out = tmp_path / f"{bench}.jsonl"
    command = [sys.executable, "-m", "benchmarks.harness", bench, "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True)
    return [json.loads(line) for line in out.read_text("utf-8").splitlines()]


def test_tiling_is_three_times_the_official_way(tmp_path: Path, record_property: Record) -> None:
    ratios = {}
    for row in rows_of("tiling", tmp_path):
        if row["case"] in ("ours, web", "ours, photo"):
            ratios[row["case"]] = row["ratio"]
            assert row["levels_from_pillow_11"] <= 2
    record_property("ratios", ratios)
    assert len(ratios) == 2
    assert min(ratios.values()) >= 3.0


def test_decoding_gives_the_same_tokens(tmp_path: Path, record_property: Record) -> None:
    """How fast is recorded and not judged: the issue calls it welcome, and sizes differ much."""
    rows = [row for row in rows_of("decode", tmp_path) if row["case"].startswith("ours")]
    record_property("ratios", {row["case"]: row["ratio"] for row in rows})
    assert rows
    assert all(row["tokens_that_differ"] == 0 for row in rows)
