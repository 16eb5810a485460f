"""Official InternViT weights (`InternVisionModel`) to ours and back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from vlfoundry.models.internvit.config import InternViTConfig
from vlfoundry.models.official.configs import VISION
from vlfoundry.models.official.fields import read, require_multiple
from vlfoundry.models.official.keymap import Key, join_all, one, prefixed

if TYPE_CHECKING:
    from torch import Tensor


def config_from_official(config: Mapping, part: str = "") -> InternViTConfig:
    """The official `config.json` (or its `vision_config`) as ours.

    Args:
        config: with the official names of fields.
        part: where it is in its file; messages begin with it.

    Raises:
        ConfigError: a field has a value that ours cannot be built with; names it.
    """
    said = read(config, VISION, part)
    require_multiple(config, said, part, "hidden_size", "num_attention_heads")
    require_multiple(config, said, part, "image_size", "patch_size")
    return InternViTConfig(
        width=said["hidden_size"],
        depth=said["num_hidden_layers"],
        heads=said["num_attention_heads"],
        mlp_hidden=said["intermediate_size"],
        patch_px=said["patch_size"],
        image_px=said["image_size"],
        norm="layer" if said["norm_type"] == "layer_norm" else "rms",
        qkv_bias=said["qkv_bias"],
        qk_norm=said["qk_normalization"],
        layerscale_init=float(said["initializer_factor"]),
        eps=float(said["layer_norm_eps"]),
        drop_path=float(said["drop_path_rate"]),
        drop_path_shape="linear",
    )


def config_to_official(config: InternViTConfig) -> dict[str, Any]:
    """The inverse of `config_from_official`, with what the official class also asks for."""
    return {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_hidden,
        "patch_size": config.patch_px,
        "image_size": config.image_px,
        "norm_type": "layer_norm" if config.norm == "layer" else "rms_norm",
        "qkv_bias": config.qkv_bias,
        "qk_normalization": config.qk_norm,
        "initializer_factor": config.layerscale_init,
        "layer_norm_eps": config.eps,
        "drop_path_rate": config.drop_path,
        "hidden_act": "gelu",
        "use_flash_attn": False,
    }


def keys(config: InternViTConfig) -> Iterator[Key]:
    """Official names and shapes, and the canonical ones.

    The official q, k, v matrix has all q, all k, all v; ours has them head by head.
    """
    width, patch = config.width, config.patch_px
    tokens = config.patches + 1
    pixels = (width, 3, patch, patch)
    yield one("class_embedding", (width,), "embeddings.class_embedding", (1, 1, width))
    yield one(
        "position_embedding", (tokens, width), "embeddings.position_embedding", (1, tokens, width)
    )
    name = "patch_embedding.weight"
    yield one(name, (width, math.prod(pixels[1:])), f"embeddings.{name}", pixels)
    yield one("patch_embedding.bias", (width,), "embeddings.patch_embedding.bias")
    for index in range(config.depth):
        yield from prefixed(
            _layer(config), ours=f"decoder.layers.{index}.", theirs=f"encoder.layers.{index}."
        )


def from_official(weights: Mapping[str, Tensor], config: InternViTConfig) -> dict[str, Tensor]:
    """Official tensors to canonical ones."""
    return join_all(keys(config), weights)


def _layer(config: InternViTConfig) -> Iterator[Key]:
    width, hidden = config.width, config.mlp_hidden
    for name in ("ls1", "ls2"):
        yield one(name, (width,), name)
    leaves = ("weight", "bias") if config.norm == "layer" else ("weight",)
    for ours, name in (("input_layernorm", "norm1"), ("pre_mlp_layernorm", "norm2")):
        for leaf in leaves:
            yield one(f"{ours}.{leaf}", (width,), f"{name}.{leaf}")
    rests = {"weight": (width,)} | ({"bias": ()} if config.qkv_bias else {})
    for leaf, rest in rests.items():
        shape = (3 * width, *rest)
        yield Key(
            ours=f"self_attention.linear_qkv.{leaf}",
            shape=shape,
            theirs=((f"attn.qkv.{leaf}", shape),),
            groups=config.heads,
            blocks=3,
        )
    for part in ("q", "k") if config.qk_norm else ():
        yield one(f"self_attention.{part}_layernorm.weight", (width,), f"attn.{part}_norm.weight")
    for ours, name, rows, columns in (
        ("self_attention.linear_proj", "attn.proj", width, width),
        ("mlp.linear_fc1", "mlp.fc1", hidden, width),
        ("mlp.linear_fc2", "mlp.fc2", width, hidden),
    ):
        yield one(f"{ours}.weight", (rows, columns), f"{name}.weight")
        yield one(f"{ours}.bias", (rows,), f"{name}.bias")
