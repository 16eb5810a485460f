"""Hugging Face configs of decoders to ours and back, whatever the family (`models.families`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlfoundry.infra.core.errors import ConfigError
from vlfoundry.infra.core.givenfiles import shown
from vlfoundry.models.decoder.family import Family
from vlfoundry.models.layers.config import DecoderConfig, RopeScaling
from vlfoundry.models.official.configs import ROPE, TOKENS
from vlfoundry.models.official.fields import (
    Field,
    Table,
    label,
    number,
    read,
    require_multiple,
    size,
    wrong,
)

DEFAULT_BASE = 10000.0
"""of rotary positions, where a config does not say it"""
_LLAMA3 = {
    # Fields of our scaling of kind "llama3", and what Hugging Face calls them.
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_tokens": "original_max_position_embeddings",
}
_FACTOR: dict[str, Field] = {"factor": number(low=1, high=1e6)}
_SCALINGS: dict[str, Field] = {
    **_FACTOR,
    "low_freq_factor": number(low=0, high=1e6, open_low=True),
    "high_freq_factor": number(low=0, high=1e6, open_low=True),
    "original_max_position_embeddings": size(most=TOKENS),
}
"""fields of `rope_scaling` that have no default"""


def config_from_official(config: Mapping, family: Family, part: str = "") -> DecoderConfig:
    """A Hugging Face `config.json` (or an InternVL's `llm_config`) as ours.

    Args:
        config: with the official names of fields.
        family: whose it is.
        part: where it is in its file; messages begin with it.

    Raises:
        ConfigError: the language model is of another shape, or has an option that ours lacks; names
            the field.
    """
    said = read(config, family.table, part)
    heads = said["num_attention_heads"]
    said["num_key_value_heads"] = groups = said["num_key_value_heads"] or heads
    if heads % groups:
        expected = f"a divisor of num_attention_heads = {heads}"
        raise wrong(config, part, "num_key_value_heads", groups, expected)
    _require_layer_types(config, said, part)
    base, scaling = _rope(config, said, part)
    return DecoderConfig(
        vocab_size=said["vocab_size"],
        width=said["hidden_size"],
        depth=said["num_hidden_layers"],
        heads=heads,
        key_value_heads=groups,
        head_dim=_head_dim(config, said, part),
        mlp_hidden=said["intermediate_size"],
        max_tokens=said["max_position_embeddings"],
        eps=float(said["rms_norm_eps"]),
        rope_base=base,
        rope_scaling=scaling,
        tied_head=said["tie_word_embeddings"],
        init_std=float(said["initializer_range"]),
        embedding_init_std=float(said["initializer_range"]),
        **family.options(said),
    )


def _head_dim(config: Mapping, said: Mapping, part: str) -> int | None:
    """None where it is hidden_size / num_attention_heads."""
    width, heads, size = said["hidden_size"], said["num_attention_heads"], said["head_dim"]
    if size is None:
        require_multiple(config, said, part, "hidden_size", "num_attention_heads")
        if width // heads % 2:
            expected = f"an even multiple of num_attention_heads = {heads}, for rotary positions"
            raise wrong(config, part, "hidden_size", width, expected)
    elif size % 2:
        raise wrong(config, part, "head_dim", size, "an even number, for rotary positions")
    return None if size is None or size * heads == width else size


def config_to_official(config: DecoderConfig, family: Family) -> dict[str, Any]:
    """The inverse of `config_from_official`."""
    return {
        "architectures": [family.architecture],
        "model_type": family.name,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_value_heads or config.heads,
        **({} if config.head_dim is None else {"head_dim": config.head_dim}),
        "intermediate_size": config.mlp_hidden,
        "max_position_embeddings": config.max_tokens,
        "rms_norm_eps": config.eps,
        "rope_theta": config.rope_base,
        "rope_scaling": _scaling_to_official(config.rope_scaling),
        "initializer_range": config.matrix_std,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tied_head,
        **family.official(config),
    }


def rope_parameters(config: DecoderConfig) -> dict[str, Any]:
    """What transformers 5 has in the place of `rope_theta` and `rope_scaling`."""
    scaling = dict(_scaling_to_official(config.rope_scaling) or {"type": "default"})
    kind = scaling.pop("type")
    return scaling | {"rope_type": kind, "rope_theta": config.rope_base}


def _require_layer_types(config: Mapping, said: Mapping, part: str) -> None:
    kinds, depth = said["layer_types"], said["num_hidden_layers"]
    if kinds is not None and len(kinds) != depth:
        raise wrong(config, part, "layer_types", kinds, f"one for each of the {depth} layers")


def _rope(config: Mapping, said: Mapping, part: str) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from the fields of transformers 4 (`rope_scaling`) or 5.

    Where a file has both, transformers takes `rope_scaling` and nothing of `rope_parameters`. That
    is refused if it drops more than the word that nothing is scaled.
    """
    given = {n: said[n] for n in ("rope_scaling", "rope_parameters") if said[n]}
    found = {name: _read_rope(config, said, part, name) for name in given}
    if not found:
        return _read_rope(config, said, part, "rope_scaling")
    taken, *dropped = found.values()
    for base, scaling in dropped:
        named = given["rope_parameters"].get("rope_theta") is not None
        if scaling not in (None, taken[1]) or (named and base != taken[0]):
            raise wrong(
                config, part, "rope_parameters", given["rope_parameters"],
                f"the same as rope_scaling = {shown(given['rope_scaling'])} with rope_theta = "
                f"{taken[0]:g}, which transformers takes in its place; delete one of the two, and "
                "give rope_theta beside the other",
            )  # fmt: skip
    return taken


def _read_rope(
    config: Mapping, said: Mapping, part: str, name: str
) -> tuple[float, RopeScaling | None]:
    rope = said[name] or {}
    base = _base(rope, part, name) or said["rope_theta"]
    if base is None and "rope_theta" in config:
        raise wrong(config, part, "rope_theta", None, "a number above 0")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE:
        raise ConfigError(
            f"{label(part, name)} is {shown(dict(rope))}, expected the type default, linear, "
            "dynamic or llama3: nothing else is built here"
        )
    if rope.get("type", kind) != kind:
        raise ConfigError(
            f"{label(part, name)} is {shown(dict(rope))}, expected the same for type, which "
            "transformers 4 reads, as for rope_type"
        )
    beyond = {n: rope[n] for n in rope if n not in ROPE[kind] and rope[n] is not None}
    if beyond.pop("partial_rotary_factor", 1) != 1 or beyond:
        raise ConfigError(
            f"{label(part, name)} is {shown(dict(rope))}, expected of the type {kind} no more than "
            f"{', '.join(sorted(ROPE[kind]))}"
        )
    scaling = None if kind == "default" else _scaling(rope, kind, label(part, name))
    return float(base or DEFAULT_BASE), scaling


def _base(rope: Mapping, part: str, name: str) -> float | None:
    base = rope.get("rope_theta")
    if "rope_theta" in rope and not number(low=0, open_low=True).fits(base):
        raise wrong(rope, label(part, name), "rope_theta", base, "a number above 0")
    return base


def _scaling(rope: Mapping, kind: Any, part: str) -> RopeScaling:
    said = read(rope, Table(fields=_SCALINGS if kind == "llama3" else _FACTOR), part)
    extra = {ours: said[name] for ours, name in _LLAMA3.items()} if kind == "llama3" else {}
    try:
        return RopeScaling(kind=kind, factor=float(said["factor"]), **extra)
    except ValueError as error:
        raise ConfigError(f"{part} is {shown(dict(rope))}: {error}") from None


def _scaling_to_official(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """In the form of transformers 4, which refuses fields that a kind does not have."""
    if scaling is None:
        return None
    official = {"type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        official |= {name: getattr(scaling, ours) for ours, name in _LLAMA3.items()}
        official["rope_type"] = scaling.kind
    return official
