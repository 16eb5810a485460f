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
from vlfoundry.infra.backend.world import stop_requests
from vlfoundry.infra.core.progress import Progress
from vlfoundry.infra.core.streams import Stream, stream_seed
from vlfoundry.infra.train.anomalies import TrainerState, find_anomaly, raise_if_unrecoverable
from vlfoundry.infra.train.checkpoint import Checkpoints, Saved, best_checkpoint, newest
from vlfoundry.infra.train.config import TrainConfig
from vlfoundry.infra.train.ema import Ema
from vlfoundry.infra.train.fp8 import Fp8Run
from vlfoundry.infra.train.mfu import peak_flops_per_s
from vlfoundry.infra.train.optim import build_optimizer, gradient_norm, set_step, update
from vlfoundry.infra.train.step import Engine, random_state, set_random_state
from vlfoundry.infra.train.telemetry import Stopwatch, Telemetry, Work

Objective = Any
"""what `infra.train.step` can differentiate: pieces of a loss, or a function
(model, batch) -> (loss, {name: detached scalar})"""


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
        saved = _agree(newest(work / "checkpoints", run_key, log) if is_first else None)
        trainer = _Trainer(model, objective, config, layout, work=work, run_key=run_key, log=log)
        probe = to_device(batch_at(0))
        if saved is None:
            trainer.dry_run(probe)
        first = trainer.begin(saved)
        account = trainer.account
        watch = trainer.watch
        flops, peak, peak_is = trainer.measure(probe)
        telemetry = Telemetry(
            work,
            Work(
                samples=config.batch_samples,
                flops=flops,
                peak_flops_per_s=peak * layout.ranks,
                peak_is=peak_is,
            ),
            sinks=sinks,
            prometheus=prometheus,
            enabled=is_first,
        )
        bar = Progress(config.steps, unit="steps", label=label, start=first, enabled=is_first)
        with telemetry, bar:
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
                    break
        trainer.checkpoints.finish()
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


class _Trainer:
    """What surrounds a step: the guard, the update, the running mean, the checkpoints."""

    def __init__(
        self,
        model: Any,
        objective: Objective,
        config: TrainConfig,
        layout: Layout,
        *,
        work: Path,
        run_key: str,
        log: Callable[[str], None],
    ) -> None:
        self._config, self._log = config, log
        self._folder, self._run_key = work / "checkpoints", run_key
        self._run = _Run(model, objective, config, layout)
        self.dry_run, self.measure = self._run.dry_run, self._run.measure
        self.watch, self.tokens = self._run.watch, self._run.tokens
        self.ema = Ema(model, config.ema_decay) if config.ema_decay else None
        self.account = TrainerState()
        self.seen: dict[str, Any] = {}
        self._fp8 = Fp8Run(model)
        self._saved_step = -1
        self.checkpoints = Checkpoints(
            self._folder, run_key, model, self._run.optimizer, self.ema, self._fp8, config
        )

    def begin(self, saved: Saved | None) -> int:
        """Load what an earlier call has left; returns the steps that it has done."""
        if saved is not None:
            self._load(saved)
            self._log(
                f"going on after step {self.account.step} of {self._config.steps} "
                f"({saved.folder.name})"
            )
        elif self._config.goes_back:
            self.checkpoints.save(self.account)
            self._saved_step = 0
        return self.account.step

    def step(self, batch: Any) -> dict[str, float] | None:
        """Gradients of one batch, and the update if they are good: then the history's row."""
        account, config, optimizer = self.account, self._config, self._run.optimizer
        in_fp8 = config.fp8 is not None and account.left_fp8_at is None
        watched = in_fp8 and config.logs(account.step + 1)
        self._fp8.begin_step(watched=watched)
        terms = self._run.gradients(batch)
        self.seen = self._fp8.seen() if watched else {}
        lr = set_step(optimizer, account.step, config)
        with self.watch.phase("communication"):
            grad_norm = gradient_norm(optimizer)
        reason = find_anomaly(terms, grad_norm, account, config)
        if reason:
            raise_if_unrecoverable(reason, account, config)
            self._pass_over(reason)
            return None
        with self.watch.phase("optimizer"):
            update(optimizer, grad_norm, config.clip_grad)
            self._fp8.end_step()
            if self.ema:
                self.ema.update()
        row = {"step": account.step, **terms, "lr": lr, "grad_norm": grad_norm}
        account.history.append(row)
        account.step += 1
        return row

    def look_up(self, asked_to_stop: bool) -> bool:
        """Between two steps: save if it is time to, commit what is written; whether to stop."""
        asked_to_stop, writing = _any_rank(asked_to_stop, self.checkpoints.writing)
        if self.checkpoints.waits_for_commit and not writing:
            self.checkpoints.commit()
        done, config = self.account.step, self._config
        is_due = done % config.save_every_steps == 0 or done == config.steps or asked_to_stop
        if is_due and done != self._saved_step:
            self.checkpoints.save(self.account)
            self._saved_step = done
        return asked_to_stop

    def _pass_over(self, reason: str) -> None:
        account, action = self.account, self._config.on_bad_step
        left_at = account.left_fp8_at
        if action == "higher_precision" and left_at is not None:
            action = "rollback"
        bad = {"step": account.step, "batch": account.batch, "reason": reason, "action": action}
        bad_steps, next_batch = [*account.bad_steps, bad], account.batch + 1
        self._log(f"{reason} at step {account.step} (batch {account.batch}): {action}")
        if action == "skip":
            account.step += 1
        else:
            self.checkpoints.finish()
            # Not one that was saved on request: a run that nobody stopped has none there.
            every = self._config.save_every_steps
            target = account.step // every * every
            saved = _agree(self._newest(at=target))
            assert saved is not None, "a run that can roll back saves before its first step"
            self._load(saved)
            account.left_fp8_at = left_at
            if action == "rollback":
                account.batch_shift = next_batch - account.step
            else:
                account.left_fp8_at = account.step
                self._fp8.leave()
        account.bad_steps[:] = bad_steps

    def _newest(self, at: int) -> Saved | None:
        """On rank 0; the other ranks need not read all files too."""
        import torch.distributed as dist

        if dist.get_rank() != 0:
            return None
        return newest(self._folder, self._run_key, self._log, at=at)

    def _load(self, saved: Saved) -> None:
        if not self.checkpoints.load(saved):
            from vlfoundry.infra.backend.parallel import seed_everything

            own = stream_seed(self._config.seed, Stream.RESUMED)
            seed_everything(own + saved.account.step)
            self._log(
                f"{saved.ranks} ranks wrote this checkpoint: dropout goes on with other numbers"
            )
        self.account.take_over(saved.account)
        if self.account.left_fp8_at is not None:
            self._fp8.leave()
        self._saved_step = self.account.step


