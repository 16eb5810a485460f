"""Process groups for building models: Megatron's where they exist, else a group of one.

A model for evaluation is built in a process that has no process group and needs none.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from vlfoundry.infra.backend import Layout, transformer_config
from vlfoundry.infra.backend.fp8_config import Fp8Config
from vlfoundry.infra.backend.parallel import Group, SoloGroup, current_fp8, current_layout
from vlfoundry.models.layers.config import LayerSpecKind
from vlfoundry.models.layers.megatron import (
    MegatronModule,
    ProcessGroupCollection,
    TransformerConfig,
    ensure_metadata_has_dp_cp_group,
    parallel_state,
)

_SOLO: Group = SoloGroup()
_builds_text_apart = False


def is_distributed() -> bool:
    """Whether Megatron's groups exist in this process."""
    return parallel_state.is_initialized()


def process_groups() -> ProcessGroupCollection:
    """Groups to hand to Megatron's modules.

    Which layers are where we decide ourselves (`models.layers.stack`), so to a module there is no
    pipeline.
    """
    if is_distributed():
        groups = ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"])
        groups.tp = tensor_group()
        groups.pp = _SOLO
        return groups
    return ProcessGroupCollection(tp=_SOLO, pp=_SOLO, cp=_SOLO)


def tensor_group() -> Group:
    """Ranks that share each layer's matrices."""
    if not is_distributed():
        return _SOLO
    if _builds_text_apart:
        group = parallel_state.get_expert_tensor_parallel_group()
        assert group is not None, "the text tower stands apart, but has no tensor group"
        return group
    group = parallel_state.get_tensor_model_parallel_group()
    assert group is not None, "Megatron says it is initialised, but has no tensor group"
    return group


@contextlib.contextmanager
def text_apart() -> Iterator[None]:
    """Within the context parts are built in the text tower's own layout."""
    global _builds_text_apart
    _builds_text_apart = True
    try:
        yield
    finally:
        _builds_text_apart = False


def stand_apart(*parameters: torch.nn.Parameter) -> None:
    """Say that parameters are cut, and their gradients added up, in the text tower's own way."""
    for parameter in parameters:
        # The first is Megatron's word for an expert's.
        group = parallel_state.get_expert_tensor_parallel_group()
        mark(parameter, allreduce=False, tensor_group=group)


def mark(parameter: torch.Tensor, **facts: Any) -> None:
    """Say of a parameter what Megatron, or we, look up in its attributes."""
    for name, value in facts.items():
        setattr(parameter, name, value)


def tensor_group_of(parameter: torch.Tensor) -> Group:
    """Ranks over which a parameter is cut, if it is."""
    return getattr(parameter, "tensor_group", None) or tensor_group()


def apart_metadata(metadata: dict | None) -> dict:
    """`metadata` for `sharded_state_dict` of what stands apart."""
    group = parallel_state.get_expert_data_parallel_group()
    return {**(metadata or {}), "dp_cp_group": group}


def pipeline_rank() -> int:
    """Which of the pipeline's ranks this is."""
    return parallel_state.get_pipeline_model_parallel_rank() if is_distributed() else 0


def data_group() -> Group:
    """Ranks that hold the same weights and different samples."""
    return parallel_state.get_data_parallel_group() if is_distributed() else _SOLO


class Part(MegatronModule):
    """A Megatron module that also works, and saves, where there are no process groups."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        self.tp_group: Group = tensor_group()


def head_size(config: TransformerConfig) -> int:
    """Channels of a head, which every stack of ours names."""
    assert config.kv_channels is not None
    return config.kv_channels


def checkpoint_metadata(metadata: dict | None) -> dict:
    """`metadata` for `sharded_state_dict` with the data-parallel group it must name."""
    if not is_distributed():
        return {**(metadata or {}), "dp_cp_group": _SOLO}
    return ensure_metadata_has_dp_cp_group(metadata)


def pad_to_multiple(amount: int, parts: int) -> int:
    """The smallest multiple of `parts` that is at least `amount`."""
    return -(-amount // parts) * parts


def stack_config(spec: LayerSpecKind = "local", **fields: Any) -> TransformerConfig:
    """Megatron's config for one transformer stack in the current layout."""
    layout = current_layout()
    if _builds_text_apart:
        layout = layout.of_text
    settings: dict[str, Any] = {
        # Weights come from `models.layers.canonical`, by name: the same in every layout.
        "perform_initialization": False,
        "hetereogenous_dist_checkpoint": True,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "persist_layer_norm": False,
    }
    if layout.recompute:
        settings |= {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    fp8 = current_fp8()
    if fp8 and spec == "te":
        settings |= _fp8_settings(fp8, fields["num_layers"])
    whole = Layout(tensor=layout.tensor, sequence_parallel=layout.sequence_parallel)
    return transformer_config(whole, **(settings | fields))


def _fp8_settings(fp8: Fp8Config, depth: int) -> dict[str, Any]:
    """Megatron's names for our options; it counts layers in the whole stack, as we do."""
    ends = bool(fp8.first_layers or fp8.last_layers)
    return {
        "fp8": "e4m3" if fp8.recipe == "blockwise" else "hybrid",
        "fp8_recipe": fp8.recipe,
        "fp8_amax_history_len": fp8.amax_history,
        "fp8_amax_compute_algo": "max",
        "first_last_layers_bf16": ends,
        "num_layers_at_start_in_bf16": min(fp8.first_layers, depth),
        "num_layers_at_end_in_bf16": min(fp8.last_layers, depth),
        # Two copies of every weight in FP8 between micro-batches otherwise: 11 GiB of the 6B.
        "disable_parameter_transpose_cache": True,
    }


def beside(part: Part | TransformerConfig) -> TransformerConfig:
    """Config of what stands beside a stack, where every tensor rank holds all tokens."""
    config = part if isinstance(part, TransformerConfig) else part.config
    return dataclasses.replace(config, sequence_parallel=False)


def schedule_config(stack: TransformerConfig) -> TransformerConfig:
    """What Megatron's wrapper and its pipeline schedules ask of a whole model.

    Args:
        stack: of one of its towers; the whole one's tensor parallelism is the same.
    """
    layout = current_layout()
    if layout.pipeline == 1:
        return stack
    return transformer_config(
        layout,
        num_layers=layout.stages,
        hidden_size=stack.hidden_size,
        num_attention_heads=stack.num_attention_heads,
        kv_channels=stack.kv_channels,
        # Stages hand over one flat tensor, whose length says the other side. Megatron allows that
        # to be sent along only with this dispatcher (of experts, which nobody here has).
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
    )
