"""Official InternVL weights (InternVL-14B and InternVL-Chat) to ours."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from models.connector.config import ConnectorConfig
from models.internvit import hf as vision_hf
from models.internvl.config import InternVLConfig
from models.llama import hf as llama_hf
from models.qllama.config import QLlamaConfig

_CHAT_MLP = {"0": "norm", "1": "linear1", "3": "linear2"}


def config_from_official(config: Mapping) -> InternVLConfig:
    """`config.json` of an InternVL-14B (`qllama_config`) or an InternVL-Chat (`llm_config`)."""
    vision = vision_hf.config_from_official(config["vision_config"])
    if "qllama_config" in config:
        qllama = config["qllama_config"]
        return InternVLConfig(
            vision=vision,
            text=llama_hf.config_from_official(qllama),
            queries=QLlamaConfig(
                num_queries=config["num_query_token"],
                cross_attention_frequency=qllama["cross_attention_frequency"],
            ),
            embed_dim=config["clip_embed_dim"],
            pool_heads=config["attn_pool_num_heads"],
        )
    return InternVLConfig(
        vision=vision,
        language=llama_hf.config_from_official(config["llm_config"]),
        connector=ConnectorConfig(
            kind="pixel_shuffle",
            ps_version=config["ps_version"],
            select_layer=config["select_layer"],
        ),
    )


def from_official(
    weights: Mapping[str, Tensor], config: InternVLConfig, kind: str
) -> dict[str, Tensor]:
    """Canonical tensors of a configuration from the official ones.

    `kind` is "internvl_g", "internvl_c" (the same file without QLLaMA's own parts) or
    "chat_simple".
    """
    vision = vision_hf.from_official(_below(weights, "vision_model."), config.vision)
    result = _with_prefix(vision, "vision.")
    if kind == "chat_simple":
        language = llama_hf.from_official(_below(weights, "language_model."), config.chat)
        result |= _with_prefix(language, "language.")
        for name, tensor in _below(weights, "mlp1.").items():
            index, leaf = name.split(".")
            result[f"connector.{_CHAT_MLP[index]}.{leaf}"] = tensor
        return result
    text = llama_hf.from_official(_below(weights, "qllama."), config.text)
    if kind == "internvl_c":
        text = {n: t for n, t in text.items() if "cross_attention" not in n and n != "head.weight"}
    result |= _with_prefix(text, "text.")
    result |= {name: weights[name] for name in ("text_projection", "logit_scale")}
    result |= _pool(weights, "clip_projector.")
    if kind == "internvl_g":
        result["text.query_tokens"] = weights["query_tokens"][0]
        result |= _pool(weights, "clip_projector2.")
        result |= {name: weights[name] for name in ("itm_head.weight", "itm_head.bias")}
    return result


def _pool(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for name, tensor in _below(weights, prefix).items():
        stem, _, leaf = name.removeprefix("cross_attn.").rpartition(".")
        if not stem:  # q_bias, k_bias, v_bias
            key = f"linear_{leaf[0]}.bias"
        elif stem.startswith("norm1_"):
            key = f"norm_{stem[-1]}.{leaf}"
        else:
            key = f"linear_{stem}.{leaf}"
        result[prefix + key] = tensor
    return result


def _below(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}


def _with_prefix(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: torch.as_tensor(tensor) for name, tensor in weights.items()}
