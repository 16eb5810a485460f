"""The one training loop. A stage differs by its objective, its batches and what it freezes."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.backend import Layout, device_literals, install
from infra.backend.ranks import stop_requests
from infra.errors import UserError
from infra.progress import Progress
from infra.train.checkpoint import Checkpoints, Saved, newest
from infra.train.config import TrainConfig
from infra.train.optim import build_optimizer, set_step
from infra.train.step import Engine

Objective = Any
"""what `infra.train.step` can differentiate: pieces of a loss, or a function
(model, batch) -> (loss, {name: detached scalar})"""


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """How a run ended."""

    steps: int
    """optimizer steps done in all"""
    history: list[dict[str, float]]
    """a row a step: step (from 0), loss, the objective's terms, lr, grad_norm"""
    interrupted: bool
    """stopped on request before the end; the same call goes on"""
    resumed_from: int
    """steps that an earlier call had done"""


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
) -> FitResult:
    """Train `model` in place; every rank calls this inside `infra.backend.parallel`.

    The loss that counts is the mean over the data-parallel ranks of what `objective` returns.

    Args:
        model: an initialised MegatronModule, not wrapped. Parameters with requires_grad False
            get no gradient buffer and no optimizer state.
        objective: its terms become columns of the history.
        batch_at: this rank's batch of a step; a pure function of the step.
        config: what to do.
        work: folder for `checkpoints/` and `steps.jsonl` (times; rank 0).
        run_key: a checkpoint of another run key is never loaded.
        layout: must be the one that is initialised.
        log: takes one line; called on rank 0 only.
        label: stands before the progress bar.

    Raises:
        UserError: the loss is no longer finite.
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
        run = _Run(model, objective, config, layout)
        if saved is None:
            run.dry_run(batch_at(0))
        checkpoints = Checkpoints(work / "checkpoints", run_key, model, run.optimizer)
        if saved is not None:
            _resume(checkpoints, saved, config, log)
        history = list(saved.history) if saved else []
        first = len(history)
        timings = _Timings(work / "steps.jsonl", config.batch_samples, enabled=is_first)
        bar = Progress(config.steps, unit="steps", label=label, start=first, enabled=is_first)
        with timings, bar:
            for step in range(first, config.steps):
                timings.start()
                batch = batch_at(step)
                timings.loaded()
                row, asked_to_stop = run.step(step, batch, stop.asked)
                timings.stepped(step)
                history.append(row)
                done = step + 1
                if done % config.save_every_steps == 0 or done == config.steps or asked_to_stop:
                    checkpoints.save(done, history)
                bar.update(1, loss=f"{row['loss']:.4f}")
                if done % config.log_every_steps == 0 or done == config.steps:
                    log(_line(row, config, timings.samples_per_s))
                if asked_to_stop:
                    break
    interrupted = len(history) < config.steps
    if interrupted:
        log(
            f"stopped after step {len(history)} of {config.steps}, saved; "
            "run the same command again to go on"
        )
    return FitResult(
        steps=len(history), history=history, interrupted=interrupted, resumed_from=first
    )


class _Run:
    """The wrapped model, its optimizer, and one step of both."""

    def __init__(
        self, model: Any, objective: Objective, config: TrainConfig, layout: Layout
    ) -> None:
        self._config = config
        self._wrapped = [_wrap(chunk) for chunk in getattr(model, "chunks", [model])]
        self._engine = Engine(model, self._wrapped, objective, layout)
        self.optimizer = build_optimizer(self._wrapped, config)
        model.train()

    def dry_run(self, batch: Any) -> None:
        """Forward one batch, so that wrong shapes and lack of memory show in the first seconds."""
        import torch

        state = torch.get_rng_state()
        self._engine.forward(batch)
        torch.set_rng_state(state)

    def step(self, step: int, batch: Any, stop_asked: bool) -> tuple[dict[str, float], bool]:
        """One update. Returns the history's row and whether any rank was asked to stop."""
        for wrapped in self._wrapped:
            wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        terms = self._engine.gradients(batch)
        self._engine.finalise()
        stop = _any_rank(stop_asked)
        if not math.isfinite(terms["loss"]):
            raise UserError(
                f"the loss is {terms['loss']} at step {step}; lower train.lr "
                f"({self._config.lr:g}) or raise train.warmup_steps ({self._config.warmup_steps})"
            )
        lr = set_step(self.optimizer, step, self._config)
        _, grad_norm, _ = self.optimizer.step()
        return {"step": step, **terms, "lr": lr, "grad_norm": float(grad_norm)}, stop


def _wrap(model: Any) -> Any:
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
        grad_reduce_in_fp32=True,
    )
    return DistributedDataParallel(model.config, settings, model)


def _resume(
    checkpoints: Checkpoints, saved: Saved, config: TrainConfig, log: Callable[[str], None]
) -> None:
    if not checkpoints.load(saved):
        from infra.backend.parallel import seed_everything

        seed_everything(config.seed + saved.step)
        log(f"{saved.ranks} ranks wrote this checkpoint: dropout goes on with other numbers")
    log(f"going on after step {saved.step} of {config.steps} ({saved.folder.name})")


def _agree(saved: Saved | None) -> Saved | None:
    """What rank 0 found, on every rank."""
    import torch.distributed as dist

    box = [saved]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _any_rank(asked: bool) -> bool:
    """Whether any rank was asked to stop."""
    import torch
    import torch.distributed as dist

    box = torch.tensor(float(asked), device=install().kind)
    dist.all_reduce(box)
    return bool(box > 0)


def _line(row: dict[str, float], config: TrainConfig, samples_per_s: float) -> str:
    known = ("step", "lr", "grad_norm")
    terms = "  ".join(f"{name} {value:.4f}" for name, value in row.items() if name not in known)
    return (
        f"step {int(row['step']) + 1}/{config.steps}  {terms}  lr {row['lr']:.2e}  "
        f"grad norm {row['grad_norm']:.3f}  {samples_per_s:.0f} samples/s"
    )


def _say_nothing(_message: str) -> None:
    pass


@dataclass
class _Timings:
    """Rank 0's times, one JSON line a step: never part of a result."""

    path: Path
    batch_samples: int
    enabled: bool
    samples_per_s: float = 0.0
    _marks: list[float] = field(default_factory=list)
    _stream: Any = None

    def __enter__(self) -> _Timings:
        if self.enabled:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = self.path.open("a", encoding="utf-8", buffering=1)
        return self

    def __exit__(self, *_error: Any) -> None:
        if self._stream:
            self._stream.close()

    def start(self) -> None:
        self._marks = [time.perf_counter(), time.process_time()]

    def loaded(self) -> None:
        self._marks.append(time.perf_counter())

    def stepped(self, step: int) -> None:
        started, cpu_started, loaded = self._marks
        now = time.perf_counter()
        self.samples_per_s = self.batch_samples / (now - started)
        if self._stream:
            line = {
                "step": step,
                "data_s": round(loaded - started, 5),
                "step_s": round(now - loaded, 5),
                "cpu_s": round(time.process_time() - cpu_started, 5),
                "samples_per_s": round(self.samples_per_s, 2),
            }
            self._stream.write(json.dumps(line) + "\n")
