"""The harness: one JSON line a measurement, with all that a number needs beside it."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from accept.meter import measure as measure_command
from benchmarks import fp8_gap, harness
from vlfoundry.infra.backend.fp8_config import Fp8Config
from vlfoundry.infra.core.config import load_params
from vlfoundry.infra.core.stage import parameters_of
from vlfoundry.stages.contrastive import STAGE

pytestmark = pytest.mark.slow


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, harness.Benchmark]:
    """An empty registry of benchmarks for one test."""
    empty: dict[str, harness.Benchmark] = {}
    monkeypatch.setattr(harness, "REGISTRY", empty)
    return empty


def test_a_line_has_all_that_a_number_needs(registry: dict[str, harness.Benchmark]) -> None:
    @harness.benchmark("naps")
    def naps() -> Iterator[harness.Case | harness.LeftOut]:
        yield harness.Case(
            name="nap", call=lambda: time.sleep(0.02), items=10, unit="naps",
            packages=("numpy",), repetitions=3,
        )  # fmt: skip
        yield harness.LeftOut(name="peer", reason="not installed")

    nap, peer = (json.loads(json.dumps(line)) for line in harness.run("naps"))
    assert 0.02 <= nap["median_s"] < 1
    assert nap["cpu_s"] < nap["median_s"]
    assert nap["items_per_s"] == pytest.approx(10 / nap["median_s"], rel=0.01)
    assert nap["versions"].keys() == {"numpy"}
    assert nap["machine"]["cores"] >= 1
    assert nap.keys() >= {"format", "benchmark", "case", "commit", "dirty", "min_s", "max_s"}
    assert peer["left_out"] == "not installed"
    assert "median_s" not in peer


def test_a_line_says_how_fast_it_is_against_another(
    registry: dict[str, harness.Benchmark],
) -> None:
    def burn(seconds: float) -> None:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    @harness.benchmark("burns")
    def burns() -> Iterator[harness.Case | harness.LeftOut]:
        yield harness.Case(name="peer", call=lambda: burn(0.06), repetitions=3)
        yield harness.Case(
            name="ours", call=lambda: burn(0.02), repetitions=3, against="peer", facts={"wrong": 0}
        )

    peer, ours = harness.run("burns")
    assert "ratio" not in peer
    assert ours["ratio"] == pytest.approx(3, rel=0.3)
    assert ours["items_per_cpu_s"] == pytest.approx(50, rel=0.3)
    assert (ours["against"], ours["wrong"]) == ("peer", 0)


def test_cases_of_a_tuple_are_timed_in_turns(registry: dict[str, harness.Benchmark]) -> None:
    calls = ""

    def note(letter: str) -> None:
        nonlocal calls
        calls += letter
        sum(range(100_000))

    @harness.benchmark("turns")
    def turns() -> Iterator[harness.Case | harness.LeftOut | tuple[harness.Case, ...]]:
        yield (
            harness.Case(name="a", call=lambda: note("a"), repetitions=3),
            harness.Case(
                name="b", call=lambda: note("b"), repetitions=2, warm_up=False, ratios_to=("a",)
            ),
        )

    a, b = harness.run("turns")
    assert calls == "a" + "abab" + "a"
    assert (a["repetitions"], b["repetitions"]) == (3, 2)
    assert b["ratios"].keys() == {"a"}


def test_every_benchmark_yields_cases() -> None:
    harness.load_all()
    assert {"contrastive", "decode", "shards", "start", "tiling", "vit"} <= harness.REGISTRY.keys()
    for benchmark in harness.REGISTRY.values():
        first = next(iter(benchmark()))
        for case in first if isinstance(first, tuple) else (first,):
            assert case.name


def test_twins_are_a_shorter_stage_1() -> None:
    whole = parameters_of(STAGE, load_params())
    short = fp8_gap.shortened(whole, 90, Fp8Config(recipe="blockwise")).contrastive.train
    train = whole.contrastive.train
    assert (short.steps, short.fp8) == (90, Fp8Config(recipe="blockwise"))
    assert short.warmup_steps == train.warmup_steps * 90 // train.steps
    assert (short.lr, short.batch_samples) == (train.lr, train.batch_samples)


def test_a_start_is_the_same_each_time_and_near_the_stages_own() -> None:
    def weight_of(start: int) -> torch.Tensor:
        model = torch.nn.Linear(64, 64)
        torch.nn.init.ones_(model.weight)
        fp8_gap.moved(model, start)
        return model.weight.detach()

    assert torch.equal(weight_of(0), torch.ones(64, 64))
    assert torch.equal(weight_of(1), weight_of(1))
    assert not torch.equal(weight_of(1), weight_of(2))
    assert float(weight_of(1).std()) == pytest.approx(fp8_gap.MOVED, rel=0.1)


def test_a_command_is_measured_with_its_children(tmp_path: Path) -> None:
    burn = tmp_path / "burn.py"
    burn.write_text(
        "import time\n"
        "held = bytearray(64 << 20)\n"
        "held[::4096] = b'1' * len(held[::4096])\n"
        "end = time.process_time() + 0.5\n"
        "while time.process_time() < end: pass\n"
        "time.sleep(1.5)\n"
    )
    command = ["sh", "-c", f"{sys.executable} {burn}; echo done"]
    measured = measure_command(command, tmp_path, 60)
    assert (measured.code, measured.output) == (0, "done\n")
    assert 0.5 <= measured.cpu_s <= measured.wall_s + 1
    assert 64 <= measured.peak_mib < 400
