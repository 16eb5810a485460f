"""Official InternViT weights (`InternVisionModel`) to ours and back."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from models.internvit.config import InternViTConfig

_LAYER = {
    "ls1": "ls1",
    "ls2": "ls2",
    "norm1": "input_layernorm",
    "norm2": "pre_mlp_layernorm",
    "attn.qkv": "self_attention.linear_qkv",
    "attn.proj": "self_attention.linear_proj",
    "attn.q_norm": "self_attention.q_layernorm",
    "attn.k_norm": "self_attention.k_layernorm",
    "mlp.fc1": "mlp.linear_fc1",
    "mlp.fc2": "mlp.linear_fc2",
}


def config_from_official(config: Mapping) -> InternViTConfig:
    """The official `config.json` (or its `vision_config`) as ours."""
    return InternViTConfig(
        width=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        mlp_hidden=config["intermediate_size"],
        patch_px=config["patch_size"],
        image_px=config["image_size"],
        norm="layer" if config.get("norm_type", "rms_norm") == "layer_norm" else "rms",
        qkv_bias=config["qkv_bias"],
        qk_norm=config["qk_normalization"],
        layerscale_init=config["initializer_factor"],
        eps=config["layer_norm_eps"],
        drop_path=config["drop_path_rate"],
        drop_path_shape="linear",
    )


def from_official(weights: Mapping[str, Tensor], config: InternViTConfig) -> dict[str, Tensor]:
    """Official names and shapes to canonical ones."""
    result = {}
    for name, tensor in weights.items():
        if name.startswith("encoder.layers."):
            index, rest = name.removeprefix("encoder.layers.").split(".", 1)
            key = f"decoder.layers.{index}.{_layer_name(rest)}"
            if rest.startswith("attn.qkv."):
                tensor = interleave_heads(tensor, config.heads)
        else:
            key, tensor = _embedding(name.removeprefix("embeddings."), tensor)
        result[key] = tensor.contiguous()
    return result


def interleave_heads(tensor: Tensor, heads: int) -> Tensor:
    """Rows [3, heads, size] (all q, all k, all v) to Megatron's [heads, 3, size]."""
    rows = tensor.view(3, heads, -1, *tensor.shape[1:])
    return rows.transpose(0, 1).reshape(tensor.shape)


def _layer_name(rest: str) -> str:
    stem, _, leaf = rest.rpartition(".")
    if not stem:  # ls1, ls2
        return _LAYER[leaf]
    return f"{_LAYER[stem]}.{leaf}"


def _embedding(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    if name == "patch_embedding.weight":
        return name, tensor.flatten(1)
    if name in ("class_embedding", "position_embedding"):
        return name, tensor.reshape(tensor.shape[1:] if tensor.shape[1] > 1 else (-1,))
    return name, tensor
