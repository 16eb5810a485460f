"""Tiles of logits of all pairs of rows and columns, which never leave the processor they are made
on: what `models.objectives.tiled` needs of them is.

The logits are made in fp32 (not TF32), whatever PyTorch's matrix products are allowed.

Letters: B rows, N columns, E embedding, C columns of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlfoundry.models.kernels.rows import inner_type, parts_of

BLOCKS = {"ROWS": 64, "COLUMNS": 64, "CHANNELS": 32}
"""pairs, and channels at a time, that one program holds"""


def largest_and_sums(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row's logits the largest, the sum of exponentials relative to that, and its column.

    Args:
        rows: [B, E].
        columns: [N, E].

    Returns:
        Three times [B].
    """
    rows, columns = rows.contiguous(), columns.contiguous()
    top, total = rows.new_empty(2, len(rows))
    best = torch.empty(len(rows), dtype=torch.long, device=rows.device)
    largest_kernel[(parts_of(len(rows), BLOCKS["ROWS"]),)](
        rows, columns, top, total, best, len(rows), len(columns),
        WIDTH=rows.shape[1], INNER=inner_type(rows), **BLOCKS,
    )  # fmt: skip
    return top, total, best


def softmax_gradients(
    rows: Tensor,
    columns: Tensor,
    row_max: Tensor,
    row_grad: Tensor,
    column_max: Tensor,
    column_grad: Tensor,
    out: Tensor,
) -> None:
    """row_grad * exp(logit - row_max) + column_grad * exp(logit - column_max) of every pair.

    Args:
        rows, columns: [B, E] and [C, E].
        row_max, row_grad: [B].
        column_max, column_grad: [C].
        out: to be filled [B, C].
    """
    softmax_kernel[_tiles(out)](
        rows, columns, row_max, row_grad, column_max, column_grad, out, *out.shape,
        WIDTH=rows.shape[1], INNER=inner_type(rows), **BLOCKS,
    )  # fmt: skip


def sigmoid_gradients(
    rows: Tensor, columns: Tensor, bias: Tensor, out: Tensor
) -> tuple[Tensor, Tensor]:
    """sigmoid(logit + bias) of every pair.

    Args:
        rows, columns: [B, E] and [C, E].
        bias: a scalar.
        out: to be filled [B, C].

    Returns:
        The sum over all pairs of log(1 + exp(logit + bias)), and that of the sigmoids.
    """
    tiles = _tiles(out)
    sums = out.new_empty(2, *tiles)
    sigmoid_kernel[tiles](
        rows, columns, bias, out, sums, *out.shape,
        WIDTH=rows.shape[1], INNER=inner_type(rows), **BLOCKS,
    )  # fmt: skip
    total, sigmoids = sums.sum((1, 2))
    return total, sigmoids


def _tiles(out: Tensor) -> tuple[int, int]:
    rows, columns = out.shape
    return parts_of(rows, BLOCKS["ROWS"]), parts_of(columns, BLOCKS["COLUMNS"])


