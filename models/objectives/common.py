"""Pieces that the objectives share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vlfoundry.infra.backend import install
from vlfoundry.infra.train.protocols import Batch, Metrics, Runner
from vlfoundry.models.layers.megatron import gather_from_sequence_parallel_region
from vlfoundry.models.layers.parallel import data_group


class _GatherRows(torch.autograd.Function):
    """Rows of all ranks forwards; backwards the sum over ranks of the gradients of our rows."""

    @staticmethod
    def forward(ctx, rows: Tensor, group: Any) -> Tensor:
        ctx.group = group
        everything = rows.new_empty(group.size() * rows.shape[0], *rows.shape[1:])
        dist.all_gather_into_tensor(everything, rows.contiguous(), group=group)
        return everything

    @staticmethod
    # pyrefly: ignore[bad-override]  # PyTorch's stub takes any number of gradients
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        ours = grad.new_empty(grad.shape[0] // ctx.group.size(), *grad.shape[1:])
        dist.reduce_scatter_tensor(ours, grad.contiguous(), group=ctx.group)
        return ours, None


def _gather_same(rows: Tensor, group: Any) -> Tensor:
    return gather_from_sequence_parallel_region(
        rows, tensor_parallel_output_grad=False, group=group
    )


def gather_rows(rows: Tensor) -> Tensor:
    """[B, ...] of each data-parallel rank -> [ranks * B, ...], with gradients to every rank."""
    group = data_group()
    return rows if group.size() == 1 else _GatherRows.apply(rows, group)


class _ScatterRows(torch.autograd.Function):
    """Part r of our rows goes to rank r, and its gradient comes back."""

    @staticmethod
    def forward(ctx, rows: Tensor, group: Any) -> Tensor:
        ctx.group = group
        received = torch.empty_like(rows)
        dist.all_to_all_single(received, rows.contiguous(), group=group)
        return received

    @staticmethod
    # pyrefly: ignore[bad-override]  # PyTorch's stub takes any number of gradients
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _ScatterRows.apply(grad, ctx.group), None


def scatter_rows(rows: Tensor) -> Tensor:
    """What each data-parallel rank has for all -> what all of them have for us, with gradients.

    [ranks * B] -> [ranks, B].
    """
    group = data_group()
    if group.size() > 1:
        rows = _ScatterRows.apply(rows, group)
    return rows.view(group.size(), -1)


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum over the data-parallel ranks of numbers that have no gradient."""
    group = data_group()
    if group.size() == 1:
        return values
    values = values.detach().clone()
    dist.all_reduce(values, group=group)
    return values


def max_over_ranks(value: int) -> int:
    """The largest over the data-parallel ranks."""
    group = data_group()
    if group.size() == 1:
        return value
    box = torch.tensor(value, device=install().kind)
    dist.all_reduce(box, op=dist.ReduceOp.MAX, group=group)
    return int(box)


@dataclass(frozen=True, kw_only=True)
class MicroBatches:
    """What goes through a model one after another, and how the results go together again."""

    batches: list[Batch]
    order: Tensor | None = None
    """rows of the results, one behind another, that make the whole; None: all of them"""
    group: Any = None
    """ranks that have as many rows each, which all together make the results; None: ours do"""

    def assemble(self, outputs: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The whole batch's results from those of the micro-batches."""
        whole = {name: torch.cat([part[name] for part in outputs]) for name in outputs[0]}
        if self.group is not None:
            # All of these ranks go on with the same rows, so each has the whole gradient of its.
            whole = {name: _gather_same(rows, self.group) for name, rows in whole.items()}
        if self.order is None:
            return whole
        return {name: rows[self.order] for name, rows in whole.items()}


class Objective:
    """A loss, in pieces that a training engine can put together in any layout.

    A batch is prepared, goes along each of `paths` through the model, perhaps in micro-batches and
    through a pipeline; `finish` makes of what comes out a few numbers a sample, and `loss` one
    number of those.
    """

    paths: tuple[str, ...]
    """of the model (`models.internvl.model.PATHS`); the parameters that they go through learn"""
    coupled: bool
    """whether a sample's loss depends on what others come to. If not, the loss and its metrics are
    sums over micro-batches."""

    def prepare(self, run: Runner, batch: Batch) -> Batch:
        """Add what must be known of the whole batch before anything is learnt."""
        return batch

    def micro_batches(self, path: str, batch: Batch, parts: int) -> MicroBatches:
        """Cut what a path reads into `parts`, by samples."""
        return MicroBatches(batches=split_rows(batch, parts))

    def finish(self, path: str, model: Any, state: dict[str, Tensor], batch: Batch) -> Metrics:
        """From a path's end to tensors with one row a sample, in the order of the batch."""
        return state

    def loss(self, model: Any, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Metrics]:
        """The loss whose mean over the data-parallel ranks counts, and detached scalars."""
        raise NotImplementedError

    def samples(self, batch: Batch) -> int:
        """Samples of this rank's batch."""
        return len(batch["ids"])

    def __call__(self, model: Any, batch: Batch) -> tuple[Tensor, Metrics]:
        """Loss and metrics, by a model that is whole in this process."""
        model = unwrap(model)
        batch = self.prepare(_InOneGo(self, model), batch)
        outputs: dict[str, Tensor] = {}
        for path in self.paths:
            outputs |= in_one_go(self, path, model, batch)
        return self.loss(model, outputs, batch)


@dataclass(frozen=True)
class _InOneGo:
    objective: Objective
    model: Any

    @torch.no_grad()
    def collect(self, path: str, batch: Batch) -> dict[str, Tensor]:
        return in_one_go(self.objective, path, self.model, batch)


def in_one_go(objective: Objective, path: str, model: Any, batch: Batch) -> dict[str, Tensor]:
    """A path's results by a whole model, with gradients."""
    plan = objective.micro_batches(path, batch, 1)
    return plan.assemble(
        [objective.finish(path, model, model.run(path, part), part) for part in plan.batches]
    )


def images_of(batch: Batch) -> dict[str, Tensor]:
    """What the vision tower reads of a batch, row by row."""
    return {name: batch[name] for name in ("pixels", "kept", "samples") if name in batch}


def split_rows(batch: Batch, parts: int) -> list[Batch]:
    """Cut every tensor's rows into `parts` of nearly equal size; all else is in each of them."""
    rows = min(parts, max(len(v) for v in batch.values() if _has_rows(v)))
    cut = {n: v.tensor_split(rows) if _has_rows(v) else [v] * rows for n, v in batch.items()}
    return [{name: values[i] for name, values in cut.items()} for i in range(rows)]


def _has_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0


def unwrap(model: Any) -> Any:
    """The model inside Megatron's data-parallel wrapper, whose methods objectives call."""
    return getattr(model, "module", model)
