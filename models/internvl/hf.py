"""Official InternVL weights (InternVL-14B and InternVL-Chat) to ours and back."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from infra.errors import ConfigError, ModelError
from models.common.config import LoraConfig
from models.common.hf_decoder import decoder_keys
from models.common.keymap import Key, join_all, one, prefixed, renamed
from models.connector.config import ConnectorConfig
from models.internvit import hf as vision_hf
from models.internvl.config import InternVLConfig
from models.llama import hf as llama_hf
from models.qllama.config import QLlamaConfig


def config_from_official(config: Mapping) -> InternVLConfig:
    """`config.json` of an InternVL-14B (`qllama_config`) or an InternVL-Chat (`llm_config`).

    Raises:
        ConfigError: an option is not built here.
    """
    vision = vision_hf.config_from_official(config["vision_config"])
    if "qllama_config" in config:
        _refuse_lora(config)
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
    language = llama_hf.config_from_official(config["llm_config"])
    return InternVLConfig(
        vision=dataclasses.replace(vision, lora=_lora(config.get("use_backbone_lora"))),
        language=dataclasses.replace(language, lora=_lora(config.get("use_llm_lora"))),
        connector=ConnectorConfig(
            kind="pixel_shuffle",
            ps_version=config["ps_version"],
            select_layer=config["select_layer"],
            shuffle_side=round(1 / config["downsample_ratio"]),
        ),
    )


LORA_RANKS = ("use_backbone_lora", "use_llm_lora", "use_qllama_lora")
"""fields of a `config.json` with the ranks of adapters that are not merged yet; 0: none"""


def _lora(rank: int | None) -> LoraConfig | None:
    """What the official chat class makes of a rank: all linears, and an alpha of twice the rank."""
    return LoraConfig(rank=rank, alpha=2.0 * rank) if rank else None


def _refuse_lora(config: Mapping) -> None:
    ranks = {name: config[name] for name in LORA_RANKS if config.get(name)}
    if ranks:
        raise ConfigError(
            f"{ranks}: the adapters of an InternVL-14B have another alpha in the official "
            "fine-tuning than in the official model class, so what they add is not known; "
            "merge them with the code that they were trained with"
        )


def config_to_official(config: InternVLConfig, kind: str) -> dict[str, Any]:
    """The inverse of `config_from_official`: of the same file for "internvl_c" and "internvl_g"."""
    vision = vision_hf.config_to_official(config.vision)
    if kind == "vision":
        return vision
    if kind in ("internvl_c", "internvl_g"):
        queries = {
            "num_query_token": config.queries.num_queries,
            "cross_attention_frequency": config.queries.cross_attention_frequency,
        }
        return {
            "architectures": ["InternVLModel"],
            "model_type": "internvl",
            "vision_config": vision,
            "qllama_config": llama_hf.config_to_official(config.text) | queries,
            "hidden_size": config.text.width,
            "num_query_token": config.queries.num_queries,
            "clip_embed_dim": config.embed_dim,
            "attn_pool_num_heads": config.pool_heads,
        }
    assert kind == "chat_simple", kind
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "vision_config": vision,
        "llm_config": llama_hf.config_to_official(config.chat),
        "ps_version": config.connector.ps_version,
        "select_layer": config.connector.select_layer,
        "downsample_ratio": 1 / config.connector.shuffle_side,
        "force_image_size": config.vision.image_px,
    }


_NATIVE_VISION = {
    # Fields of transformers' vision config, and the official ones.
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "norm_type": "norm_type",
    "attention_bias": "qkv_bias",
    "use_qk_norm": "qk_normalization",
    "layer_scale_init_value": "initializer_factor",
    "layer_norm_eps": "layer_norm_eps",
    "hidden_act": "hidden_act",
}
NATIVE_QK_EPS = 1e-6
"""of the norms of q and k in transformers' vision tower, whatever its config says"""