@triton.jit
def _logits(
    rows,
    columns,
    row,
    column,
    row_count,
    column_count,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
):
    """[ROWS, COLUMNS] for these row and column numbers; zero outside of what there is."""
    logits = tl.zeros([ROWS, COLUMNS], INNER)
    for start in range(0, WIDTH, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        inside = channel < WIDTH
        left = tl.load(
            rows + row.to(tl.int64)[:, None] * WIDTH + channel[None, :],
            mask=(row < row_count)[:, None] & inside[None, :],
            other=0.0,
        ).to(INNER)
        right = tl.load(
            columns + column.to(tl.int64)[None, :] * WIDTH + channel[:, None],
            mask=(column < column_count)[None, :] & inside[:, None],
            other=0.0,
        ).to(INNER)
        logits = tl.dot(left, right, logits, input_precision="ieee", out_dtype=INNER)
    return logits


@triton.jit
def largest_kernel(
    rows,
    columns,
    top,
    total,
    best,
    row_count,
    column_count,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
):
    """ROWS rows a program, tile by tile along the columns (an online softmax)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    highest = tl.full([ROWS], float("-inf"), INNER)
    sums = tl.zeros([ROWS], INNER)
    where = tl.zeros([ROWS], tl.int32)
    start = 0
    while start < column_count:
        column = start + tl.arange(0, COLUMNS)
        logits = _logits(
            rows, columns, row, column, row_count, column_count,
            WIDTH, ROWS, COLUMNS, CHANNELS, INNER,
        )  # fmt: skip
        logits = tl.where((column < column_count)[None, :], logits, float("-inf"))
        tile_top = tl.max(logits, 1)
        is_top = logits == tile_top[:, None]
        tile_where = tl.min(tl.where(is_top, column[None, :], column_count), 1)
        where = tl.where(tile_top > highest, tile_where, where)
        higher = tl.maximum(highest, tile_top)
        sums = sums * tl.exp(highest - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
        highest = higher
        start += COLUMNS
    here = row < row_count
    tl.store(top + row, highest, mask=here)
    tl.store(total + row, sums, mask=here)
    tl.store(best + row, where.to(tl.int64), mask=here)


@triton.jit
def softmax_kernel(
    rows,
    columns,
    row_max,
    row_grad,
    column_max,
    column_grad,
    out,
    row_count,
    column_count,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
):
    """One tile a program."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_column = row < row_count, column < column_count
    logits = _logits(
        rows, columns, row, column, row_count, column_count,
        WIDTH, ROWS, COLUMNS, CHANNELS, INNER,
    )  # fmt: skip
    by_row = tl.exp(logits - tl.load(row_max + row, mask=is_row, other=0.0)[:, None])
    by_column = tl.exp(logits - tl.load(column_max + column, mask=is_column, other=0.0)[None, :])
    grads = by_row * tl.load(row_grad + row, mask=is_row, other=0.0)[:, None]
    grads += by_column * tl.load(column_grad + column, mask=is_column, other=0.0)[None, :]
    place = row.to(tl.int64)[:, None] * column_count + column[None, :]
    tl.store(out + place, grads, mask=is_row[:, None] & is_column[None, :])


@triton.jit
def sigmoid_kernel(
    rows,
    columns,
    bias,
    out,
    sums,
    row_count,
    column_count,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
):
    """One tile a program; `sums` [2, tiles down, tiles across] are over it."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    logits = _logits(
        rows, columns, row, column, row_count, column_count,
        WIDTH, ROWS, COLUMNS, CHANNELS, INNER,
    )  # fmt: skip
    logits += tl.load(bias).to(INNER)
    small = tl.exp(-tl.abs(logits))
    sigmoid = tl.where(logits >= 0, 1.0, small) / (1.0 + small)
    softplus = tl.maximum(logits, 0.0) + _log1p(small)
    here = (row < row_count)[:, None] & (column < column_count)[None, :]
    place = row.to(tl.int64)[:, None] * column_count + column[None, :]
    tl.store(out + place, sigmoid, mask=here)
    tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(sums + tile, tl.sum(tl.sum(tl.where(here, softplus, 0.0), 1), 0))
    tiles = tl.num_programs(0) * tl.num_programs(1)
    tl.store(sums + tiles + tile, tl.sum(tl.sum(tl.where(here, sigmoid, 0.0), 1), 0))


@triton.jit
def _log1p(small):
    """log(1 + x) for x in 0..1, to fp32's precision also where x is tiny.

    2 artanh(x / (2 + x)); the argument is at most 1/3, so nine terms of the series do. A GPU's
    fast logarithm of 1 + x has an absolute error, and most logits of SigLIP's start are at -10.
    """
    ratio = small / (2.0 + small)
    square = ratio * ratio
    series = 1.0 / 17
    series = series * square + 1.0 / 15
    series = series * square + 1.0 / 13
    series = series * square + 1.0 / 11
    series = series * square + 1.0 / 9
    series = series * square + 1.0 / 7
    series = series * square + 1.0 / 5
    series = series * square + 1.0 / 3
    series = series * square + 1.0
    return 2.0 * ratio * series
