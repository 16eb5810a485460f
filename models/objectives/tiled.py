"""Sums over all pairs of two sets of embeddings, without ever holding all of their logits.

The logits exist a tile of columns at a time, so memory is linear in the batch (Inf-CL,
arXiv 2410.17243, does the same on GPUs).

Letters: B rows of this rank, N columns of all ranks, E embedding, C columns of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlfoundry.models import kernels

TILE_COLUMNS = 512
"""wide enough for the matrix products to run at full rate"""


class TwoWay(NamedTuple):
    """What the two directions need of the logits [B, N]."""

    row_lse: Tensor
    """[B] logarithm of the sum of exponentials over columns"""
    column_lse: Tensor
    """[N] the same over these B rows"""
    row_best: Tensor
    """[B] column of the largest logit"""
    column_best: Tensor
    """[N] row of the largest logit"""
    column_max: Tensor
    """[N] the largest logit"""


def two_way_logsumexp(rows: Tensor, columns: Tensor, tile: int = TILE_COLUMNS) -> TwoWay:
    """Logsumexp of rows @ columns.T over both axes; only these have gradients.

    Four matrix products in all: neither direction's gradient is known before its whole sum is, so
    the backward pass makes the logits again.

    Args:
        rows: [B, E].
        columns: [N, E].
        tile: C.
    """
    return TwoWay(*_TwoWayLogSumExp.apply(rows, columns, tile))


def softplus_sum(rows: Tensor, columns: Tensor, bias: Tensor, tile: int = TILE_COLUMNS) -> Tensor:
    """Sum of log(1 + exp(rows @ columns.T + bias)) over all pairs.

    Three matrix products in all: the gradient of a pair needs no other pair, so it is made beside
    the sum.

    Args:
        rows: [B, E].
        columns: [N, E].
        bias: of every logit, a scalar.
        tile: C.
    """
    return _SoftplusSum.apply(rows, columns, bias, tile)


class _TwoWayLogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, columns: Tensor, tile: int):
        ctx.tile = tile
        row_max, row_sum, row_best, column_max, column_sum, column_best = _largest_and_sums(
            rows, columns, tile
        )
        ctx.save_for_backward(rows, columns, row_max, row_sum, column_max, column_sum)
        ctx.mark_non_differentiable(row_best, column_best, column_max)
        row_lse, column_lse = row_max + row_sum.log(), column_max + column_sum.log()
        return row_lse, column_lse, row_best, column_best, column_max

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]  # PyTorch's stub takes any number of gradients
    def backward(ctx, row_grad: Tensor, column_grad: Tensor, *_):
        rows, columns, row_max, row_sum, column_max, column_sum = ctx.saved_tensors
        # Not exp(logits - lse): the rounding of a large lse would leave rows that do not sum to 1.
        row_grad, column_grad = row_grad / row_sum, column_grad / column_sum
        grad_rows, grad_columns = torch.zeros_like(rows), torch.empty_like(columns)
        for part, logits, spare in _tiles(rows, columns, ctx.tile):
            _softmax_gradients(
                rows, columns[part], row_max, row_grad, column_max[part], column_grad[part],
                logits, spare,
            )  # fmt: skip
            grad_rows.addmm_(spare, columns[part])
            torch.mm(spare.T, rows, out=grad_columns[part])
        return grad_rows, grad_columns, None


class _SoftplusSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, columns: Tensor, bias: Tensor, tile: int) -> Tensor:
        total, grad_bias = torch.zeros_like(bias), torch.zeros_like(bias)
        grad_rows, grad_columns = torch.zeros_like(rows), torch.empty_like(columns)
        for part, logits, spare in _tiles(rows, columns, tile):
            tile_total, sigmoids = _sigmoid_gradients(rows, columns[part], bias, logits, spare)
            total += tile_total
            grad_bias += sigmoids
            grad_rows.addmm_(logits, columns[part])
            torch.mm(logits.T, rows, out=grad_columns[part])
        ctx.save_for_backward(grad_rows, grad_columns, grad_bias)
        return total

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]  # PyTorch's stub takes any number of gradients
    def backward(ctx, grad: Tensor):
        return *(grad * saved for saved in ctx.saved_tensors), None


def _largest_and_sums(rows: Tensor, columns: Tensor, tile: int) -> tuple[Tensor, ...]:
    """The largest logit, the sum of exponentials relative to it and where it is: of each row [B],
    then of each column [N]."""
    if kernels.use_kernels(rows):
        from vlfoundry.models.kernels.pairs import largest_and_sums

        return *largest_and_sums(rows, columns), *largest_and_sums(columns, rows)
    row_max, row_sum = rows.new_full((len(rows),), -torch.inf), rows.new_zeros(len(rows))
    row_best = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
    column_max, column_sum = rows.new_empty(len(columns)), rows.new_empty(len(columns))
    column_best = torch.empty(len(columns), dtype=torch.long, device=rows.device)
    for part, logits, spare in _tiles(rows, columns, tile):
        torch.mm(rows, columns[part].T, out=logits)
        top, best = logits.max(1)
        torch.where(top > row_max, best + part.start, row_best, out=row_best)
        highest = torch.maximum(row_max, top)
        row_sum.mul_((row_max - highest).exp_())
        row_sum += torch.sub(logits, highest[:, None], out=spare).exp_().sum(1)
        row_max = highest
        torch.max(logits, 0, out=(column_max[part], column_best[part]))
        column_sum[part] = logits.sub_(column_max[part]).exp_().sum(0)
    return row_max, row_sum, row_best, column_max, column_sum, column_best


def _softmax_gradients(
    rows: Tensor,
    columns: Tensor,
    row_max: Tensor,
    row_grad: Tensor,
    column_max: Tensor,
    column_grad: Tensor,
    spare: Tensor,
    out: Tensor,
) -> None:
    """Gradients of one tile's logits, to `out` [B, C]; `spare` is such a buffer."""
    if kernels.use_kernels(rows):
        from vlfoundry.models.kernels.pairs import softmax_gradients

        softmax_gradients(rows, columns, row_max, row_grad, column_max, column_grad, out)
        return
    torch.mm(rows, columns.T, out=spare)
    torch.sub(spare, row_max[:, None], out=out).exp_().mul_(row_grad[:, None])
    out.addcmul_(spare.sub_(column_max).exp_(), column_grad)


def _sigmoid_gradients(
    rows: Tensor, columns: Tensor, bias: Tensor, out: Tensor, spare: Tensor
) -> tuple[Tensor, Tensor]:
    """Sigmoids of one tile's logits, to `out` [B, C]; returns the sum of softplus, and theirs."""
    if kernels.use_kernels(rows):
        from vlfoundry.models.kernels.pairs import sigmoid_gradients

        return sigmoid_gradients(rows, columns, bias, out)
    torch.addmm(bias, rows, columns.T, out=out)
    total = torch.logaddexp(out, torch.zeros_like(bias), out=spare).sum()
    return total, out.sigmoid_().sum()


def _tiles(rows: Tensor, columns: Tensor, tile: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Each tile's columns, with two buffers [B, C] that all tiles use."""
    buffers = rows.new_empty(2, len(rows) * min(tile, len(columns)))
    for start in range(0, len(columns), tile):
        part = slice(start, min(start + tile, len(columns)))
        size = len(rows) * (part.stop - part.start)
        logits, spare = (buffer[:size].view(len(rows), -1) for buffer in buffers)
        yield part, logits, spare
