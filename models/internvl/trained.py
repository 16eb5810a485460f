"""Which of a model's parameters a stage trains, by their names (no PyTorch: plans ask it too)."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from infra.errors import ConfigError

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


def select(names: Sequence[str], trained: str | Sequence[str]) -> list[str]:
    """What of a model with parameters of these names is trained, in their order.

    Args:
        names: canonical names.
        trained: a name of `STAGES`, or a list of such names and of patterns of canonical
            parameter names (`language`, `text.decoder.layers.*.cross_attention.*`).

    Raises:
        ConfigError: a pattern matches nothing that the model has.
    """
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


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")
