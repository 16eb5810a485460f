"""Megatron's parallel layers with a short path where there is nothing to communicate.

Megatron's own path adds the bias in a pass of its own and goes through an autograd function made
for overlapping communication; on one tensor rank a plain linear is the same numbers, faster. The
short path also runs where torch.distributed is not initialised.

Both paths multiply in FP8 where a linear has a `fp8_product`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from vlfoundry.infra.backend.fp8_config import Fp8Config
from vlfoundry.models.fp8.products import Fp8Product
from vlfoundry.models.layers.canonical import relax_padding
from vlfoundry.models.layers.megatron import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

if TYPE_CHECKING:
    from vlfoundry.models.layers.lora import Lora


if TYPE_CHECKING:
    _Base: Any = object  # one of Megatron's parallel linears
else:
    _Base = object


class _Multiplies(_Base):
    """The matrix product of a linear, in FP8 if it is told to."""

    fp8_product: Fp8Product | None = None

    def _product(self, input_: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return (self.fp8_product or linear)(input_, weight, bias)

    def _forward_impl(
        self,
        input: Tensor,
        weight: Tensor,
        *,
        bias: Any,
        allreduce_dgrad: Any,
        sequence_parallel: Any,
        **options,
    ) -> Tensor:
        """What Megatron's forward calls on several tensor ranks: also communicates the input."""
        if self.fp8_product is None:
            return super()._forward_impl(
                input,
                weight,
                bias=bias,
                allreduce_dgrad=allreduce_dgrad,
                sequence_parallel=sequence_parallel,
                **options,
            )
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, group=self.tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=self.tp_group)
        return self.fp8_product(input, weight, bias)


class ColumnLinear(_Multiplies, ColumnParallelLinear):
    """Output features cut over the tensor ranks. Returns (output, bias still to add)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.lora: Lora | None = None

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: Any = None
    ):
        if _is_cut(self.tp_group):
            output, bias = super().forward(input_, weight, runtime_gather_output)
        else:
            own: Any = self.weight
            used = own if weight is None else weight
            output, bias = self._product(input_, used, self.bias), None
        return _adapted(output, self.lora, input_), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ):
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        sharded = relax_padding(sharded, dict(self.named_parameters(prefix[:-1])))
        return sharded | _sharded_lora(self.lora, prefix, sharded_offsets, metadata)


class UnbiasedColumnLinear(ColumnLinear):
    """For q/k/v without a bias beside projections with one, which Megatron ties together."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **(kwargs | {"bias": False}))


class RowLinear(_Multiplies, RowParallelLinear):
    """Input features cut over the tensor ranks. Returns (output, bias still to add)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.lora: Lora | None = None

    # pyrefly: ignore[bad-override]  # Megatron types its input as what it calls it
    def forward(self, input_: Tensor):
        if _is_cut(self.tp_group):
            output, bias = super().forward(input_)
        else:
            output, bias = self._product(input_, self.weight, self.bias), None
        return _adapted(output, self.lora, input_), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ):
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        sharded = relax_padding(sharded, dict(self.named_parameters(prefix[:-1])))
        return sharded | _sharded_lora(self.lora, prefix, sharded_offsets, metadata)


class VocabEmbedding(VocabParallelEmbedding):
    """Token embeddings, the vocabulary cut over the tensor ranks."""

    def forward(self, input_: Tensor) -> Tensor:
        if _is_cut(self.tp_group):
            return super().forward(input_)
        return embedding(input_, self.weight)


def use_fp8(layer: nn.Module, config: Fp8Config | None) -> None:
    """Let all linears of a transformer layer multiply in FP8, or in its own precision again."""
    for module in layer.modules():
        if isinstance(module, _Multiplies):
            module.fp8_product = Fp8Product(config) if config else None


def _adapted(output: Tensor, lora: Lora | None, input_: Tensor) -> Tensor:
    return output if lora is None else output + lora(input_)


def _sharded_lora(
    lora: Lora | None, prefix: str, sharded_offsets: tuple, metadata: dict | None
) -> dict:
    """In the place of what Megatron, which cuts nothing that it does not know, says of it."""
    if lora is None:
        return {}
    return lora.sharded_state_dict(f"{prefix}lora.", sharded_offsets, metadata)


def _is_cut(group: Any) -> bool:
    return group is not None and group.size() > 1
