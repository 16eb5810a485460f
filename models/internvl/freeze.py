"""Which parameters a stage trains."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from models.common.megatron import parallel_state
from models.common.parallel import is_distributed
from models.internvl.trained import select


def freeze(model: nn.Module, trained: str | Sequence[str]) -> list[str]:
    """Leave gradients only to what is trained; everything else gets none.

    Args:
        model: unwrapped, before it is given to the optimizer.
        trained: as `models.internvl.trained.select` takes it.

    Returns:
        Names of the trained parameters.

    Raises:
        ConfigError: a pattern matches nothing that the model has.
    """
    wanted = select(_names_of_all_stages(model), trained)
    kept = set(wanted)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in kept)
    return wanted


def _names_of_all_stages(model: nn.Module) -> list[str]:
    """A stage of a pipeline holds part of the model; what is asked for may be in another's."""
    names = [name for name, _ in model.named_parameters()]
    if not is_distributed():
        return names
    group = parallel_state.get_pipeline_model_parallel_group()
    every: list[list[str]] = [[] for _ in range(group.size())]
    torch.distributed.all_gather_object(every, names, group=group)
    return [name for stage in every for name in stage]
