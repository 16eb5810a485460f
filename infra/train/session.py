"""A training stage from its launcher profile to its result: what the four stages share."""

from __future__ import annotations

import dataclasses
import json
import math
import posixpath
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlfoundry.infra.backend import Layout
from vlfoundry.infra.core.files import write_atomic
from vlfoundry.infra.core.stage import Context, Interrupted, Plot
from vlfoundry.infra.data.shards.packing import PackingConfig
from vlfoundry.infra.data.shards.prefetch import Prefetch
from vlfoundry.infra.launch.launchers import launcher
from vlfoundry.infra.launch.profile import ExecutionProfile, local_profile
from vlfoundry.infra.train.config import TrainConfig
from vlfoundry.infra.train.loop import FitResult
from vlfoundry.infra.train.mfu import Utilisation
from vlfoundry.infra.train.protocols import Objective
from vlfoundry.infra.train.telemetry import check_sinks

THROUGHPUT = Path("work/throughput")
"""a file a stage, for whoever names it to `dvc metrics show`: rates differ between equal runs"""
HISTORY_FORMAT = "vlfoundry.history.v1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataParallelSlice:
    """Which share of each global batch a rank computes."""

    rank: int
    """data-parallel rank"""
    ranks: int
    """data-parallel size"""
    packing: PackingConfig | None = None
    """samples share sequences up to this size; None: each has a row of its own"""
    rounds: int = 1
    """micro-batches of a rank are a multiple of this (the interleaved schedule)"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What one rank trains, made inside the process group."""

    model: Any
    """an initialised Megatron module; frozen parameters have requires_grad False"""
    objective: Objective
    """(model, batch) -> (loss, terms)"""
    batch_at: Callable[[int], Any]
    """this rank's batch of a step; a worker may call it"""
    save: Callable[[Path], None]
    """writes the trained model's folder; every rank calls it"""
    finish: Callable[[Any], Any] = lambda batch: batch
    """what the rank makes of what came from a worker, such as float pixels of uint8 ones"""


def loss_file(history: str) -> str:
    """Where the loss's curve lies: beside the history, in which DVC finds no points."""
    return f"{posixpath.dirname(history)}/loss.json"


def loss_plot(history: str, stage: str) -> Plot:
    """What `dvc plots` draws of a training stage."""
    return Plot(path=loss_file(history), x="step", y="loss", title=f"loss of {stage}")


def train(
    context: Context,
    config: TrainConfig,
    make: Callable[[DataParallelSlice], Job],
    *,
    check: Callable[..., Layout],
    model_folder: str,
    history: str,
) -> None:
    """Start the ranks, fit, and write the model folder, the history and the loss's curve.

    Args:
        check: refuses a layout that the model cannot have, and `fp8` (a Fp8Config, or None) that
            it cannot compute in that layout; leaves out what does not concern it.

    Raises:
        LayoutError, ConfigError: the launcher's layout does not fit, or the model's sizes do not
            fit FP8; nothing has been started.
        Interrupted: asked to stop; everything needed to go on is saved.
    """
    profile = local_profile()
    layout = Layout(
        tensor=profile.tensor,
        pipeline=profile.pipeline,
        text_tensor=profile.text_tensor,
        virtual_pipeline=profile.virtual_pipeline,
        data=profile.data,
        sequence_parallel=profile.sequence_parallel,
        recompute=profile.recompute,
        micro_batch_samples=profile.micro_batch_samples,
    )
    layout = check(layout, fp8=config.fp8)
    check_sinks(profile.telemetry, profile.prometheus)
    config.samples_per_rank(layout.data)
    target = context.output(model_folder)
    started = time.perf_counter()
    deadline = math.inf if profile.limit_s is None else time.monotonic() + profile.limit_s
    results = launcher(profile.launcher).run(
        _work, context, config, make, layout, target, profile, deadline,
        ranks=profile.ranks, threads=profile.threads,
    )  # fmt: skip
    result: FitResult = results[0]["result"]
    if result.interrupted:
        raise Interrupted("run it again to go on")
    context.write_json(
        history,
        {
            "format": HISTORY_FORMAT,
            "batch_samples": config.batch_samples,
            "steps": result.history,
            "bad_steps": result.bad_steps,
        },
    )
    context.write_json(
        loss_file(history), [{key: row[key] for key in ("step", "loss")} for row in result.history]
    )
    throughput = _throughput(result, layout, context.work / "steps.jsonl", config.batch_samples)
    rates = context.root / THROUGHPUT / f"{context.work.parent.name}.json"
    rates.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(rates, json.dumps(throughput, indent=2, sort_keys=True) + "\n")
    context.record(
        train_s=round(time.perf_counter() - started, 2),
        resumed_from=result.resumed_from,
        launcher=dataclasses.asdict(profile),
        steps=result.steps,
        bad_steps=len(result.bad_steps),
        left_fp8_at=result.left_fp8_at,
        best_step=result.best_step,
        samples=result.steps * config.batch_samples,
        throughput=throughput,
    )


def _work(
    context: Context,
    config: TrainConfig,
    make: Callable[[DataParallelSlice], Job],
    layout: Layout,
    target: Path,
    profile: ExecutionProfile,
    deadline: float,
) -> dict[str, Any]:
    """One rank's whole life."""
    from megatron.core import parallel_state

    from vlfoundry.infra.backend.parallel import parallel
    from vlfoundry.infra.train.loop import fit

    with parallel(layout, seed=config.seed, fp8=config.fp8):
        place = DataParallelSlice(
            rank=parallel_state.get_data_parallel_rank(),
            ranks=parallel_state.get_data_parallel_world_size(),
            packing=profile.packing,
            rounds=layout.pipeline if layout.interleaved else 1,
        )
        job = make(place)
        batches = Prefetch(job.batch_at, steps=config.steps, workers=profile.workers)
        result = fit(
            job.model,
            job.objective,
            lambda step: job.finish(batches(step)),
            config,
            work=context.work,
            run_key=context.run_key,
            layout=layout,
            log=context.log,
            label=context.bound.address,
            deadline=deadline,
            sinks=profile.telemetry,
            prometheus=profile.prometheus,
        )
        if not result.interrupted:
            job.save(target)
        return {"result": result}


def _throughput(
    result: FitResult, layout: Layout, timings: Path, batch_samples: int
) -> dict[str, Any]:
    """Median samples a second, and MFU(CPU) with both its terms.

    Every step's CPU-seconds are rank 0's; the ranks do the same work, so they count alike.
    """
    lines = timings.read_text(encoding="utf-8").splitlines() if timings.is_file() else []
    rows = [json.loads(line) for line in lines]
    if not rows:
        return {}
    wall_s = statistics.median(row["wall_s"] for row in rows)
    cpu_s = statistics.median(row["cpu_s"] for row in rows)
    used = Utilisation(
        flops_per_cpu_s=result.step_flops / layout.ranks / cpu_s,
        gemm_flops_per_cpu_s=result.peak_flops_per_s,
    )
    return {
        "samples_per_s": round(batch_samples / wall_s, 1),
        "gflops_per_cpu_s": round(used.flops_per_cpu_s / 1e9, 2),
        "gemm_gflops_per_cpu_s": round(used.gemm_flops_per_cpu_s / 1e9, 2),
        "mfu_cpu": round(used.mfu, 4),
    }
