"""Which steps are bad, and the account that a run keeps of itself: equal on every rank."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import Any

from vlfoundry.infra.core.errors import UserError
from vlfoundry.infra.train.config import TrainConfig


@dataclass(kw_only=True)
class TrainerState:
    """Where a run stands. It lies in every checkpoint, so a resumed run decides alike."""

    step: int = 0
    """steps done, dropped ones included"""
    batch_shift: int = 0
    """batches passed over: step s takes batch s + batch_shift"""
    history: list[dict[str, float]] = field(default_factory=list)
    """a row for each step that changed the weights"""
    bad_steps: list[dict[str, Any]] = field(default_factory=list)
    """step, batch, reason and action of each step that did not count"""
    left_fp8_at: int | None = None
    """first step that was computed in higher precision for a bad step in FP8; None: none was"""

    @property
    def batch(self) -> int:
        """Number of the next step's batch."""
        return self.step + self.batch_shift

    def take_over(self, other: TrainerState) -> None:
        """Become equal to another account; the lists stay the same objects."""
        self.step, self.batch_shift = other.step, other.batch_shift
        self.history[:] = other.history
        self.bad_steps[:] = other.bad_steps
        self.left_fp8_at = other.left_fp8_at

    def mean_since(self, step: int, term: str) -> float | None:
        """Mean of a term of the history from `step` on; None where it has no value."""
        values = [row[term] for row in self.history if row["step"] >= step and term in row]
        return statistics.fmean(values) if values else None


def find_anomaly(
    terms: dict[str, float], grad_norm: float, account: TrainerState, config: TrainConfig
) -> str | None:
    """What is wrong with a step's loss or gradient; None: nothing.

    Only values that are equal on all ranks are looked at, and the rows of the history.
    """
    loss = terms["loss"]
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if not math.isfinite(grad_norm):
        return f"the gradient norm is {grad_norm}"
    if not config.spike_factor or len(account.history) < config.spike_steps:
        return None
    median = statistics.median(row["loss"] for row in account.history[-config.spike_steps :])
    if loss <= config.spike_factor * median:
        return None
    return f"the loss {loss:.4g} is {loss / median:.1f} times the median of the last steps"


def raise_if_unrecoverable(reason: str, account: TrainerState, config: TrainConfig) -> None:
    """Raise UserError where the config says to stop, or enough steps have been bad."""
    advice = (
        f"lower train.lr ({config.lr:g}) or raise train.warmup_steps ({config.warmup}), "
        "or look at the batch"
    )
    if config.on_bad_step == "stop":
        raise UserError(
            f"{reason} at step {account.step} (batch {account.batch}); {advice}; "
            "train.on_bad_step can be skip or rollback, or with train.fp8 higher_precision"
        )
    if len(account.bad_steps) >= config.max_bad_steps:
        raise UserError(
            f"{reason} at step {account.step} (batch {account.batch}), after "
            f"{len(account.bad_steps)} bad steps (train.max_bad_steps); {advice}"
        )
