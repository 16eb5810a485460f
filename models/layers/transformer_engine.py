"""Transformer Engine's layers behind the names, shapes and checkpoints of our own.

Only imported where Transformer Engine is installed. Parameters are created on the CPU, filled by
name (`models.layers.canonical`) and moved with the model.

Letters: S tokens, B batch, N heads, G key/value heads, H head size, D width, T packed tokens.
"""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import transformer_engine.pytorch as te
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TEDotProductAttention,
    TELayerNormColumnParallelLinear,
    TERowParallelLinear,
)
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor, nn
from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

from vlfoundry.infra.backend.fp8_config import MULTIPLE, Fp8Config
from vlfoundry.infra.train.mfu import note_flops
from vlfoundry.models.fp8.formats import pad_tokens
from vlfoundry.models.fp8.products import Fp8Product
from vlfoundry.models.layers.attention import SDPAttention
from vlfoundry.models.layers.canonical import relax_padding
from vlfoundry.models.layers.megatron import AttnMaskType, TransformerConfig
from vlfoundry.models.layers.packing import is_packed
from vlfoundry.models.layers.parallel import checkpoint_metadata, process_groups
from vlfoundry.models.layers.specs import Parts

if TYPE_CHECKING:
    from vlfoundry.models.layers.lora import Lora

_ALLOW_PICKLE = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"


if TYPE_CHECKING:
    _Base: Any = object  # one of Transformer Engine's linears, as Megatron wraps them
else:
    _Base = object


class _Linear(_Base):
    """What our linears do beside Transformer Engine's: adapters, and tokens that FP8 can multiply.

    A bias is added within the matrix product, and none is returned to be added later. The extra
    state, which Megatron's own linears have as well and leave empty, holds the scales of FP8's
    delayed recipe.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **({"is_expert": False} | kwargs | {"skip_bias_add": False}))
        self.lora: Lora | None = None
        self.fp8_watch = _watch(self.config)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """[..., K] -> [..., N], and that no bias is left to add."""
        tokens = x.numel() // x.shape[-1]
        note_flops(lambda: self._flops(x, tokens))
        multiple = self._multiple()
        if tokens % multiple:
            flat, _ = super().forward(pad_tokens(x.flatten(0, -2), multiple))
            output = flat[:tokens].unflatten(0, x.shape[:-1])
        else:
            output, _ = super().forward(x)
        self._tell(x, output)
        return (output if self.lora is None else output + self.lora(x)), None

    def _tell(self, x: Tensor, output: Tensor) -> None:
        """Where a step is watched, what FP8 makes of the operands (`infra.train.fp8`)."""
        watch = self.fp8_watch
        if watch is None or watch.seen is None or not FP8GlobalStateManager.is_fp8_enabled():
            return

        def tell(role: str, matrix: Tensor) -> None:
            watch.quantise(role, pad_tokens(matrix.detach().flatten(0, -2), watch.multiple))

        if not isinstance(self, TeNormColumnLinear):  # whose input is normed inside
            tell("input", x)
        tell("weight", self.weight)
        if output.requires_grad:
            output.register_hook(partial(tell, "gradient"))

    def _flops(self, x: Tensor, tokens: int) -> int:
        """Of the output, and of the gradients of the input and the weight if there will be any."""
        if self.sequence_parallel and self.parallel_mode == "column":
            tokens *= self.tp_size
        backward = x.requires_grad + self.weight.requires_grad if torch.is_grad_enabled() else 0
        return 2 * tokens * self.weight.numel() * (1 + backward)

    def _multiple(self) -> int:
        """What the tokens must be a multiple of, now."""
        # Under sequence parallelism ranks' tokens are joined inside: `Stack` has padded them.
        if self.sequence_parallel or not FP8GlobalStateManager.is_fp8_enabled():
            return 1
        return MULTIPLE[self.config.fp8_recipe]

    def set_extra_state(self, state: Any) -> None:
        """Take over the scales of the delayed recipe.

        They are a pickle, which Transformer Engine loads only if it is told to trust it. Every
        file of a checkpoint is held against its checksum before (`infra.train.checkpoint`).
        """
        before = os.environ.get(_ALLOW_PICKLE)
        os.environ[_ALLOW_PICKLE] = "1"
        try:
            super().set_extra_state(state)
        finally:
            os.environ.pop(_ALLOW_PICKLE)
            if before is not None:
                os.environ[_ALLOW_PICKLE] = before

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ):
        metadata = checkpoint_metadata(metadata)
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        sharded = relax_padding(sharded, dict(self.named_parameters(prefix[:-1])))
        if self.lora is not None:
            sharded |= self.lora.sharded_state_dict(f"{prefix}lora.", sharded_offsets, metadata)
        return sharded


def _watch(config: TransformerConfig) -> Fp8Product | None:
    """Rounds as Transformer Engine does, but keeps nothing; delayed scales are taken for this
    step's own."""
    if not config.fp8:
        return None
    recipe = "blockwise" if config.fp8_recipe == "blockwise" else "tensorwise"
    return Fp8Product(Fp8Config(recipe=recipe))


