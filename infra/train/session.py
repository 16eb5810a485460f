"""A training stage from its launcher profile to its result: what the four stages share."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infra.backend import Layout
from infra.backend.ranks import run_ranks
from infra.launch import local_profile
from infra.stage import Context, Interrupted
from infra.train.config import TrainConfig
from infra.train.loop import FitResult, Objective

HISTORY_FORMAT = "vlfoundry.history.v1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Which share of each global batch a rank computes."""

    rank: int
    """data-parallel rank"""
    ranks: int
    """data-parallel size"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What one rank trains, made inside the process group."""

    model: Any
    """an initialised Megatron module; frozen parameters have requires_grad False"""
    objective: Objective
    """(model, batch) -> (loss, terms)"""
    batch_at: Callable[[int], Any]
    """this rank's batch of a step"""
    save: Callable[[Path], None]
    """writes the trained model's folder; every rank calls it"""


def train(
    context: Context,
    config: TrainConfig,
    make: Callable[[Place], Job],
    *,
    model_folder: str,
    history: str,
) -> None:
    """Fork the launcher's ranks, fit, and write the model folder and the history.

    Raises:
        Interrupted: asked to stop; everything needed to go on is saved.
    """
    profile = local_profile()
    layout = Layout(tensor=profile.tensor, pipeline=profile.pipeline, data=profile.data)
    target = context.output(model_folder)
    started = time.perf_counter()
    results = run_ranks(
        _work, context, config, make, layout, target, ranks=profile.ranks, threads=profile.threads
    )
    result: FitResult = results[0]["result"]
    if result.interrupted:
        raise Interrupted("run it again to go on")
    context.write_json(history, {"format": HISTORY_FORMAT, "steps": result.history})
    context.record(
        train_s=round(time.perf_counter() - started, 2),
        resumed_from=result.resumed_from,
        launcher=dataclasses.asdict(profile),
        steps=result.steps,
        samples=result.steps * config.batch_samples,
        throughput=results[0]["throughput"],
    )


def _work(
    context: Context,
    config: TrainConfig,
    make: Callable[[Place], Job],
    layout: Layout,
    target: Path,
) -> dict[str, Any]:
    """One rank's whole life."""
    from megatron.core import parallel_state

    from infra.backend.parallel import parallel
    from infra.train.loop import fit
    from infra.train.mfu import Throughput

    with parallel(layout, seed=config.seed):
        place = Place(
            rank=parallel_state.get_data_parallel_rank(),
            ranks=parallel_state.get_data_parallel_world_size(),
        )
        job = make(place)
        throughput = Throughput(job.model, job.objective, job.batch_at)
        result = fit(
            job.model,
            job.objective,
            job.batch_at,
            config,
            work=context.work,
            run_key=context.run_key,
            layout=layout,
            log=context.log,
            label=context.bound.address,
        )
        if not result.interrupted:
            job.save(target)
        return {"result": result, "throughput": throughput.facts(context.work, config)}
