"""Hugging Face LLaMA weights to ours."""

from __future__ import annotations

from collections.abc import Mapping

from models.common.hf_decoder import decoder_from_official as from_official
from models.llama.config import LlamaConfig

__all__ = ["config_from_official", "from_official"]


def config_from_official(config: Mapping) -> LlamaConfig:
    """A Hugging Face LLaMA `config.json` (or an InternVL's `llm_config`) as ours."""
    return LlamaConfig(
        vocab_size=config["vocab_size"],
        width=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        key_value_heads=config["num_key_value_heads"],
        mlp_hidden=config["intermediate_size"],
        max_tokens=config["max_position_embeddings"],
        eps=config["rms_norm_eps"],
        rope_base=config["rope_theta"],
        init_std=config["initializer_range"],
        embedding_init_std=config["initializer_range"],
    )
