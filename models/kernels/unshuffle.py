"""Pixel shuffle (space to depth) and LayerNorm of what comes out, in one pass.

Letters: B images, T tokens, V width, M side of the square of tokens that becomes one, W the width
of that (V * M * M), R rows of the output, each a square.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlfoundry.models.kernels.rows import block_of, deal, inner_dtype, inner_type, parts_of

COLUMN_BLOCK = 1024
"""columns of the sums over rows that one program makes"""


def shuffled_norm(
    tokens: Tensor,
    grid: tuple[int, int],
    merge: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    swapped: bool,
) -> Tensor:
    """LayerNorm of `models.connector.model.pixel_shuffle`.

    Args:
        tokens: [B, T, V].
        grid: their rows and columns, which `merge` divides.
        merge: M.
        weight, bias: [W].
        eps: of the norm.
        swapped: whether rows and columns of the output are (version "v1").

    Returns:
        [B, T / M / M, W].
    """
    return _ShuffledNorm.apply(tokens, weight, bias, eps, grid, merge, swapped)


class _ShuffledNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, tokens: Any, weight: Any, bias: Any, eps: Any, grid: Any, merge: Any, swapped: Any
    ):
        if tokens.stride(-1) != 1:
            tokens = tokens.contiguous()
        images, count, width = tokens.shape
        out = tokens.new_empty(images, count // merge**2, width * merge**2)
        rows = images * out.shape[1]
        statistics = tokens.new_empty(2, rows, dtype=inner_dtype(tokens))
        ctx.shape = (grid, merge, swapped)
        forward_kernel[(rows,)](
            tokens, weight, bias, out, statistics, rows, eps,
            out.shape[1], *_steps(tokens, *ctx.shape),
            MERGE=merge, PIECE=width, INNER=inner_type(tokens), **block_of(out.shape[2]),
        )  # fmt: skip
        ctx.save_for_backward(tokens, weight, bias, statistics)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Any):
        tokens, weight, bias, statistics = ctx.saved_tensors
        merge, grad = ctx.shape[1], grad.contiguous()
        _, squares, whole = grad.shape
        rows, steps = statistics.shape[1], _steps(tokens, *ctx.shape)
        options = {"MERGE": merge, "PIECE": tokens.shape[2], "INNER": inner_type(tokens)}
        out = tokens.new_empty(tokens.shape)
        backward_kernel[(rows,)](
            tokens, weight, grad, statistics, out, rows,
            squares, *steps, *_steps(out, *ctx.shape)[1:], **options, **block_of(whole),
        )  # fmt: skip
        programs, each = deal(rows)
        sums = statistics.new_empty(2, programs, whole)
        sums_kernel[(programs, parts_of(whole, COLUMN_BLOCK))](
            tokens, grad, statistics, sums, rows, each, squares, *steps,
            **options, BLOCK=COLUMN_BLOCK, num_warps=4,
        )  # fmt: skip
        grad_weight, grad_bias = sums.sum(1)
        return out, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), None, None, None, None


def _steps(tokens: Tensor, grid: tuple[int, int], merge: int, swapped: bool) -> tuple[int, ...]:
    """How to find an output row's tokens: squares along the inner axis of the output's grid, then
    how far in memory it is to the next image, to the next square along the outer and the inner
    axis, and to the next row and column of tokens."""
    image, column = tokens.stride(0), tokens.stride(1)
    row = grid[1] * column
    if swapped:
        return grid[0] // merge, image, merge * column, merge * row, row, column
    return grid[1] // merge, image, merge * row, merge * column, row, column


@triton.jit
def _place(
    out_row,
    column,
    squares,
    inner,
    image_step,
    outer_step,
    inner_step,
    row_step,
    column_step,
    MERGE: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Where the columns of an output row lie in the tokens; each image has `squares` such rows."""
    square = out_row % squares
    start = (out_row // squares) * image_step
    start += (square // inner) * outer_step + (square % inner) * inner_step
    piece = column // PIECE
    return start + (piece // MERGE) * row_step + (piece % MERGE) * column_step + column % PIECE


@triton.jit
def forward_kernel(
    tokens,
    weight,
    bias,
    out,
    statistics,
    rows,
    eps,
    squares,
    inner,
    image_step,
    outer_step,
    inner_step,
    row_step,
    column_step,
    MERGE: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
):
    """One row a program; `statistics` [2, R] are its mean and its reciprocal deviation."""
    WIDTH: tl.constexpr = PIECE * MERGE * MERGE
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    here = column < WIDTH
    place = _place(
        row, column, squares, inner, image_step, outer_step, inner_step, row_step, column_step,
        MERGE, PIECE,
    )  # fmt: skip
    x = tl.load(tokens + place, mask=here, other=0.0).to(INNER)
    mean = tl.sum(x, 0) / WIDTH
    centred = tl.where(here, x - mean, 0.0)
    scaled = tl.rsqrt(tl.sum(centred * centred, 0) / WIDTH + eps)
    tl.store(statistics + row, mean)
    tl.store(statistics + rows + row, scaled)
    normed = centred * scaled * tl.load(weight + column, mask=here, other=0.0).to(INNER)
    normed += tl.load(bias + column, mask=here, other=0.0).to(INNER)
    tl.store(out + row * WIDTH + column, normed, mask=here)


@triton.jit
def backward_kernel(
    tokens,
    weight,
    grad_out,
    statistics,
    grad_tokens,
    rows,
    squares,
    inner,
    image_step,
    outer_step,
    inner_step,
    row_step,
    column_step,
    grad_image_step,
    grad_outer_step,
    grad_inner_step,
    grad_row_step,
    grad_column_step,
    MERGE: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
):
    """The tokens' gradients, one output row a program: no token is in two of them."""
    WIDTH: tl.constexpr = PIECE * MERGE * MERGE
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    here = column < WIDTH
    place = _place(
        row, column, squares, inner, image_step, outer_step, inner_step, row_step, column_step,
        MERGE, PIECE,
    )  # fmt: skip
    mean, scaled = tl.load(statistics + row), tl.load(statistics + rows + row)
    x = tl.load(tokens + place, mask=here, other=0.0).to(INNER)
    unit = tl.where(here, (x - mean) * scaled, 0.0)
    grad = tl.load(grad_out + row * WIDTH + column, mask=here, other=0.0).to(INNER)
    grad *= tl.load(weight + column, mask=here, other=0.0).to(INNER)
    dot, shift = tl.sum(grad * unit, 0) / WIDTH, tl.sum(grad, 0) / WIDTH
    grad_place = _place(
        row, column, squares, inner, grad_image_step, grad_outer_step, grad_inner_step,
        grad_row_step, grad_column_step, MERGE, PIECE,
    )  # fmt: skip
    tl.store(grad_tokens + grad_place, (grad - shift - unit * dot) * scaled, mask=here)


@triton.jit
def sums_kernel(
    tokens,
    grad_out,
    statistics,
    sums,
    rows,
    each,
    squares,
    inner,
    image_step,
    outer_step,
    inner_step,
    row_step,
    column_step,
    MERGE: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
):
    """Gradients of weight and bias, `sums` [2, programs, W]: BLOCK columns of `each` rows."""
    WIDTH: tl.constexpr = PIECE * MERGE * MERGE
    program = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < WIDTH
    weight_sum, bias_sum = tl.zeros([BLOCK], INNER), tl.zeros([BLOCK], INNER)
    row, end = program * each, tl.minimum(program * each + each, rows)
    while row < end:
        place = _place(
            row, column, squares, inner, image_step, outer_step, inner_step, row_step, column_step,
            MERGE, PIECE,
        )  # fmt: skip
        mean, scaled = tl.load(statistics + row), tl.load(statistics + rows + row)
        x = tl.load(tokens + place, mask=here, other=0.0).to(INNER)
        grad = tl.load(grad_out + row * WIDTH + column, mask=here, other=0.0).to(INNER)
        weight_sum += grad * ((x - mean) * scaled)
        bias_sum += grad
        row += 1
    place = program * WIDTH + column
    tl.store(sums + place, weight_sum, mask=here)
    tl.store(sums + tl.num_programs(0) * WIDTH + place, bias_sum, mask=here)
