"""What of Transformer Engine Megatron's wrappers build upon, in plain PyTorch and on any device.

Only for tests: with it Megatron's own classes (`megatron.core.extensions.transformer_engine`) and
ours behind them run on a CPU, so that names, cuts, wiring and numbers of the "te" layer spec can be
held against the local one. It keeps Transformer Engine's conventions (which parameters there are,
what is returned, extra state, what FP8 asks of shapes); in "FP8" it computes as always and notes
that it was asked to. `install` must come before Megatron is imported.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import pickle
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear, rms_norm, scaled_dot_product_attention

VERSION = "2.20.2"
MULTIPLE = 16


class Fp8State:
    """Stands for FP8GlobalStateManager."""

    recipe: Any = None

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls.recipe is not None


@contextlib.contextmanager
def autocast(enabled: bool = True, fp8_recipe: Any = None, fp8_group: Any = None) -> Iterator[None]:
    before, Fp8State.recipe = Fp8State.recipe, fp8_recipe if enabled else None
    try:
        yield
    finally:
        Fp8State.recipe = before


@dataclass
class Recipe:
    """What Megatron made of its options."""

    fp8_format: str = "HYBRID"
    fp8_dpa: bool = False


class DelayedScaling(Recipe):
    """The one with a state."""

    def __init__(self, amax_history_len: int, amax_compute_algo: str, fp8_format: str, **_):
        super().__init__(fp8_format)
        self.amax_history_len, self.amax_compute_algo = amax_history_len, amax_compute_algo


class CurrentScaling(Recipe):
    pass


class BlockScaling(Recipe):
    pass


class Linear(nn.Module):
    """Columns or rows of a matrix, with the communication around it."""

    def __init__(
        self, in_features: int, out_features: int, *, sequence_parallel: bool, tp_group,
        tp_size: int, init_method, bias: bool, return_bias: bool, parallel_mode: str,
        params_dtype, device, **_,
    ):  # fmt: skip
        super().__init__()
        self.tp_group, self.tp_size, self.parallel_mode = tp_group, tp_size, parallel_mode
        self.sequence_parallel = sequence_parallel and tp_size > 1
        self.return_bias, self.use_bias = return_bias, bias
        if parallel_mode == "column":
            out_features //= tp_size
        else:
            in_features //= tp_size
        self.in_features, self.out_features = in_features, out_features
        make = {"dtype": params_dtype, "device": device}
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **make))
        self.bias = nn.Parameter(torch.zeros(out_features, **make)) if bias else torch.empty(0)
        self.weight.tensor_model_parallel = True
        self.weight.partition_dim = int(parallel_mode == "row")
        self.weight.partition_stride = 1
        init_method(self.weight)
        self.save_original_input = False
        self.fp8_history: Tensor | None = None
        self.loaded: Tensor | None = None
        """what a checkpoint held of it"""
        self.seen: list[tuple[int, str | None]] = []
        """tokens and recipe of every call"""

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None):
        from megatron.core.tensor_parallel import mappings

        self._note(x)
        group = self.tp_group
        if self.tp_size > 1 and self.parallel_mode == "column":
            gather = mappings.gather_from_sequence_parallel_region
            copy = mappings.copy_to_tensor_model_parallel_region
            x = (gather if self.sequence_parallel else copy)(x, group=group)
        out = linear(x, self.weight)
        if self.tp_size > 1 and self.parallel_mode == "row":
            scatter = mappings.reduce_scatter_to_sequence_parallel_region
            add = mappings.reduce_from_tensor_model_parallel_region
            out = (scatter if self.sequence_parallel else add)(out, group=group)
        if self.return_bias:
            return out, self.bias
        return out + self.bias if self.use_bias else out

    def _note(self, x: Tensor) -> None:
        tokens, recipe = x.numel() // x.shape[-1], Fp8State.recipe
        self.seen.append((tokens, type(recipe).__name__ if recipe else None))
        if recipe is not None:
            assert tokens % MULTIPLE == 0, f"{tokens} tokens: caller must pad"
        if isinstance(recipe, DelayedScaling):
            if self.fp8_history is None:
                self.fp8_history = torch.zeros(recipe.amax_history_len)
            self.fp8_history[0] = x.detach().abs().max()

    def get_extra_state(self) -> Tensor:
        if self.fp8_history is None:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(bytearray(pickle.dumps(self.fp8_history)), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        import os

        if state is None or not state.numel():
            return
        if os.environ.get("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE") != "1":
            raise RuntimeError("refusing to load pickled extra state")
        self.loaded = pickle.loads(state.numpy().tobytes())


class LayerNormLinear(Linear):
    """A norm of its own, then the columns of a matrix."""

    def __init__(
        self, in_features: int, out_features: int, *, eps: float, normalization: str, **kw
    ):
        super().__init__(in_features, out_features, **kw)
        self.eps, self.normalization = eps, normalization
        make = {"dtype": kw["params_dtype"], "device": kw["device"]}
        self.layer_norm_weight = nn.Parameter(torch.ones(in_features, **make))
        self.layer_norm_bias = None
        if normalization != "RMSNorm":
            self.layer_norm_bias = nn.Parameter(torch.zeros(in_features, **make))

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None):
        if self.normalization == "RMSNorm":
            normed = rms_norm(x, (x.shape[-1],), self.layer_norm_weight, self.eps)
        else:
            vectors = self.layer_norm_weight, self.layer_norm_bias
            normed = layer_norm(x, (x.shape[-1],), *vectors, eps=self.eps)
        return super().forward(normed, is_first_microbatch)


class _Norm(nn.Module):
    def __init__(
        self, normalized_shape: int, *, eps: float, sequence_parallel: bool, dtype=None,
        device=None, **_,
    ):  # fmt: skip
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(normalized_shape, dtype=dtype, device=device))
        self.weight.sequence_parallel = sequence_parallel

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        pass


class RMSNorm(_Norm):
    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.shape, self.weight, self.eps)


class LayerNorm(_Norm):
    def __init__(self, normalized_shape: int, *, dtype=None, device=None, **kw):
        super().__init__(normalized_shape, dtype=dtype, device=device, **kw)
        self.bias = nn.Parameter(torch.zeros(normalized_shape, dtype=dtype, device=device))
        self.bias.sequence_parallel = kw["sequence_parallel"]

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class DotProductAttention(nn.Module):
    """sbhd without a mask or causal, and thd."""

    def __init__(
        self, num_attention_heads: int, kv_channels: int, *, num_gqa_groups: int,
        attn_mask_type: str, tp_size: int = 1, softmax_scale: float | None = None, **_,
    ):  # fmt: skip
        super().__init__()
        self.heads, self.groups = num_attention_heads // tp_size, num_gqa_groups // tp_size
        self.scale = softmax_scale
        self.seen: list[str] = []
        """mask type of every call"""

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        pass

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask=None, *,
        attn_mask_type: str, qkv_format: str = "sbhd", cu_seqlens_q: Tensor | None = None,
        max_seqlen_q: int | None = None, **_,
    ) -> Tensor:  # fmt: skip
        assert attention_mask is None
        assert (query.shape[-2], key.shape[-2]) == (self.heads, self.groups)
        self.seen.append(attn_mask_type)
        causal = "causal" in attn_mask_type
        if qkv_format == "sbhd":
            return self._attend(query, key, value, causal).flatten(-2)
        assert attn_mask_type.startswith("padding")
        assert cu_seqlens_q.dtype == torch.int32
        sizes = cu_seqlens_q.diff().tolist()
        assert max(sizes) == max_seqlen_q
        parts = zip(*(x[:, None].split(sizes) for x in (query, key, value)), strict=True)
        return torch.cat([self._attend(*part, causal) for part in parts])[:, 0].flatten(-2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
        key, value = (x.repeat_interleave(self.heads // self.groups, -2) for x in (key, value))
        heads_first = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = scaled_dot_product_attention(*heads_first, is_causal=causal, scale=self.scale)
        return out.permute(2, 0, 1, 3)


class CudaRNGStatesTracker:
    pass


def checkpoint(
    function, *args, distribute_saved_activations=False, get_rng_state_tracker=None,
    tp_group=None, **kw,
):  # fmt: skip
    """Recomputes `function` in the backward pass, in the FP8 context of the forward one."""
    recipe = Fp8State.recipe

    def again(*inputs, **options):
        with autocast(recipe is not None, recipe):
            return function(*inputs, **options)

    return torch.utils.checkpoint.checkpoint(again, *args, use_reentrant=True, **kw)


@contextlib.contextmanager
def _recompute(activation_recompute: bool = False, recompute_phase: bool = False) -> Iterator[None]:
    yield


def install() -> None:
    """Make `import transformer_engine` find what is here."""
    formats = types.SimpleNamespace(E4M3="E4M3", HYBRID="HYBRID")
    recipe = _module(
        "common.recipe", Format=formats, DelayedScaling=DelayedScaling,
        Float8CurrentScaling=CurrentScaling, Float8BlockScaling=BlockScaling, Recipe=Recipe,
    )  # fmt: skip
    contents = {
        "Linear": Linear, "LayerNormLinear": LayerNormLinear, "RMSNorm": RMSNorm,
        "LayerNorm": LayerNorm, "DotProductAttention": DotProductAttention,
        "fp8_autocast": autocast, "GroupedLinear": nn.Module,
        "fp8_model_init": contextlib.nullcontext,
    }  # fmt: skip
    pytorch = _module(
        "pytorch",
        fp8=_module(
            "pytorch.fp8", FP8GlobalStateManager=Fp8State, fp8_autocast=autocast,
            fp8_model_init=contextlib.nullcontext,
        ),
        tensor=_module("pytorch.tensor", QuantizedTensor=type("QuantizedTensor", (Tensor,), {})),
        distributed=_module(
            "pytorch.distributed", CudaRNGStatesTracker=CudaRNGStatesTracker,
            checkpoint=checkpoint, activation_recompute_forward=_recompute,
        ),
        **contents,
    )  # fmt: skip
    unused = ("fused_compute_score_for_moe_aux_loss", "fused_moe_aux_loss",
              "fused_topk_with_score_function")  # fmt: skip
    _module("pytorch.router", **dict.fromkeys(unused))
    common = _module("common", recipe=recipe)
    _module("", __version__=VERSION, pytorch=pytorch, common=common)


def _module(place: str, **contents: Any) -> types.ModuleType:
    name = f"transformer_engine.{place}".rstrip(".")
    module = types.ModuleType(name)
    module.__dict__.update(contents)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    sys.modules[name] = module
    return module


def pytest_configure() -> None:
    """`-p tests.support.fake_transformer_engine`."""
    install()
