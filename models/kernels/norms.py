"""RMSNorm of rows, and of queries and keys over all of their heads in one launch.

Under tensor parallelism a rank holds some of a row's heads. The sum of a row's squares (and in the
backward pass the dot product that takes its place) is then a sum over ranks, between two launches.

Letters: S tokens, B batch, N heads of this rank, H head size, R rows (S * B).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlfoundry.models.kernels.rows import block_of, deal, inner_dtype, inner_type


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis, as `models.layers.norms.rms_norm`."""
    rows = x.reshape(-1, 1, 1, x.shape[-1])
    return _RMSNorm.apply(eps, x.shape[-1], None, rows, weight)[0].view(x.shape)


def query_key_norm(
    query: Tensor,
    key: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    eps: float,
    *,
    true_width: int,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """RMSNorm of each over all heads of all ranks.

    Args:
        query, key: [S, B, N, H], in any order in memory but for H.
        query_weight, key_weight: [N * H].
        eps: of both.
        true_width: channels that count, over all ranks; the others are zero.
        group: ranks that share the heads; None: this one has all.

    Returns:
        Both, contiguous [S, B, N, H].
    """
    return _RMSNorm.apply(eps, true_width, group, query, key, query_weight, key_weight)


class _RMSNorm(torch.autograd.Function):
    """Of one or two tensors [S, B, N, H], followed by as many weights [N * H]."""

    @staticmethod
    def forward(ctx, eps: Any, true_width: Any, group: Any, *given):
        count = len(given) // 2
        tensors, weights = _alike(given[:count]), given[count:]
        first = tensors[0]
        rows = first.shape[0] * first.shape[1]
        options = _options(first)
        reciprocal = first.new_empty(count, rows, dtype=inner_dtype(first))
        outs = [first.new_empty(first.shape) for _ in tensors]
        squares = None
        if group is not None:
            squares = torch.empty_like(reciprocal)
            squares_kernel[(rows, count)](
                *_pair(tensors), squares, rows, first.shape[1], *_steps(first), **options
            )
            dist.all_reduce(squares, group=group)
        forward_kernel[(rows, count)](
            *_pair(tensors), *_pair(weights), squares, *_pair(outs), reciprocal,
            rows, first.shape[1], *_steps(first), eps, true_width, **options,
        )  # fmt: skip
        ctx.save_for_backward(reciprocal, *tensors, *weights)
        ctx.true_width, ctx.group = true_width, group
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        reciprocal, *saved = ctx.saved_tensors
        count = len(grads)
        tensors, weights, grads = saved[:count], saved[count:], _alike(grads)
        first = tensors[0]
        rows = first.shape[0] * first.shape[1]
        options = _options(first)
        strides = *_steps(first), *_steps(grads[0])
        dots = None
        if ctx.group is not None:
            dots = torch.empty_like(reciprocal)
            dots_kernel[(rows, count)](
                *_pair(tensors), *_pair(weights), *_pair(grads), reciprocal, dots,
                rows, first.shape[1], *strides, **options,
            )  # fmt: skip
            dist.all_reduce(dots, group=ctx.group)
        programs, each = deal(rows)
        outs = [first.new_empty(first.shape) for _ in tensors]
        sums = reciprocal.new_empty(count, programs, options["WIDTH"])
        backward_kernel[(programs, count)](
            *_pair(tensors), *_pair(weights), *_pair(grads), reciprocal, dots, *_pair(outs), sums,
            rows, first.shape[1], each, *strides, ctx.true_width, **options,
        )  # fmt: skip
        return None, None, None, *outs, *sums.sum(1).to(weights[0].dtype).unbind(0)


def _alike(tensors: Any) -> list[Tensor]:
    """The same, with unit steps along H and the same strides."""
    strides = {tensor.stride() for tensor in tensors}
    if len(strides) == 1 and tensors[0].stride(-1) == 1:
        return list(tensors)
    return [tensor.contiguous() for tensor in tensors]


def _pair(tensors: Any) -> tuple[Tensor, Tensor]:
    """Of one tensor the kernels get two, and never look at the second."""
    return tensors[0], tensors[-1]


def _steps(tensor: Tensor) -> tuple[int, int, int]:
    """How far it is to the next token, sample and head."""
    token, sample, head, _ = tensor.stride()
    return token, sample, head


def _options(tensor: Tensor) -> dict:
    width = tensor.shape[2] * tensor.shape[3]
    return {
        "WIDTH": width,
        "HEAD": tensor.shape[3],
        "INNER": inner_type(tensor),
        **block_of(width),
    }


@triton.jit
def _place(
    row,
    batch,
    token_step,
    sample_step,
    head_step,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Where the columns of a row lie in a tensor [S, B, N, H]."""
    column = tl.arange(0, BLOCK)
    start = (row // batch) * token_step + (row % batch) * sample_step
    return start + (column // HEAD) * head_step + column % HEAD


@triton.jit
def squares_kernel(
    query,
    key,
    squares,
    rows,
    batch,
    token_step,
    sample_step,
    head_step,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
):
    """Sum of a row's squares: `squares` [2, R]."""
    row, side = tl.program_id(0).to(tl.int64), tl.program_id(1)
    here = tl.arange(0, BLOCK) < WIDTH
    place = _place(row, batch, token_step, sample_step, head_step, HEAD, BLOCK)
    if side == 0:
        x = tl.load(query + place, mask=here, other=0.0).to(INNER)
    else:
        x = tl.load(key + place, mask=here, other=0.0).to(INNER)
    tl.store(squares + side * rows + row, tl.sum(x * x, 0))


@triton.jit
def forward_kernel(
    query,
    key,
    query_weight,
    key_weight,
    squares,
    query_out,
    key_out,
    reciprocal,
    rows,
    batch,
    token_step,
    sample_step,
    head_step,
    eps,
    true_width,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
):
    """One row of one side a program. `squares` are given where they are a sum over ranks."""
    row, side = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    here = column < WIDTH
    place = _place(row, batch, token_step, sample_step, head_step, HEAD, BLOCK)
    if side == 0:
        x = tl.load(query + place, mask=here, other=0.0).to(INNER)
        weight = tl.load(query_weight + column, mask=here, other=0.0).to(INNER)
    else:
        x = tl.load(key + place, mask=here, other=0.0).to(INNER)
        weight = tl.load(key_weight + column, mask=here, other=0.0).to(INNER)
    if squares is None:
        total = tl.sum(x * x, 0)
    else:
        total = tl.load(squares + side * rows + row)
    scaled = tl.rsqrt(total / true_width + eps)
    tl.store(reciprocal + side * rows + row, scaled)
    normed = (x * scaled).to(query_out.dtype.element_ty).to(INNER) * weight
    if side == 0:
        tl.store(query_out + row * WIDTH + column, normed, mask=here)
    else:
        tl.store(key_out + row * WIDTH + column, normed, mask=here)


@triton.jit
def dots_kernel(
    query,
    key,
    query_weight,
    key_weight,
    query_grad,
    key_grad,
    reciprocal,
    dots,
    rows,
    batch,
    token_step,
    sample_step,
    head_step,
    grad_token_step,
    grad_sample_step,
    grad_head_step,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
):
    """Dot product of a normalised row (before its weight) and its gradient: `dots` [2, R]."""
    row, side = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    here = column < WIDTH
    place = _place(row, batch, token_step, sample_step, head_step, HEAD, BLOCK)
    grad_place = _place(row, batch, grad_token_step, grad_sample_step, grad_head_step, HEAD, BLOCK)
    if side == 0:
        x = tl.load(query + place, mask=here, other=0.0).to(INNER)
        weight = tl.load(query_weight + column, mask=here, other=0.0).to(INNER)
        grad = tl.load(query_grad + grad_place, mask=here, other=0.0).to(INNER)
    else:
        x = tl.load(key + place, mask=here, other=0.0).to(INNER)
        weight = tl.load(key_weight + column, mask=here, other=0.0).to(INNER)
        grad = tl.load(key_grad + grad_place, mask=here, other=0.0).to(INNER)
    scaled = tl.load(reciprocal + side * rows + row)
    tl.store(dots + side * rows + row, tl.sum(grad * weight * x, 0) * scaled)


@triton.jit
def backward_kernel(
    query,
    key,
    query_weight,
    key_weight,
    query_grad,
    key_grad,
    reciprocal,
    dots,
    query_out,
    key_out,
    weight_sums,
    rows,
    batch,
    each,
    token_step,
    sample_step,
    head_step,
    grad_token_step,
    grad_sample_step,
    grad_head_step,
    true_width,
    WIDTH: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
):
    """`each` rows of one side a program; `weight_sums` [2, programs, N * H] are over them."""
    program, side = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK)
    here = column < WIDTH
    if side == 0:
        weight = tl.load(query_weight + column, mask=here, other=0.0).to(INNER)
    else:
        weight = tl.load(key_weight + column, mask=here, other=0.0).to(INNER)
    weight_sum = tl.zeros([BLOCK], INNER)
    row, end = program * each, tl.minimum(program * each + each, rows)
    while row < end:
        place = _place(row, batch, token_step, sample_step, head_step, HEAD, BLOCK)
        grad_place = _place(
            row, batch, grad_token_step, grad_sample_step, grad_head_step, HEAD, BLOCK
        )
        if side == 0:
            x = tl.load(query + place, mask=here, other=0.0).to(INNER)
            grad = tl.load(query_grad + grad_place, mask=here, other=0.0).to(INNER)
        else:
            x = tl.load(key + place, mask=here, other=0.0).to(INNER)
            grad = tl.load(key_grad + grad_place, mask=here, other=0.0).to(INNER)
        scaled = tl.load(reciprocal + side * rows + row)
        unit = x * scaled
        weight_sum += grad * unit.to(query.dtype.element_ty).to(INNER)
        grad *= weight
        if dots is None:
            dot = tl.sum(grad * unit, 0)
        else:
            dot = tl.load(dots + side * rows + row)
        grad = (grad - unit * (dot / true_width)) * scaled
        if side == 0:
            tl.store(query_out + row * WIDTH + column, grad, mask=here)
        else:
            tl.store(key_out + row * WIDTH + column, grad, mask=here)
        row += 1
    sums = (side * tl.num_programs(0) + program) * WIDTH + column
    tl.store(weight_sums + sums, weight_sum, mask=here)
