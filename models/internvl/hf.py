"""Official InternVL weights (InternVL-14B and InternVL-Chat) to ours."""

from __future__ import annotations

import re
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
            shuffle_side=round(1 / config["downsample_ratio"]),
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


_NATIVE = (
    # Patterns of transformers' own InternVL, tried in this order, and the official names.
    (r"^language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^multi_modal_projector\.layer_norm\.", "mlp1.0."),
    (r"^multi_modal_projector\.linear_1\.", "mlp1.1."),
    (r"^multi_modal_projector\.linear_2\.", "mlp1.3."),
    (r"^vision_tower\.embeddings\.cls_token$", "vision_model.embeddings.class_embedding"),
    (
        r"^vision_tower\.embeddings\.position_embeddings$",
        "vision_model.embeddings.position_embedding",
    ),
    (
        r"^vision_tower\.embeddings\.patch_embeddings\.projection\.",
        "vision_model.embeddings.patch_embedding.",
    ),
    (r"^vision_tower\.encoder\.layer\.", "vision_model.encoder.layers."),
    (r"\.attention\.projection_layer\.", ".attn.proj."),
    (r"\.attention\.", ".attn."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.lambda_([12])$", r".ls\1"),
)


def native_to_official(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of transformers' own `InternVLForConditionalGeneration` under the official names."""
    named = {_official_name(name): tensor for name, tensor in weights.items()}
    for name in [n for n in named if ".attn.q_proj." in n]:
        parts = [named.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        named[name.replace("q_proj", "qkv")] = torch.cat(parts)
    return named


def _official_name(native: str) -> str:
    name = native.removeprefix("model.")
    for pattern, official in _NATIVE:
        name = re.sub(pattern, official, name)
    return name


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
