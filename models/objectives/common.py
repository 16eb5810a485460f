"""Pieces that the objectives share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from models.common.parallel import data_group

Batch = Mapping[str, Any]
Metrics = dict[str, Tensor]


class _GatherRows(torch.autograd.Function):
    """Rows of all ranks forwards; backwards the sum over ranks of the gradients of our rows."""

    @staticmethod
    def forward(ctx, rows: Tensor, group) -> Tensor:
        ctx.group = group
        everything = rows.new_empty(group.size() * rows.shape[0], *rows.shape[1:])
        dist.all_gather_into_tensor(everything, rows.contiguous(), group=group)
        return everything

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        ours = grad.new_empty(grad.shape[0] // ctx.group.size(), *grad.shape[1:])
        dist.reduce_scatter_tensor(ours, grad.contiguous(), group=ctx.group)
        return ours, None


def gather_rows(rows: Tensor) -> Tensor:
    """[B, ...] of each data-parallel rank -> [ranks * B, ...], with gradients to every rank."""
    group = data_group()
    return rows if group.size() == 1 else _GatherRows.apply(rows, group)


class _ScatterRows(torch.autograd.Function):
    """Part r of our rows goes to rank r, and its gradient comes back."""

    @staticmethod
    def forward(ctx, rows: Tensor, group) -> Tensor:
        ctx.group = group
        received = torch.empty_like(rows)
        dist.all_to_all_single(received, rows.contiguous(), group=group)
        return received

    @staticmethod
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


def unwrap(model: Any) -> Any:
    """The model inside Megatron's data-parallel wrapper, whose methods objectives call."""
    return getattr(model, "module", model)
