"""Hugging Face LLaMA, Qwen2 and InternLM2 configs to ours and back; weights are in `hf_decoder`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from infra.errors import ConfigError
from models.common.config import RopeScaling
from models.llama.config import LlamaConfig

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "internlm2": "InternLM2ForCausalLM",
}
"""model types that have this shape, and their classes"""
_LLAMA3 = {
    # Fields of our scaling of kind "llama3", and what Hugging Face calls them.
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_tokens": "original_max_position_embeddings",
}


def config_from_official(config: Mapping) -> LlamaConfig:
    """A Hugging Face `config.json` (or an InternVL's `llm_config`) as ours.

    Raises:
        ConfigError: the language model is of another shape, or has an option that ours lacks.
    """
    kind = _kind(config)
    for option in ("attention_bias", "mlp_bias", "bias", "use_sliding_window"):
        if config.get(option):
            raise ConfigError(
                f"the language model has {option} = {config[option]!r}, which is not built here"
            )
    if config.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"hidden_act {config['hidden_act']!r} is not built here; expected 'silu'")
    heads = config["num_attention_heads"]
    if config.get("head_dim") not in (None, config["hidden_size"] // heads):
        raise ConfigError(
            f"head_dim {config['head_dim']} is not built here; expected hidden_size / "
            f"num_attention_heads = {config['hidden_size'] // heads}"
        )
    base, scaling = _rope(config)
    return LlamaConfig(
        vocab_size=config["vocab_size"],
        width=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=heads,
        key_value_heads=config.get("num_key_value_heads") or heads,
        mlp_hidden=config["intermediate_size"],
        max_tokens=config["max_position_embeddings"],
        eps=config["rms_norm_eps"],
        qkv_bias=kind == "qwen2",
        rope_base=base,
        rope_scaling=scaling,
        tied_head=config.get("tie_word_embeddings", False),
        names="internlm2" if kind == "internlm2" else "llama",
        init_std=config["initializer_range"],
        embedding_init_std=config["initializer_range"],
    )


def config_to_official(config: LlamaConfig) -> dict[str, Any]:
    """The inverse of `config_from_official`.

    An InternLM2 by its names, else a Qwen2 if q, k and v have a bias, else a LLaMA.
    """
    kind = "qwen2" if config.qkv_bias else config.names
    return {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_value_heads or config.heads,
        "intermediate_size": config.mlp_hidden,
        "max_position_embeddings": config.max_tokens,
        "rms_norm_eps": config.eps,
        "rope_theta": config.rope_base,
        "rope_scaling": _scaling_to_official(config.rope_scaling),
        "initializer_range": config.matrix_std,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tied_head,
    } | ({"bias": False} if kind == "internlm2" else {})


def rope_parameters(config: LlamaConfig) -> dict[str, Any]:
    """What transformers 5 has in the place of `rope_theta` and `rope_scaling`."""
    scaling = dict(_scaling_to_official(config.rope_scaling) or {"type": "default"})
    kind = scaling.pop("type")
    return scaling | {"rope_type": kind, "rope_theta": config.rope_base}


def _kind(config: Mapping) -> str:
    """The model type, by the class if one is named: so do the official chat models choose it."""
    classes = config.get("architectures") or [_ARCHITECTURES.get(config.get("model_type", "llama"))]
    for kind, name in _ARCHITECTURES.items():
        if classes[0] == name:
            return kind
    raise ConfigError(
        f"a language model of type {config.get('model_type')!r} and class {classes[0]!r} cannot be "
        f"read; known: {', '.join(f'{k} ({name})' for k, name in _ARCHITECTURES.items())}"
    )


def _rope(config: Mapping) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from the fields of transformers 4 or 5."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    base = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return base, None
    if kind not in ("linear", "dynamic", "llama3"):
        raise ConfigError(
            f"rotary positions scaled by {dict(rope)!r} are not built here; "
            "expected the type default, linear, dynamic or llama3"
        )
    extra = {ours: rope[name] for ours, name in _LLAMA3.items()} if kind == "llama3" else {}
    return base, RopeScaling(kind=kind, factor=rope["factor"], **extra)


def _scaling_to_official(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """In the form of transformers 4, which refuses fields that a kind does not have."""
    if scaling is None:
        return None
    official = {"type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        official |= {name: getattr(scaling, ours) for ours, name in _LLAMA3.items()}
        official["rope_type"] = scaling.kind
    return official
