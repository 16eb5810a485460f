"""Low-rank adapters (LoRA) beside the linears of a transformer stack.

There is one pair A, B for each official matrix: q, k and v of a decoder, which are one matrix of
ours, have three, and so have gate and up two; InternViT's q, k, v are one matrix there as well.
The As of one linear are stacked, and B's rows are placed as the rows of the weight are.

Letters: S tokens, B batch, P pairs of a linear, R rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from vlfoundry.models.layers.canonical import full_shape, relax_padding, set_rule, set_true_shape
from vlfoundry.models.layers.config import LINEARS, LoraConfig
from vlfoundry.models.layers.megatron import (
    apply_swiglu_sharded_factory,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    make_sharded_tensors_for_checkpoint,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from vlfoundry.models.layers.parallel import Part, checkpoint_metadata, mark


def add_lora(layers: Iterable[nn.Module], config: LoraConfig | None, *, separate: bool) -> None:
    """Give the linears of layers their adapters, which change nothing before they are trained.

    Args:
        layers: Megatron's transformer layers.
        config: None: no adapters.
        separate: whether q, k, v (and gate and up) are matrices of their own in the official model.
    """
    if config is None:
        return
    for layer in layers:
        for name in config.linears:
            target = layer.get_submodule(LINEARS[name])
            target.lora = Lora(target, config, _rows(name, target, separate))


class Lora(Part):
    """The pairs of one linear; B starts at zero, A as a PyTorch linear does.

    Args:
        target: cut over the tensor ranks or not; what is cut of it is cut here too: B of a column
            linear, A of a row linear. The other matrix is the same on all ranks.
        config: rank, scale and dropout.
        rows: of each pair; they take turns over this rank's rows of the weight in this order.
    """

    def __init__(self, target: Any, config: LoraConfig, rows: Sequence[int]):
        super().__init__(target.config)
        weight = target.weight
        outputs, inputs = weight.shape
        make = {"dtype": weight.dtype, "device": weight.device}
        self.lora_config, self.rows = config, tuple(rows)
        self.a = nn.Parameter(torch.zeros(len(rows) * config.rank, inputs, **make))
        self.b = nn.Parameter(torch.zeros(outputs, config.rank, **make))
        set_rule(self.a, "uniform", full_shape(weight)[1] ** -0.5)
        set_rule(self.b, "constant", 0.0)
        self.is_row = weight.partition_dim == 1
        cut, whole = (self.a, self.b) if self.is_row else (self.b, self.a)
        for name in ("tensor_model_parallel", "partition_dim", "partition_stride"):
            mark(cut, **{name: getattr(weight, name)})
        # Under sequence parallelism each rank sees a part of the tokens: the gradient is summed.
        mark(whole, sequence_parallel=target.config.sequence_parallel)
        if hasattr(weight, "true_shape"):
            shape = list(cut.shape)
            shape[weight.partition_dim] = weight.true_shape[weight.partition_dim]
            set_true_shape(cut, *shape)

    def forward(self, x: Tensor) -> Tensor:
        """What is to be added to the linear's output [S, B, outputs] of its input x."""
        hidden = linear(self._dropped(x), self.a) * self.lora_config.scale  # [S, B, P*R]
        if self.tp_group.size() > 1:
            hidden = self._over_ranks(hidden)
        if len(self.rows) == 1:
            return linear(hidden, self.b)
        turns = self.b.unflatten(0, (-1, sum(self.rows))).split(self.rows, 1)
        outputs = [
            linear(part, b.flatten(0, 1)).unflatten(-1, (len(b), -1))
            for part, b in zip(hidden.chunk(len(self.rows), -1), turns, strict=True)
        ]
        return torch.cat(outputs, -1).flatten(-2)

    def _dropped(self, x: Tensor) -> Tensor:
        """Ranks that see the same x drop the same of it, those that see parts something else."""
        rate = self.lora_config.dropout
        if not (self.training and rate):
            return x
        apart = self.tp_group.size() > 1 and (self.is_row or self.config.sequence_parallel)
        tracker: Any = get_cuda_rng_tracker()
        with tracker.fork() if apart else contextlib.nullcontext():
            return dropout(x, rate)

    def _over_ranks(self, hidden: Tensor) -> Tensor:
        """The communication of the linear itself, on R channels a pair."""
        if self.is_row and self.config.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(hidden, group=self.tp_group)
        if self.is_row:
            return reduce_from_tensor_model_parallel_region(hidden, group=self.tp_group)
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden, group=self.tp_group)
        return copy_to_tensor_model_parallel_region(hidden, group=self.tp_group)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ):
        data_group = checkpoint_metadata(metadata)["dp_cp_group"]
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"a": 1} if self.is_row else {"b": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=data_group,
        )
        if getattr(self.b, "partition_stride", 1) == 2:
            sharded[f"{prefix}b"] = apply_swiglu_sharded_factory(
                sharded[f"{prefix}b"],
                sharded_offsets,
                tp_group=self.tp_group,
                dp_group=data_group,
            )
        return relax_padding(sharded, dict(self.named_parameters(prefix[:-1])))


def _rows(name: str, target: Any, separate: bool) -> tuple[int, ...]:
    """Rows of the pairs of a linear: in a decoder, those of a group of heads or of gate and up."""
    if separate and name == "qkv":
        config = target.config
        size = config.kv_channels
        return config.num_attention_heads // config.num_query_groups * size, size, size
    outputs = target.weight.shape[0]
    return (outputs // 2,) * 2 if separate and name == "fc1" else (outputs,)