def config_from_native(config: Mapping) -> InternVLConfig:
    """`config.json` of transformers' own `internvl` as ours.

    Raises:
        ConfigError: its positions are scaled, or its language model is of another shape.
    """
    vision, text = config["vision_config"], dict(config["text_config"])
    rope = text.pop("rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise ConfigError(f"rope_parameters {rope!r} are not built here; expected the default type")
    text.setdefault("rope_theta", rope.get("rope_theta"))
    official = {theirs: vision[name] for name, theirs in _NATIVE_VISION.items()}
    for side in ("patch_size", "image_size"):
        sides = vision[side] if isinstance(vision[side], list) else [vision[side]]
        if len(set(sides)) > 1:
            raise ConfigError(f"{side} {sides} is no square, which is not built here")
        official[side] = sides[0]
    return config_from_official(
        {
            "vision_config": official | {"drop_path_rate": 0.0},
            "llm_config": text,
            "ps_version": "v2",
            "select_layer": config["vision_feature_layer"],
            "downsample_ratio": config["downsample_ratio"],
        }
    )


def config_to_native(config: InternVLConfig, image_token_id: int) -> dict[str, Any]:
    """The inverse of `config_from_native`.

    Raises:
        ModelError: transformers' own class computes something else; the message says what.
    """
    if config.connector.ps_version != "v2":
        raise ModelError(
            f"the pixel shuffle is {config.connector.ps_version!r}; transformers' own internvl has "
            "'v2' alone and would see every image transposed"
        )
    if config.vision.qk_norm and config.vision.eps != NATIVE_QK_EPS:
        raise ModelError(
            f"the vision tower's eps is {config.vision.eps}; transformers' own internvl has "
            f"{NATIVE_QK_EPS} in the norms of q and k"
        )
    official = config_to_official(config, "chat_simple")
    vision = {name: official["vision_config"][theirs] for name, theirs in _NATIVE_VISION.items()}
    sides = {name: [official["vision_config"][name]] * 2 for name in ("patch_size", "image_size")}
    rope = {"rope_type": "default", "rope_theta": config.chat.rope_base}
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "vision_config": vision | sides | {"model_type": "internvl_vision"},
        "text_config": official["llm_config"] | {"rope_parameters": rope},
        "image_token_id": image_token_id,
        "image_seq_length": config.visual_tokens("chat_simple"),
        "downsample_ratio": official["downsample_ratio"],
        "projector_hidden_act": "gelu",
        "vision_feature_layer": config.connector.select_layer,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
    }


def keys(config: InternVLConfig, kind: str) -> Iterator[Key]:
    """Official names and shapes of a configuration, and the canonical ones.

    "vision" is an InternViT alone; "internvl_g" an InternVL-14B and "internvl_c" that without
    QLLaMA's own parts; "chat_simple" an InternVL-Chat.

    Raises:
        ModelError: no official format holds that configuration.
    """
    if kind == "vision":
        return prefixed(vision_hf.keys(config.vision), ours="vision.")
    if kind in ("internvl_c", "internvl_g"):
        return _dual_keys(config, with_queries=kind == "internvl_g")
    if kind == "chat_simple" and config.connector.kind == "pixel_shuffle":
        return _chat_keys(config)
    connector = f" with a connector of kind {config.connector.kind!r}" if "chat" in kind else ""
    raise ModelError(
        f"no official format holds a {kind} model{connector}; those that one holds: "
        "internvl_c, internvl_g, and chat_simple with a connector of kind 'pixel_shuffle'"
    )


def from_official(
    weights: Mapping[str, Tensor], config: InternVLConfig, kind: str
) -> dict[str, Tensor]:
    """Canonical tensors of a configuration from official ones, which may hold more."""
    return join_all(keys(config, kind), weights)