class _Run:
    """The wrapped model, its optimizer, and the gradients of one step."""

    def __init__(
        self, model: Any, objective: Objective, config: TrainConfig, layout: Layout
    ) -> None:
        self.watch = Stopwatch(_synchronise())
        model = to_device(model)
        self._wrapped = [
            wrap(chunk, config.gradients) for chunk in getattr(model, "chunks", [model])
        ]
        self._engine = Engine(model, self._wrapped, objective, layout, self.watch)
        self.optimizer = build_optimizer(self._wrapped, config)
        model.train()

    def dry_run(self, batch: Any) -> None:
        """Forward one batch, so that wrong shapes and lack of memory show in the first seconds."""
        state = random_state()
        self._engine.forward(batch)
        set_random_state(state)

    def measure(self, batch: Any) -> tuple[float, float, str]:
        """FLOPs of a step over all ranks, and what one rank's device could do, with its source."""
        import torch
        import torch.distributed as dist

        state = random_state()
        flops = torch.tensor(self._engine.flops(batch), dtype=torch.float64, device=install().kind)
        set_random_state(state)
        dist.all_reduce(flops)
        return float(flops), *peak_flops_per_s()

    def tokens(self) -> int:
        """Tokens of the last step in all towers, of all ranks that have different ones."""
        return self._engine.tokens()

    def gradients(self, batch: Any) -> dict[str, float]:
        """Gradients of one batch; returns the terms, equal on all ranks."""
        with self.watch.phase("optimizer"):
            for wrapped in self._wrapped:
                wrapped.zero_grad_buffer()
            self.optimizer.zero_grad()
        terms = self._engine.gradients(batch)
        with self.watch.phase("communication"):
            self._engine.finalise()
        return terms


def wrap(model: Any, gradients: str = "fp32") -> Any:
    """Megatron's data-parallel wrapper: gradients live in one buffer a dtype."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
    )
    from megatron.core.enums import ModelType

    if not hasattr(model, "model_type"):
        model.model_type = ModelType.encoder_or_decoder
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=gradients == "fp32",
    )
    return DistributedDataParallel(model.config, settings, model)


def _synchronise() -> Callable[[], None] | None:
    """What makes a device's work end before the clock is read; a CPU's has ended."""
    if install().kind == "cpu":
        return None
    import torch

    return torch.cuda.synchronize


def _agree(saved: Saved | None) -> Saved | None:
    """What rank 0 found, on every rank."""
    import torch.distributed as dist

    box = [saved]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _any_rank(*flags: bool) -> list[bool]:
    """For each flag whether it is set on any rank."""
    import torch
    import torch.distributed as dist

    values = torch.tensor(flags, dtype=torch.int32, device=install().kind)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return [bool(value) for value in values.tolist()]


def _line(row: dict[str, float], config: TrainConfig, samples_per_s: float) -> str:
    known = ("step", "lr", "grad_norm")
    terms = "  ".join(f"{name} {value:.4f}" for name, value in row.items() if name not in known)
    return (
        f"step {int(row['step']) + 1}/{config.steps}  {terms}  lr {row['lr']:.2e}  "
        f"grad norm {row['grad_norm']:.3f}  {samples_per_s:.0f} samples/s"
    )


def _say_nothing(_message: str) -> None:
    pass
