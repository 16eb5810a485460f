"""Hugging Face LLaMA and Qwen2 configs to ours and back; the weights are in `hf_decoder`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from infra.errors import ConfigError
from models.llama.config import LlamaConfig

_QKV_BIAS = {"llama": False, "qwen2": True}
"""model types that have this shape, and whether q, k and v have a bias"""


def config_from_official(config: Mapping) -> LlamaConfig:
    """A Hugging Face LLaMA or Qwen2 `config.json` (or an InternVL's `llm_config`) as ours.

    Raises:
        ConfigError: the language model is of another shape, or has an option that ours lacks.
    """
    kind = config.get("model_type", "llama")
    if kind not in _QKV_BIAS:
        raise ConfigError(
            f"a language model of type {kind!r} cannot be read; known: {sorted(_QKV_BIAS)}"
        )
    for option in ("attention_bias", "tie_word_embeddings", "rope_scaling", "use_sliding_window"):
        if config.get(option):
            raise ConfigError(
                f"the language model has {option} = {config[option]!r}, which is not built here"
            )
    if config.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"hidden_act {config['hidden_act']!r} is not built here; expected 'silu'")
    return LlamaConfig(
        vocab_size=config["vocab_size"],
        width=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        key_value_heads=config["num_key_value_heads"],
        mlp_hidden=config["intermediate_size"],
        max_tokens=config["max_position_embeddings"],
        eps=config["rms_norm_eps"],
        qkv_bias=_QKV_BIAS[kind],
        rope_base=config["rope_theta"],
        init_std=config["initializer_range"],
        embedding_init_std=config["initializer_range"],
    )


def config_to_official(config: LlamaConfig) -> dict[str, Any]:
    """The inverse of `config_from_official`: a Qwen2 if q, k and v have a bias, else a LLaMA."""
    kind = next(kind for kind, bias in _QKV_BIAS.items() if bias == config.qkv_bias)
    return {
        "architectures": [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[kind]],
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
        "initializer_range": config.matrix_std,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