_NATIVE = (
    # Patterns of official names, tried in this order, and what transformers' own InternVL has.
    (r"^vision_model\.encoder\.layers\.(\d+)\.attn\.proj\.",
     r"vision_tower.encoder.layer.\1.attention.projection_layer."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.attn\.",
     r"vision_tower.encoder.layer.\1.attention."),
    (r"^vision_model\.encoder\.layers\.", "vision_tower.encoder.layer."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.ls([12])$", r".lambda_\1"),
    (r"^vision_model\.embeddings\.class_embedding$", "vision_tower.embeddings.cls_token"),
    (r"^vision_model\.embeddings\.position_embedding$",
     "vision_tower.embeddings.position_embeddings"),
    (r"^vision_model\.embeddings\.patch_embedding\.",
     "vision_tower.embeddings.patch_embeddings.projection."),
    (r"^mlp1\.0\.", "multi_modal_projector.layer_norm."),
    (r"^mlp1\.1\.", "multi_modal_projector.linear_1."),
    (r"^mlp1\.3\.", "multi_modal_projector.linear_2."),
    (r"^language_model\.model\.", "language_model."),
)  # fmt: skip


def native_keys(config: InternVLConfig) -> Iterator[Key]:
    """As `keys` of a chat model, by the names of transformers' own `internvl`.

    It has q, k and v of the vision tower apart.
    """
    for key in _chat_keys(config):
        if key.blocks > 1:
            ((name, (rows, *rest)),) = key.theirs
            parts = [(name.replace("qkv", f"{p}_proj"), (rows // 3, *rest)) for p in "qkv"]
            key = dataclasses.replace(key, theirs=tuple(parts), blocks=1)
        yield from renamed([key], _native_name)


_TIMM = (
    # Patterns of official names, and what the timm-style PyTorch files have.
    (r"^vision_model\.", ""),
    (r"^qllama\.model\.", "transformer."),
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.position_embedding$", "pos_embed"),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^encoder\.layers\.", "blocks."),
    (r"\.ls([12])$", r".ls\1.gamma"),
)


def timm_keys(config: InternVLConfig, kind: str) -> Iterator[Key]:
    """As `keys` of "vision" or "internvl_c", by the names of the timm-style PyTorch files."""
    return renamed(keys(config, kind), _timm_name)


def _timm_name(official: str) -> str:
    for pattern, timm in _TIMM:
        official = re.sub(pattern, timm, official)
    return official


def _native_name(official: str) -> str:
    if official.startswith("language_model.lm_head."):
        return official.removeprefix("language_model.")
    for pattern, native in _NATIVE:
        official = re.sub(pattern, native, official)
    return f"model.{official}"


def _dual_keys(config: InternVLConfig, *, with_queries: bool) -> Iterator[Key]:
    yield from prefixed(vision_hf.keys(config.vision), ours="vision.", theirs="vision_model.")
    text = decoder_keys(
        config.text,
        head=with_queries,
        cross_every=config.queries.cross_attention_frequency if with_queries else 0,
        vision_width=config.vision.width,
    )
    yield from prefixed(text, ours="text.", theirs="qllama.")
    width, queries = config.text.width, config.queries.num_queries
    yield one("text_projection", (width, config.embed_dim), "text_projection")
    yield one("logit_scale", (), "logit_scale")
    yield from _pool_keys("clip_projector.", config.vision.width, config.embed_dim)
    if with_queries:
        yield one("text.query_tokens", (queries, width), "query_tokens", (1, queries, width))
        yield from _pool_keys("clip_projector2.", width, config.embed_dim)
        yield one("itm_head.weight", (2, width), "itm_head.weight")
        yield one("itm_head.bias", (2,), "itm_head.bias")


def _chat_keys(config: InternVLConfig) -> Iterator[Key]:
    yield from prefixed(vision_hf.keys(config.vision), ours="vision.", theirs="vision_model.")
    yield from prefixed(decoder_keys(config.chat), ours="language.", theirs="language_model.")
    merged = config.vision.width * config.connector.merge**2
    width = config.chat.width
    for ours, name, shape in (
        ("norm", "0", (merged,)),
        ("linear1", "1", (width, merged)),
        ("linear2", "3", (width, width)),
    ):
        yield one(f"connector.{ours}.weight", shape, f"mlp1.{name}.weight")
        yield one(f"connector.{ours}.bias", shape[:1], f"mlp1.{name}.bias")


def _pool_keys(prefix: str, width: int, out_width: int) -> Iterator[Key]:
    found = []
    for part in "qkv":
        for leaf in ("weight", "bias"):
            found.append(one(f"norm_{part}.{leaf}", (width,), f"norm1_{part}.{leaf}"))
        found.append(one(f"linear_{part}.weight", (width, width), f"cross_attn.{part}.weight"))
        found.append(one(f"linear_{part}.bias", (width,), f"cross_attn.{part}_bias"))
    found.append(one("linear_proj.weight", (out_width, width), "cross_attn.proj.weight"))
    found.append(one("linear_proj.bias", (out_width,), "cross_attn.proj.bias"))
    return prefixed(found, ours=prefix, theirs=prefix)
