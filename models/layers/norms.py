"""Normalisations.

Letters: S tokens, B batch, N heads, H head size, D width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vlfoundry.models import kernels
from vlfoundry.models.layers.canonical import relax_padding
from vlfoundry.models.layers.megatron import (
    TransformerConfig,
    copy_to_tensor_model_parallel_region,
    make_sharded_tensors_for_checkpoint,
    reduce_from_tensor_model_parallel_region,
)
from vlfoundry.models.layers.parallel import Part, checkpoint_metadata, head_size, mark
from vlfoundry.models.layers.precision import wide

NormKind = Literal["rms", "layer"]


class _RMSNormFunction(torch.autograd.Function):
    """RMSNorm of fp32 rows in few passes; PyTorch has no fused one for the CPU."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = _reciprocal_rms(x, eps)
        ctx.save_for_backward(x, weight, scale)
        return torch.mul(x, scale).mul_(weight)

    @staticmethod
    # pyrefly: ignore[bad-override]  # PyTorch's stub takes any number of gradients
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        unit = x * scale
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * unit).flatten(0, -2).sum(0)
        if not ctx.needs_input_grad[0]:
            return None, grad_weight, None
        grad_unit = grad * weight
        dot = torch.linalg.vecdot(grad_unit, unit).div_(x.shape[-1]).unsqueeze(-1)
        grad_x = grad_unit.addcmul_(unit, dot, value=-1).mul_(scale)
        return grad_x, grad_weight, None


def _reciprocal_rms(x: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.rsqrt(norm.square_().div_(x.shape[-1]).add_(eps))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis: computed in fp32 or finer, cast back, then times the weight."""
    if kernels.use_kernels(x):
        from vlfoundry.models.kernels.norms import rms_norm as fused

        return fused(x, weight, eps)
    if x.dtype == torch.float32 and weight.dtype == torch.float32:
        if torch.is_grad_enabled():
            return _RMSNormFunction.apply(x, weight, eps)
        return torch.mul(x, _reciprocal_rms(x, eps)).mul_(weight)
    exact = wide(x)
    unit = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    return unit.to(x.dtype) * weight


class RMSNorm(Part):
    """RMSNorm with a weight and no bias; aware of sequence parallelism, as Megatron needs."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_):
        super().__init__(config)
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        mark(self.weight, sequence_parallel=config.sequence_parallel)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(Part):
    """LayerNorm with weight and bias; aware of sequence parallelism, as Megatron needs."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_):
        super().__init__(config)
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        for parameter in (self.weight, self.bias):
            mark(parameter, sequence_parallel=config.sequence_parallel)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(
            x, self.weight.shape, self.weight, self.bias, self.eps
        )


class _Lent:
    """The vectors of a norm that the linear behind it computes: what comes in goes on as it is.

    So weights have the same names and the same place whether a norm is computed here or there.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x


class SharedInputRMSNorm(_Lent, RMSNorm):
    """RMSNorm's weight, lent to the linear behind it."""


class LentLayerNorm(_Lent, LayerNorm):
    """LayerNorm's weight and bias, lent to the linear behind it."""


class FullWidthQKRMSNorm(Part):
    """RMSNorm of queries (or keys) over all heads at once, whatever the tensor parallelism.

    The weight is cut by heads over the tensor ranks. Heads that were added as padding are exactly
    zero, so they add nothing to the sum of squares, and the mean divides by the true width.
    """

    def __init__(self, config: TransformerConfig, true_width: int):
        super().__init__(config)
        self.eps = config.layernorm_epsilon
        self.true_width = true_width
        local_width = config.num_attention_heads * head_size(config) // self.tp_group.size()
        self.weight = torch.nn.Parameter(torch.ones(local_width, dtype=config.params_dtype))
        mark(self.weight, tensor_model_parallel=True, partition_dim=0, partition_stride=1)

    def forward(self, x: Tensor) -> Tensor:
        """x [S, B, N, H], this rank's heads."""
        flat = x.reshape(*x.shape[:2], -1)
        if self.tp_group.size() == 1:
            return rms_norm(flat, self.weight, self.eps).view(x.shape)
        exact = wide(flat)
        squares = exact.square().sum(-1, keepdim=True)
        # Summed over ranks forwards, and its gradient backwards: a plain all-gather here leaves
        # the other ranks' gradients out, silently.
        squares = reduce_from_tensor_model_parallel_region(squares, group=self.tp_group)
        squares = copy_to_tensor_model_parallel_region(squares, group=self.tp_group)
        unit = exact * torch.rsqrt(squares / self.true_width + self.eps)
        return (unit.to(x.dtype) * self.weight).view(x.shape)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ):
        sharded = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=checkpoint_metadata(metadata)["dp_cp_group"],
        )
        return relax_padding(sharded, {f"{prefix}weight": self.weight})


class HeadRMSNorm(RMSNorm):
    """RMSNorm of each head by itself, with one weight [H] that all heads share (Qwen3).

    Each tensor rank has some of the heads, so the weight's gradient is summed over them here:
    Megatron would do so by the parameter's name, and only if a flag is set.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__(config, head_size(config), config.layernorm_epsilon)
        mark(self.weight, sequence_parallel=False)  # summed already

    def forward(self, x: Tensor) -> Tensor:
        """x [S, B, N, H], this rank's heads."""
        weight = self.weight
        if self.tp_group.size() > 1:
            weight = copy_to_tensor_model_parallel_region(weight, group=self.tp_group)
        return rms_norm(x, weight, self.eps)


def query_key_norm(
    query: Tensor, key: Tensor, query_norm: FullWidthQKRMSNorm, key_norm: FullWidthQKRMSNorm
) -> tuple[Tensor, Tensor]:
    """Both norms of [S, B, N, H] by one kernel, and their sums over tensor ranks in one call."""
    from vlfoundry.models.kernels.norms import query_key_norm as fused

    group = query_norm.tp_group
    return fused(
        query, key, query_norm.weight, key_norm.weight, query_norm.eps,
        true_width=query_norm.true_width, group=group if group.size() > 1 else None,
    )  # fmt: skip


def shared_norm(kind: NormKind) -> type[SharedInputRMSNorm] | type[LentLayerNorm]:
    """The class that holds the vectors of a norm which the linear behind it computes."""
    return {"rms": SharedInputRMSNorm, "layer": LentLayerNorm}[kind]
