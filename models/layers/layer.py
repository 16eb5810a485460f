"""Transformer layers: what Megatron's lacks for InternViT and LLaMA, and how a stack is specified.

Letters: S tokens, B batch, D width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlfoundry.models import kernels
from vlfoundry.models.layers.config import LoraConfig
from vlfoundry.models.layers.megatron import (
    MLP,
    AttnMaskType,
    MLPSubmodules,
    ModuleSpec,
    SelfAttention,
    SelfAttentionSubmodules,
    TransformerConfig,
    TransformerLayer,
    TransformerLayerSubmodules,
)
from vlfoundry.models.layers.norms import (
    FullWidthQKRMSNorm,
    HeadRMSNorm,
    NormKind,
    RMSNorm,
    query_key_norm,
    shared_norm,
)
from vlfoundry.models.layers.parallel import mark
from vlfoundry.models.layers.specs import Maker, Parts


def _plain_residual(_training: bool, _fused: bool) -> Callable:
    """Megatron's "bias-dropout-add" without dropout."""
    return _add_residual


plain_residual: Any = _plain_residual  # Megatron takes a function here, and says a class


def _add_residual(
    x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, _dropout: Any
) -> Tensor:
    x, bias = x_with_bias
    return residual + (x if bias is None else x + bias)


class PlainLayer(TransformerLayer):
    """Megatron's layer, without its switching gradients on where they are switched off.

    A linear that computes the norm before it borrows the norm's vectors.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        handler: Callable = contextlib.nullcontext
        self.bias_dropout_add_exec_handler = handler  # pyrefly: ignore[bad-assignment]
        attention: Any = self.self_attention
        mlp: Any = self.mlp
        for norm, linear in (
            (self.input_layernorm, attention.linear_qkv),
            (self.pre_mlp_layernorm, mlp.linear_fc1),
        ):
            if hasattr(linear, "fuse_norm"):
                linear.fuse_norm(norm)


class ScaledLayer(PlainLayer):
    """Pre-norm layer whose branches are scaled by a vector (LayerScale) and dropped by sample.

    x + drop(ls1 * attention(norm1 x)); x + drop(ls2 * mlp(norm2 x)).

    Its `context` holds the numbers that decide what is dropped: uniform ones [B, layers, 2], or
    None where nothing is. They are an argument, and not drawn here, so that every layout (and a
    layer that is run again for its gradient) drops the same.
    """

    ls1: torch.nn.Parameter
    ls2: torch.nn.Parameter

    def __init__(self, config: TransformerConfig, *args, drop_paths: tuple[float, ...], **kwargs):
        super().__init__(config, *args, **kwargs)
        self.drop_path = drop_paths[self.layer_number - 1]
        for name in ("ls1", "ls2"):
            scale = torch.nn.Parameter(torch.ones(config.hidden_size, dtype=config.params_dtype))
            mark(scale, sequence_parallel=config.sequence_parallel)
            setattr(self, name, scale)
        self._draws: Tensor | None = None
        self._normed: Tensor | None = None
        self.self_attn_bda = partial(self._scaled_residual, 0)
        self.mlp_bda = partial(self._scaled_residual, 1)

    def forward(self, hidden_states: Tensor, *args, context: Tensor | None = None, **kwargs):
        self._draws = None if context is None else context[:, self.layer_number - 1]
        hidden, _ = super().forward(hidden_states, *args, **kwargs)
        return hidden, context

    def _scaled_residual(self, branch: int, training: bool, _fused: bool) -> Callable:
        scale, factor = (self.ls1, self.ls2)[branch], None
        if self._draws is not None and training and self.drop_path:
            keep = 1.0 - self.drop_path
            factor = (self._draws[:, branch] < keep) / keep  # [B]

        def add(x_with_bias: Any, residual: Any, _dropout: Any):
            x, bias = x_with_bias
            if kernels.use_kernels(x):
                return self._fused_residual(branch, x, bias, scale, factor, residual)
            x = x if bias is None else x + bias
            if factor is not None:
                x = x * factor.to(x.dtype)[None, :, None]
            return torch.addcmul(residual, x, scale)

        return add

    def _fused_residual(
        self,
        branch: int,
        x: Tensor,
        bias: Tensor | None,
        scale: Tensor,
        factor: Tensor | None,
        residual: Tensor,
    ) -> Tensor:
        """With the norm before the MLP, where it is one that the kernel knows."""
        from vlfoundry.models.kernels.residual import scaled_residual

        norm = self.pre_mlp_layernorm
        if branch != 0 or type(norm) is not RMSNorm:  # a subclass may leave the norm to others
            return scaled_residual(x, bias, scale, factor, residual)[0]
        hidden, self._normed = scaled_residual(
            x, bias, scale, factor, residual, norm.weight, norm.eps
        )
        return hidden

    def _forward_pre_mlp_layernorm(self, hidden_states: Tensor) -> Tensor:
        normed, self._normed = self._normed, None
        return super()._forward_pre_mlp_layernorm(hidden_states) if normed is None else normed


class FullNormSelfAttention(SelfAttention):
    """Self-attention with q and k normalised over the full width.

    The norms are attached here and not through Megatron's spec with `qk_layernorm=True`: that
    flag sums every gradient whose name says q_layernorm or k_layernorm over the tensor ranks,
    which is wrong for weights that are cut over them.
    """

    def __init__(
        self, config: TransformerConfig, submodules: Any, *args, true_width: int, **kwargs
    ):
        super().__init__(config, submodules, *args, **kwargs)
        self.q_layernorm = FullWidthQKRMSNorm(config, true_width)
        self.k_layernorm = FullWidthQKRMSNorm(config, true_width)

    def get_query_key_value_tensors(self, hidden_states: Tensor, *args, **kwargs):
        if not kernels.use_kernels(hidden_states):
            return super().get_query_key_value_tensors(hidden_states, *args, **kwargs)
        unsplit = super().get_query_key_value_tensors(hidden_states, split_qkv=False)
        mixed, sizes = unsplit  # pyrefly: ignore[bad-unpacking]
        query, key, value = mixed.split(sizes, 3)
        norms: Any = (self.q_layernorm, self.k_layernorm)
        return *query_key_norm(query, key, *norms), value


class HeadNormSelfAttention(SelfAttention):
    """Self-attention with the q and k of each head normalised, before they are rotated.

    Attached here for the reason that `FullNormSelfAttention` gives.
    """

    def __init__(self, config: TransformerConfig, submodules: Any, *args, **kwargs):
        super().__init__(config, submodules, *args, **kwargs)
        self.q_layernorm = HeadRMSNorm(config)
        self.k_layernorm = HeadRMSNorm(config)


def layer_submodules(
    parts: Parts,
    *,
    norm: NormKind,
    causal: bool,
    qkv_bias: bool,
    lora: LoraConfig | None,
    full_norm_width: int | None = None,
    head_norms: bool = False,
    **others,
) -> TransformerLayerSubmodules:
    """Norm, attention, norm, MLP.

    Args:
        parts: the classes of a layer spec.
        norm: which one stands before attention and MLP.
        causal: whether a token sees no later ones.
        qkv_bias: whether q, k and v have a bias.
        lora: adapters; theirs is the normed input, so that a linear which has one stays apart
            from its norm.
        full_norm_width: asks for q/k norms over that many true channels.
        head_norms: asks for q/k norms of each head by itself.
        **others: add cross-attention.
    """
    adapted = lora.linears if lora else ()
    qkv_norm, qkv = _norm_and_linear(
        parts,
        norm,
        parts.column if qkv_bias else parts.unbiased_column,
        parts.norm_column if qkv_bias else parts.norm_unbiased_column,
        alone="qkv" in adapted,
    )
    fc1_norm, fc1 = _norm_and_linear(
        parts, norm, parts.column, parts.norm_column, alone="fc1" in adapted
    )
    return TransformerLayerSubmodules(
        input_layernorm=qkv_norm,
        self_attention=_self_attention(parts, qkv, causal, full_norm_width, head_norms),
        self_attn_bda=plain_residual,
        pre_mlp_layernorm=fc1_norm,
        mlp=partial(
            MLP.as_mlp_submodule,
            submodules=MLPSubmodules(linear_fc1=fc1, linear_fc2=parts.row),
        ),
        mlp_bda=plain_residual,
        **others,
    )


def _norm_and_linear(
    parts: Parts, norm: NormKind, linear: Maker, together: Maker | None, *, alone: bool
) -> tuple[Maker, Maker]:
    """Classes of a norm and of the linear behind it, `together` if there is such a one."""
    if together is None or alone:
        return parts.norms[norm], linear
    return shared_norm(norm), together


def _self_attention(
    parts: Parts,
    linear_qkv: Maker,
    causal: bool,
    full_norm_width: int | None,
    head_norms: bool,
) -> ModuleSpec:
    params: dict = {"attn_mask_type": AttnMaskType.causal if causal else AttnMaskType.no_mask}
    module = HeadNormSelfAttention if head_norms else SelfAttention
    if full_norm_width is not None:
        params["true_width"] = full_norm_width
        module = FullNormSelfAttention
    return ModuleSpec(
        module=module,
        params=params,
        submodules=SelfAttentionSubmodules(
            linear_qkv=linear_qkv, core_attention=parts.attention, linear_proj=parts.row
        ),
    )
