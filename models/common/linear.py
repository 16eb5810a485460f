"""Megatron's parallel layers with a short path where there is nothing to communicate.

Megatron's own path adds the bias in a pass of its own and goes through an autograd function made
for overlapping communication; on one tensor rank a plain linear is the same numbers, faster. The
short path also runs where torch.distributed is not initialised.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import embedding, linear

from models.common.canonical import relax_padding
from models.common.megatron import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)


class ColumnLinear(ColumnParallelLinear):
    """Output features cut over the tensor ranks. Returns (output, bias still to add)."""

    def forward(self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output=None):
        if _is_cut(self.tp_group):
            return super().forward(input_, weight, runtime_gather_output)
        return linear(input_, self.weight if weight is None else weight, self.bias), None

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return relax_padding(sharded, dict(self.named_parameters(prefix[:-1])))


class UnbiasedColumnLinear(ColumnLinear):
    """For q/k/v without a bias beside projections with one, which Megatron ties together."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **(kwargs | {"bias": False}))


class RowLinear(RowParallelLinear):
    """Input features cut over the tensor ranks. Returns (output, bias still to add)."""

    def forward(self, input_: Tensor):
        if _is_cut(self.tp_group):
            return super().forward(input_)
        return linear(input_, self.weight, self.bias), None

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return relax_padding(sharded, dict(self.named_parameters(prefix[:-1])))


class VocabEmbedding(VocabParallelEmbedding):
    """Token embeddings, the vocabulary cut over the tensor ranks."""

    def forward(self, input_: Tensor) -> Tensor:
        if _is_cut(self.tp_group):
            return super().forward(input_)
        return embedding(input_, self.weight)


def _is_cut(group) -> bool:
    return group is not None and group.size() > 1
