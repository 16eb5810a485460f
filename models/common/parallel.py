"""Process groups for building models: Megatron's where they exist, else a group of one.

A model for evaluation is built in a process that has no process group and needs none.
"""

from __future__ import annotations

import torch

from infra.backend import Layout, transformer_config
from infra.errors import LayoutError
from models.common.megatron import (
    MegatronModule,
    ProcessGroupCollection,
    TransformerConfig,
    ensure_metadata_has_dp_cp_group,
    parallel_state,
)


class SoloGroup:
    """Stands for a process group of one rank where torch.distributed is not initialised."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


_SOLO = SoloGroup()


def is_distributed() -> bool:
    """Whether Megatron's groups exist in this process."""
    return parallel_state.is_initialized()


def process_groups() -> ProcessGroupCollection:
    """Groups to hand to Megatron's modules."""
    if is_distributed():
        return ProcessGroupCollection.use_mpu_process_groups(["tp", "pp", "cp"])
    return ProcessGroupCollection(tp=_SOLO, pp=_SOLO, cp=_SOLO)


def tensor_group() -> torch.distributed.ProcessGroup | SoloGroup:
    """Ranks that share each layer's matrices."""
    if not is_distributed():
        return _SOLO
    group = parallel_state.get_tensor_model_parallel_group()
    assert group is not None, "Megatron says it is initialised, but has no tensor group"
    return group


def data_group() -> torch.distributed.ProcessGroup | SoloGroup:
    """Ranks that hold the same weights and different samples."""
    return parallel_state.get_data_parallel_group() if is_distributed() else _SOLO


class Part(MegatronModule):
    """A Megatron module that also works, and saves, where there are no process groups."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config)
        self.tp_group = tensor_group()


def checkpoint_metadata(metadata: dict | None) -> dict:
    """`metadata` for `sharded_state_dict` with the data-parallel group it must name."""
    if not is_distributed():
        return {**(metadata or {}), "dp_cp_group": _SOLO}
    return ensure_metadata_has_dp_cp_group(metadata)


def pad_to_multiple(amount: int, parts: int) -> int:
    """The smallest multiple of `parts` that is at least `amount`."""
    return -(-amount // parts) * parts


def stack_config(**fields) -> TransformerConfig:
    """Megatron's config for one transformer stack in the current layout.

    Raises:
        LayoutError: the layout asks for what these models do not do yet.
    """
    if not is_distributed():
        layout = Layout()
    else:
        layout = Layout(
            tensor=parallel_state.get_tensor_model_parallel_world_size(),
            pipeline=parallel_state.get_pipeline_model_parallel_world_size(),
        )
    if layout.pipeline > 1:
        raise LayoutError(
            f"pipeline {layout.pipeline} was asked for, but these models run whole on each rank; "
            "use tensor or data parallelism"
        )
    settings = {
        # Weights come from `models.common.canonical`, by name: the same in every layout.
        "perform_initialization": False,
        "hetereogenous_dist_checkpoint": True,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "persist_layer_norm": False,
    }
    return transformer_config(layout, **(settings | fields))