class TeColumnLinear(_Linear, TEColumnParallelLinear):
    """Output features cut over the tensor ranks."""


class TeRowLinear(_Linear, TERowParallelLinear):
    """Input features cut over the tensor ranks."""


class TeNormColumnLinear(_Linear, TELayerNormColumnParallelLinear):
    """A norm and a column linear, in FP8 with one pass less over the tokens.

    The norm's vectors are another module's: `fuse_norm`.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for name in ("layer_norm_weight", "layer_norm_bias"):
            self._parameters.pop(name, None)

    def fuse_norm(self, norm: nn.Module) -> None:
        """Use the vectors of this norm, which stay its parameters and not ours."""
        self.__dict__["layer_norm_weight"] = norm.weight
        self.__dict__["layer_norm_bias"] = getattr(norm, "bias", None)


class TeUnbiasedColumnLinear(TeColumnLinear):
    """For q/k/v without a bias beside projections with one, which Megatron ties together."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **(kwargs | {"bias": False}))


class TeNormUnbiasedColumnLinear(TeNormColumnLinear):
    """The same behind a norm."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **(kwargs | {"bias": False}))


class TeRMSNorm(te.RMSNorm):
    """RMSNorm with a weight and no bias, where it stands alone."""

    # It has none: PyTorch then looks for nothing in a checkpoint.
    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6):
        super().__init__(hidden_size, eps=eps, **_norm_options(config))


class TeLayerNorm(te.LayerNorm):
    """LayerNorm with weight and bias, where it stands alone."""

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6):
        super().__init__(hidden_size, eps=eps, **_norm_options(config))


def _norm_options(config: TransformerConfig) -> dict[str, Any]:
    return {
        "sequence_parallel": config.sequence_parallel,
        "dtype": config.params_dtype,
        "device": "cpu",
    }


class _Fused(TEDotProductAttention):
    """Has no weights, and nothing else to put into a checkpoint."""

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state


class TeAttention(SDPAttention):
    """Transformer Engine's fused attention for the masks that it has kernels for.

    These are: nobody blocked, causal, and packed samples. The others go to PyTorch's: an additive
    or boolean mask (QLLaMA's tasks) is `arbitrary` to Transformer Engine, which then holds all
    S x S scores, where PyTorch's memory-efficient kernel holds none; a cache for decoding has
    shapes that change with every token, for each of which a kernel would be chosen anew; and a
    scalar number of real keys is one view shorter, which needs no mask at all.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int = 1,
        attn_mask_type: AttnMaskType = AttnMaskType.no_mask,
        attention_type: str = "self",
        softmax_scale: float | None = None,
        **_,
    ):
        super().__init__(config, layer_number, attn_mask_type, attention_type, softmax_scale)
        self.mask_type = attn_mask_type
        self.fused = _Fused(
            config,
            layer_number,
            attn_mask_type,
            attention_type,
            softmax_scale=softmax_scale,
            pg_collection=process_groups(),
        )

    def forward(
        self,
        query: Tensor,  # [S, B, N, H]
        key: Tensor,  # [T, B, G, H]
        value: Tensor,  # [T, B, G, H]
        attention_mask: Tensor | None = None,
        **_,
    ) -> Tensor:
        """Returns [S, B, N*H]."""
        mask = attention_mask
        if self.cache is not None or not (mask is None or is_packed(mask)):
            return super().forward(query, key, value, mask)
        if mask is None:
            note_flops(lambda: _flops(query, len(query) * len(key) * query.shape[1]))
            return self.fused(query, key, value, None, self.mask_type)
        note_flops(lambda: _flops(query, int(mask.diff().square().sum())))
        longest = int(mask.diff().max())
        places = mask.to(query.device)
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=places,
            cu_seqlens_kv=places,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
        one_row = (x.squeeze(1) for x in (query, key, value))  # [T, N or G, H]
        found = self.fused(*one_row, None, self.mask_type, packed_seq_params=packed)
        return found.reshape(len(query), 1, -1)


def _flops(query: Tensor, pairs: int) -> int:
    """Of attention between `pairs` pairs of tokens; backwards twice those forwards, as PyTorch
    counts."""
    forward = 4 * pairs * query.shape[-2] * query.shape[-1]
    return forward * (3 if query.requires_grad and torch.is_grad_enabled() else 1)


TE = Parts(
    column=TeColumnLinear,
    unbiased_column=TeUnbiasedColumnLinear,
    row=TeRowLinear,
    attention=TeAttention,
    norms={"rms": TeRMSNorm, "layer": TeLayerNorm},
    norm_column=TeNormColumnLinear,
    norm_unbiased_column=TeNormUnbiasedColumnLinear,
)
