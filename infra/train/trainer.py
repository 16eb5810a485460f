"""What every rank does with a model between two batches: gradients, guard, update, checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlfoundry.infra.backend import Layout, install
from vlfoundry.infra.backend.placement import to_device
from vlfoundry.infra.core.streams import Stream, stream_seed
from vlfoundry.infra.train.anomalies import TrainerState, find_anomaly, raise_if_unrecoverable
from vlfoundry.infra.train.checkpoint import Checkpoints, Saved, newest
from vlfoundry.infra.train.config import TrainConfig
from vlfoundry.infra.train.ema import Ema
from vlfoundry.infra.train.fp8 import Fp8Run
from vlfoundry.infra.train.mfu import peak_flops_per_s
from vlfoundry.infra.train.optim import build_optimizer, gradient_norm, set_step, update
from vlfoundry.infra.train.protocols import Objective
from vlfoundry.infra.train.step import Engine, random_state, set_random_state
from vlfoundry.infra.train.telemetry import Stopwatch


class Trainer:
    """A model in Megatron's wrapper, its optimizer, and what surrounds a step: the guard, the
    update, the running mean, the checkpoints.

    Every rank has one, inside `infra.backend.parallel`.
    """

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
        self.watch = Stopwatch(_synchronise())
        placed = to_device(model)
        self._wrapped = [
            wrap(chunk, config.gradients) for chunk in getattr(placed, "chunks", [placed])
        ]
        self._engine = Engine(placed, self._wrapped, objective, layout, self.watch)
        self._optimizer = build_optimizer(self._wrapped, config)
        placed.train()
        self.ema = Ema(model, config.ema_decay) if config.ema_decay else None
        self.account = TrainerState()
        self.seen: dict[str, Any] = {}
        self._fp8 = Fp8Run(model)
        self._saved_step = -1
        self.checkpoints = Checkpoints(
            self._folder, run_key, model, self._optimizer, self.ema, self._fp8, config
        )

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
        account, config, optimizer = self.account, self._config, self._optimizer
        in_fp8 = config.fp8 is not None and account.left_fp8_at is None
        watched = in_fp8 and config.logs(account.step + 1)
        self._fp8.begin_step(watched=watched)
        terms = self._gradients(batch)
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

    def _gradients(self, batch: Any) -> dict[str, float]:
        """Gradients of one batch; returns the terms, equal on all ranks."""
        with self.watch.phase("optimizer"):
            for wrapped in self._wrapped:
                wrapped.zero_grad_buffer()
            self._optimizer.zero_grad()
        terms = self._engine.gradients(batch)
        with self.watch.phase("communication"):
            self._engine.finalise()
        return terms

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
            saved = agree(self._newest(at=target))
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


def agree(saved: Saved | None) -> Saved | None:
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
