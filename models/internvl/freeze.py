"""Which parameters a stage trains."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from vlfoundry.infra.core.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

STAGES: dict[str, tuple[str, ...]] = {
    "all": ("*",),
    # InternVL, section 3.3: both towers and the heads of stage 1 stay as they are.
    "stage2": (
        "text.query_tokens",
        "text.decoder.layers.*.cross_attention.*",
        "clip_projector2.*",
        "itm_head.*",
        "logit_scale",
    ),
    "connector": ("connector.*", "query_connector.*"),
    "sft": ("connector.*", "query_connector.*", "language.*"),
    "lora": ("*.lora.*",),
}


def freeze(model: nn.Module, trained: str | Sequence[str]) -> list[str]:
    """Leave gradients only to what is trained; everything else gets none.

    Args:
        model: unwrapped, before it is given to the optimizer.
        trained: a name of `STAGES`, or a list of such names and of patterns of canonical
            parameter names (`language`, `text.decoder.layers.*.cross_attention.*`).

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


def select(names: Sequence[str], trained: str | Sequence[str]) -> list[str]:
    """What `freeze` would train of a model with parameters of these names, in their order."""
    wanted: set[str] = set()
    for entry in [trained] if isinstance(trained, str) else trained:
        matched = [n for n in names if any(_matches(n, p) for p in STAGES.get(entry, (entry,)))]
        if not matched:
            raise ConfigError(
                f"{entry!r} matches no parameter of the model; known stages: {sorted(STAGES)}, "
                f"parts of this model: {sorted({n.split('.')[0] for n in names})}"
            )
        wanted |= set(matched)
    return [name for name in names if name in wanted]


def _names_of_all_stages(model: nn.Module) -> list[str]:
    """A stage of a pipeline holds part of the model; what is asked for may be in another's."""
    import torch

    from vlfoundry.models.layers.megatron import parallel_state
    from vlfoundry.models.layers.parallel import is_distributed

    names = [name for name, _ in model.named_parameters()]
    if not is_distributed():
        return names
    group: Any = parallel_state.get_pipeline_model_parallel_group()
    every: list[list[str]] = [[] for _ in range(group.size())]
    torch.distributed.all_gather_object(every, names, group=group)
    return [name for stage in every for name in stage]


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")
