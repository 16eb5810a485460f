"""Where a step's time goes, and who is told."""

import contextlib
import json
import socket
import time
import urllib.request

import pytest

from tests.support import tiny_tower as tower
from vlfoundry.infra.backend import Layout
from vlfoundry.infra.core.errors import ConfigError
from vlfoundry.infra.train.config import TrainConfig
from vlfoundry.infra.train.telemetry import PHASES, Stopwatch, Telemetry, Work, check_sinks

CONFIG = TrainConfig(steps=6, batch_samples=tower.BATCH, lr=1e-3, save_every_steps=3)
WORK = Work(samples=8, flops=2e9, peak_flops_per_s=1e10, peak_is="made up")


def test_nested_phases_do_not_count_twice():
    watch = Stopwatch()
    watch.start()
    with watch.phase("backward"):
        time.sleep(0.02)
        with watch.phase("forward"):
            time.sleep(0.04)
        time.sleep(0.02)
    assert watch.seconds["forward"] == pytest.approx(0.04, abs=0.015)
    assert watch.seconds["backward"] == pytest.approx(0.04, abs=0.015)
    watch.start()
    assert sum(watch.seconds.values()) == 0


def test_rates_are_per_second_of_the_step(tmp_path):
    watch = Stopwatch()
    with Telemetry(tmp_path, WORK) as telemetry:
        telemetry.step(0, watch, 0.5, 0.4, 100, {"loss": 1.0})
    row = json.loads((tmp_path / "steps.jsonl").read_text("utf-8"))
    assert row["samples_per_s"] == 16
    assert row["tokens_per_s"] == 200
    assert row["tflops"] == pytest.approx(4e9 / 1e12)
    assert row["mfu"] == pytest.approx(0.4)


def free_port() -> int:
    """Outside the range that connections of other tests are given; see `ip_local_port_range`."""
    for port in range(1100, 1900):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port between 1100 and 1900 is free")


def test_a_run_tells_everybody(run_ranks, tmp_path):
    """Files, TensorBoard, DVCLive, and Prometheus while it runs."""
    port, answers = free_port(), []

    def run():
        from vlfoundry.infra.backend.parallel import parallel
        from vlfoundry.infra.train.loop import fit

        def batch_at(step: int):
            if step == 4:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
                    answers.append(answer.read().decode())
            return tower.data_batch_at(step)

        with parallel(Layout(data=2)):
            result = fit(
                tower.build(), tower.objective, batch_at, CONFIG,
                work=tmp_path, run_key="k", layout=Layout(data=2), log=lambda _: None,
                sinks=("tensorboard", "dvclive"), prometheus=f"127.0.0.1:{port}",
            )  # fmt: skip
        return result.step_flops, answers

    (flops, (page,)), _ = run_ranks(run, ranks=2)
    assert "vlfoundry_step 3.0" in page
    assert "vlfoundry_loss " in page
    rows = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(6))
    # 8 pictures of 4 patches and a class token; two layers of width 40.
    assert rows[0]["tokens_per_s"] * rows[0]["wall_s"] == pytest.approx(8 * 5, rel=1e-3)
    assert flops > 0
    for row in rows:
        phases = [row[f"{name}_s"] for name in PHASES]
        assert min(phases[1:5]) > 0
        assert sum(phases) <= row["wall_s"] * 1.001
    told_of = sum(row[f"{name}_s"] for row in rows for name in PHASES)
    assert told_of >= 0.9 * sum(row["wall_s"] for row in rows)
    assert list((tmp_path / "tensorboard").glob("events.*"))
    told = (tmp_path / "dvclive/plots/metrics/loss.tsv").read_text().splitlines()
    assert len(told) == 1 + len(rows)


def test_what_it_costs(tmp_path):
    """A step of a tenth of a second may lose one thousandth of one: 1 %."""
    watch, steps = Stopwatch(), 300
    with Telemetry(tmp_path, WORK) as telemetry:
        before = time.process_time()
        for step in range(steps):
            watch.start()
            for name in (*PHASES, *PHASES):
                with watch.phase(name):
                    pass
            telemetry.step(step, watch, 0.1, 0.1, 100, {"loss": 1.0, "lr": 1.0})
        assert (time.process_time() - before) / steps < 1e-3


@pytest.mark.parametrize(
    ("sinks", "prometheus", "message"),
    [
        (("grafana",), None, "'grafana' does not exist"),
        ((), "nowhere", "expected host:port"),
    ],
)
def test_what_nobody_can_write_to_is_refused(sinks, prometheus, message):
    with pytest.raises(ConfigError, match=message):
        check_sinks(sinks, prometheus)


def test_a_port_that_is_taken_is_named(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with (
            pytest.raises(ConfigError, match=f"cannot answer at {address}"),
            Telemetry(tmp_path, WORK, prometheus=address),
        ):
            pass
