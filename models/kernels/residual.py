"""A branch scaled (LayerScale), kept or dropped by sample, added to the residual stream, and the
sum normalised for the next branch: one read and one write of the stream.

Letters: S tokens, B batch, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlfoundry.models.kernels.rows import block_of, deal, inner_dtype, inner_type


def scaled_residual(
    x: Tensor,
    bias: Tensor | None,
    scale: Tensor,
    factor: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None = None,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """residual + scale * factor * (x + bias), and its RMSNorm.

    Args:
        x: what the branch returned [S, B, D].
        bias: [D] still to add to it; None: none.
        scale: [D], LayerScale.
        factor: [B] of each sample (0 where its branch is dropped); None: 1.
        residual: [S, B, D].
        norm_weight: [D] of the norm that follows; None: none does.
        eps: of the norm.

    Returns:
        The new residual stream, and it normalised or None; both [S, B, D].
    """
    return _ScaledResidual.apply(x, bias, scale, factor, residual, norm_weight, eps)


class _ScaledResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Any, bias: Any, scale: Any, factor: Any, residual: Any, norm_weight: Any, eps: Any
    ):
        x, residual = x.contiguous(), residual.contiguous()
        width, batch = x.shape[-1], x.shape[-2]
        rows = x.numel() // width
        out = torch.empty_like(residual)
        normed = reciprocal = None
        if norm_weight is not None:
            normed = torch.empty_like(out)
            reciprocal = out.new_empty(rows, dtype=inner_dtype(out))
        forward_kernel[(rows,)](
            x, bias, scale, factor, residual, norm_weight, out, normed, reciprocal,
            batch, eps, WIDTH=width, INNER=inner_type(x), **block_of(width),
        )  # fmt: skip
        ctx.save_for_backward(
            x, bias, scale, factor, norm_weight, None if normed is None else out, reciprocal
        )
        return out, normed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Any, grad_normed: Any):
        x, bias, scale, factor, norm_weight, out, reciprocal = ctx.saved_tensors
        width, batch = x.shape[-1], x.shape[-2]
        rows = x.numel() // width
        programs, each = deal(rows)

        def sums(of: Tensor | None) -> Tensor | None:
            return None if of is None else x.new_empty(programs, width, dtype=inner_dtype(x))

        grad_x, grad_out = torch.empty_like(x), grad_out.contiguous()
        grad_residual = grad_out if out is None else torch.empty_like(out)
        parts = sums(bias), sums(scale), sums(norm_weight)
        backward_kernel[(programs,)](
            grad_out, None if out is None else grad_normed.contiguous(),
            x, bias, scale, factor, norm_weight, out, reciprocal,
            grad_x, None if out is None else grad_residual, *parts,
            rows, batch, each, WIDTH=width, INNER=inner_type(x), **block_of(width),
        )  # fmt: skip
        grad_bias, grad_scale, grad_weight = (
            None if part is None else part.sum(0).to(of.dtype)
            for part, of in zip(parts, (bias, scale, norm_weight), strict=True)
        )
        return grad_x, grad_bias, grad_scale, None, grad_residual, grad_weight, None


@triton.jit
def forward_kernel(
    x,
    bias,
    scale,
    factor,
    residual,
    norm_weight,
    out,
    normed,
    reciprocal,
    batch,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
):
    """One row a program. `reciprocal` [S * B] of the root mean square is for the backward pass."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    here = column < WIDTH
    place = row * WIDTH + column
    branch = tl.load(x + place, mask=here, other=0.0).to(INNER)
    if bias is not None:
        branch += tl.load(bias + column, mask=here, other=0.0).to(INNER)
    if factor is not None:
        branch *= tl.load(factor + row % batch).to(INNER)
    total = tl.load(residual + place, mask=here, other=0.0).to(INNER)
    total += branch * tl.load(scale + column, mask=here, other=0.0).to(INNER)
    rounded = total.to(out.dtype.element_ty)
    tl.store(out + place, rounded, mask=here)
    if norm_weight is not None:
        # Of the rounded sum: that is what the backward pass, and everybody else, reads.
        total = rounded.to(INNER)
        scaled = tl.rsqrt(tl.sum(total * total, 0) / WIDTH + eps)
        unit = (total * scaled).to(normed.dtype.element_ty).to(INNER)
        weight = tl.load(norm_weight + column, mask=here, other=0.0).to(INNER)
        tl.store(normed + place, unit * weight, mask=here)
        tl.store(reciprocal + row, scaled)


@triton.jit
def backward_kernel(
    grad_out,
    grad_normed,
    x,
    bias,
    scale,
    factor,
    norm_weight,
    out,
    reciprocal,
    grad_x,
    grad_residual,
    grad_bias,
    grad_scale,
    grad_weight,
    rows,
    batch,
    each,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
):
    """`each` rows a program; `grad_bias`, `grad_scale` and `grad_weight` [programs, D] are sums
    over them."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    here = column < WIDTH
    layer_scale = tl.load(scale + column, mask=here, other=0.0).to(INNER)
    scale_sum = tl.zeros([BLOCK], INNER)
    if bias is not None:
        shift = tl.load(bias + column, mask=here, other=0.0).to(INNER)
        bias_sum = tl.zeros([BLOCK], INNER)
    if norm_weight is not None:
        weight = tl.load(norm_weight + column, mask=here, other=0.0).to(INNER)
        weight_sum = tl.zeros([BLOCK], INNER)
    row, end = program * each, tl.minimum(program * each + each, rows)
    while row < end:
        place = row * WIDTH + column
        grad = tl.load(grad_out + place, mask=here, other=0.0).to(INNER)
        if norm_weight is not None:
            scaled = tl.load(reciprocal + row).to(INNER)
            unit = tl.load(out + place, mask=here, other=0.0).to(INNER) * scaled
            normed_grad = tl.load(grad_normed + place, mask=here, other=0.0).to(INNER)
            weight_sum += normed_grad * unit.to(out.dtype.element_ty).to(INNER)
            unit_grad = normed_grad * weight
            mean = tl.sum(unit_grad * unit, 0) / WIDTH
            grad += (unit_grad - unit * mean) * scaled
            tl.store(grad_residual + place, grad, mask=here)
        if factor is not None:
            grad *= tl.load(factor + row % batch).to(INNER)
        branch = tl.load(x + place, mask=here, other=0.0).to(INNER)
        if bias is not None:
            branch += shift
            bias_sum += grad * layer_scale
        scale_sum += grad * branch
        tl.store(grad_x + place, grad * layer_scale, mask=here)
        row += 1
    sums = program * WIDTH + column
    tl.store(grad_scale + sums, scale_sum, mask=here)
    if bias is not None:
        tl.store(grad_bias + sums, bias_sum, mask=here)
    if norm_weight is not None:
        tl.store(grad_weight + sums, weight_sum, mask=here)
