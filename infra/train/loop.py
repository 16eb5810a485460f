"""The one training loop. A stage differs by its objective, its batches and what it freezes."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlfoundry.infra.backend import Layout, device_literals, install
from vlfoundry.infra.backend.placement import to_device
from vlfoundry.infra.backend.world import StopRequests, stop_requests
from vlfoundry.infra.core.progress import Progress
from vlfoundry.infra.train.checkpoint import best_checkpoint, newest
from vlfoundry.infra.train.config import TrainConfig
from vlfoundry.infra.train.protocols import Objective
from vlfoundry.infra.train.telemetry import Telemetry, Work
from vlfoundry.infra.train.trainer import Trainer, agree


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """How a run ended."""

    steps: int
    """optimizer steps done in all"""
    history: list[dict[str, float]]
    """a row for each step that counted: step (from 0), loss, the objective's terms, lr and
    grad_norm"""
    bad_steps: list[dict[str, Any]]
    """step, batch, reason and action of each step that did not"""
    interrupted: bool
    """stopped on request before the end; the same call goes on"""
    resumed_from: int
    """steps that an earlier call had done"""
    best_step: int | None
    """steps of the checkpoint that `train.keep_best` kept"""
    left_fp8_at: int | None
    """first step that was computed in higher precision for a bad step in FP8; None: none was"""
    step_flops: float
    """FLOPs of a step's matrix products over all ranks"""
    peak_flops_per_s: float
    """of one rank's device"""


def fit(
    model: Any,
    objective: Objective,
    batch_at: Callable[[int], Any],
    config: TrainConfig,
    *,
    work: Path,
    run_key: str,
    layout: Layout,
    log: Callable[[str], None] = print,
    label: str = "train",
    deadline: float = math.inf,
    sinks: tuple[str, ...] = (),
    prometheus: str | None = None,
) -> FitResult:
    """Train `model` in place; every rank calls this inside `infra.backend.parallel`.

    The loss that counts is the mean over the data-parallel ranks of what `objective` returns.

    Args:
        model: an initialised MegatronModule, not wrapped. Parameters with requires_grad False
            get no gradient buffer and no optimizer state.
        objective: its terms become columns of the history.
        batch_at: this rank's batch of a step; a pure function of the step.
        config: what to do.
        work: folder for `checkpoints/` and `steps.jsonl` (where time went; rank 0).
        run_key: a checkpoint of another run key is never loaded.
        layout: must be the one that is initialised.
        log: takes one line; called on rank 0 only.
        label: stands before the progress bar.
        deadline: `time.monotonic` at which to save and leave, as if asked to.
        sinks, prometheus: who is told about each step, beside `steps.jsonl`
            (`infra.train.telemetry`).

    With `train.ema_decay` the model ends as the running mean of its weights.

    Raises:
        UserError: a step was bad, and the config says to stop or enough of them were.
    """
    install()
    import torch.distributed as dist

    assert layout.ranks == dist.get_world_size(), "layout is not the one that is initialised"
    config.samples_per_rank(layout.data)
    is_first = dist.get_rank() == 0
    log = log if is_first else _say_nothing
    with device_literals(), warnings.catch_warnings(), stop_requests() as stop:
        # Megatron looks at the gradient of a slice of a parameter to find that it has none.
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not")
        saved = agree(newest(work / "checkpoints", run_key, log) if is_first else None)
        trainer = Trainer(model, objective, config, layout, work=work, run_key=run_key, log=log)
        probe = to_device(batch_at(0))
        if saved is None:
            trainer.dry_run(probe)
        first = trainer.begin(saved)
        flops, peak, peak_is = trainer.measure(probe)
        step_work = Work(
            samples=config.batch_samples,
            flops=flops,
            peak_flops_per_s=peak * layout.ranks,
            peak_is=peak_is,
        )
        told = {"sinks": sinks, "prometheus": prometheus, "enabled": is_first}
        bar = Progress(config.steps, unit="steps", label=label, start=first, enabled=is_first)
        with Telemetry(work, step_work, **told) as telemetry, bar:
            _steps(trainer, batch_at, config, telemetry, bar, log, stop, deadline)
        trainer.checkpoints.finish()
    account = trainer.account
    interrupted = account.step < config.steps
    if interrupted:
        log(
            f"stopped after step {account.step} of {config.steps}, saved; "
            "run the same command again to go on"
        )
    elif trainer.ema:
        trainer.ema.move_into_model()
    best = best_checkpoint(work / "checkpoints", run_key, config) if config.keep_best else None
    return FitResult(
        steps=account.step,
        history=account.history,
        bad_steps=account.bad_steps,
        interrupted=interrupted,
        resumed_from=first,
        best_step=int(best.name.partition("-")[2]) if best else None,
        left_fp8_at=account.left_fp8_at,
        step_flops=flops,
        peak_flops_per_s=peak,
    )


def _steps(
    trainer: Trainer,
    batch_at: Callable[[int], Any],
    config: TrainConfig,
    telemetry: Telemetry,
    bar: Progress,
    log: Callable[[str], None],
    stop: StopRequests,
    deadline: float,
) -> None:
    """The loop itself: until the last step, or the end of one in which somebody asked to stop."""
    account, watch = trainer.account, trainer.watch
    while account.step < config.steps:
        step, wall, cpu = account.step, time.perf_counter(), time.process_time()
        watch.start()
        with watch.phase("data"):
            batch = to_device(batch_at(account.batch))
        row = trainer.step(batch)
        with watch.phase("checkpoint"):
            asked_to_stop = trainer.look_up(stop.asked or time.monotonic() > deadline)
        telemetry.step(
            step, watch, time.perf_counter() - wall, time.process_time() - cpu,
            trainer.tokens(), row, trainer.seen,
        )  # fmt: skip
        if row is not None:
            bar.update(1, loss=f"{row['loss']:.4f}")
            if config.logs(account.step):
                log(_line(row, config, telemetry.samples_per_s))
        if asked_to_stop:
            return


def _line(row: dict[str, float], config: TrainConfig, samples_per_s: float) -> str:
    known = ("step", "lr", "grad_norm")
    terms = "  ".join(f"{name} {value:.4f}" for name, value in row.items() if name not in known)
    return (
        f"step {int(row['step']) + 1}/{config.steps}  {terms}  lr {row['lr']:.2e}  "
        f"grad norm {row['grad_norm']:.3f}  {samples_per_s:.0f} samples/s"
    )


def _say_nothing(_message: str) -> None:
    pass
