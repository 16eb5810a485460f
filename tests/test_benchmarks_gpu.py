"""The GPU benchmark, gone through on a CPU with toy sizes and with the packages of a CUDA image."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.gpu.__main__ import run_part
from benchmarks.gpu.data import LANGUAGES, TOKENS, VARIABLE, embedded
from benchmarks.gpu.sizes import FULL, TINY, Clock
from benchmarks.gpu.towers import flops_per_image

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
ABSENT = (
    "PIL", "dvc", "einops", "evaluate", "fsspec", "prefect", "pyarrow", "safetensors",
    "simplejpeg", "tokenizers", "transformer_engine", "transformers", "yaml",
)  # fmt: skip
RUN = f"""
import runpy, sys
for name in {ABSENT!r}:
    sys.modules[name] = None
runpy.run_module("benchmarks.gpu", run_name="__main__", alter_sys=True)
"""


def run(out: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", RUN, "--tiny", "--out", str(out), *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip


def test_every_part_runs_on_a_bare_machine(tmp_path):
    rng = np.random.default_rng(0)
    data, out = tmp_path / "data.npz", tmp_path / "out" / "x.json"
    np.savez(
        data,
        pictures=rng.integers(256, size=(20, 64, 64, 3), dtype=np.uint8),
        tokens=rng.integers(1, 200, size=(20, len(LANGUAGES), TOKENS), dtype=np.uint16),
    )
    done = run(out, **{VARIABLE: str(data)})
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    report = json.loads(out.read_text())
    assert report.keys() >= {"date", "gpu", "versions", "commit", "machine", "seconds", "tiny"}
    parts = report["parts"]
    assert list(parts) == [
        "smoke", "parity", "mfu", "peer", "contrastive", "curve", "ranks", "stage2", "stage3",
    ]  # fmt: skip
    assert not [name for name, part in parts.items() if "traceback" in part]
    rows = {name: {row["case"]: row for row in part["rows"]} for name, part in parts.items()}
    agreed = rows["parity"]["local against local"]
    assert agreed["output_cosine"] == pytest.approx(1)
    assert min(agreed["gradient_cosine_by_layer"].values()) == pytest.approx(1)
    assert agreed["gradient_cosine_by_layer"].keys() == {"embeddings", "0", "1", "2"}
    assert rows["mfu"]["bf16"]["share_of_gemm"] > 0
    assert len(parts["mfu"]["rows"]) == 1 + 2 * 3
    assert rows["peer"]["transformers"]["left_out"] == "transformers is not installed"
    assert rows["contrastive"]["the loss alone"]["seconds"] > 0
    assert len(rows["curve"]["fp8"]["losses"]) == 4
    assert rows["ranks"]["TP2 against TP1"]["gradient_error"] < 1e-5
    for stage in ("contrastive", "stage2", "stage3"):
        assert rows[stage]["fp8"]["planned_gib"] > rows[stage]["fp8"]["planned_states_gib"] > 0
        assert rows[stage]["bf16"]["tflops"] > 0


def test_a_part_that_fails_is_recorded_and_the_next_goes_on(tmp_path):
    out = tmp_path / "x.json"
    done = run(out, "--parts", "curve,stage3")
    assert done.returncode == 1
    parts = json.loads(out.read_text())["parts"]
    assert "pyarrow is not installed" in parts["curve"]["traceback"]
    assert list(parts) == ["curve", "stage3"]
    assert parts["stage3"]["rows"][0]["case"] == "bf16"


def test_a_part_whose_time_is_over_is_left_out():
    result: dict = {}
    run_part("mfu", None, TINY, Clock(end=0.0), result, lambda: None)
    assert result == {"left_out": "the time was over"}


def test_the_embedded_data_as_arrays():
    pictures, tokens = embedded()
    assert pictures.shape[1:] == (64, 64, 3)
    assert tokens.shape == (len(pictures), len(LANGUAGES), TOKENS)
    assert (tokens[:, :, 0] == 1).all()
    assert ((tokens == 2).sum(-1) == 1).all()
    assert tokens.max() < FULL.curve.text.vocab_size


def test_flops_are_those_of_the_design_page():
    """3.073 TFLOP forwards for a picture of 224 px through 48 layers, and twice that back."""
    assert flops_per_image(FULL.vision) == pytest.approx(9.219e12, rel=1e-3)
