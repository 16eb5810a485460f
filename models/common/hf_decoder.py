"""Weights of a LLaMA in the Hugging Face layout, and ours."""

from __future__ import annotations

from collections.abc import Iterator

from models.common.config import DecoderConfig
from models.common.keymap import Key, one, prefixed


def decoder_keys(
    config: DecoderConfig, *, head: bool = True, cross_every: int = 0, vision_width: int = 0
) -> Iterator[Key]:
    """Names like `model.layers.0.self_attn.q_proj.weight`, and the canonical ones.

    q, k and v are one matrix of ours, by groups: the queries of a group, its key, its value. Gate
    and up are one matrix, gate first.

    Args:
        config: the decoder's.
        head: whether there is a head onto the vocabulary.
        cross_every: every so many layers look at an image of `vision_width` channels; 0: none.
    """
    table = (config.vocab_size, config.width)
    yield one("embedding.weight", table, "model.embed_tokens.weight")
    yield one("decoder.final_layernorm.weight", (config.width,), "model.norm.weight")
    if head:
        yield one("head.weight", table, "lm_head.weight")
    for index in range(config.depth):
        layer = list(_layer(config))
        if cross_every and index % cross_every == 0:
            layer += _cross_attention(config.width, vision_width)
        yield from prefixed(layer, ours=f"decoder.layers.{index}.", theirs=f"model.layers.{index}.")


def _layer(config: DecoderConfig) -> Iterator[Key]:
    width, hidden = config.width, config.mlp_hidden
    for norm, name in (
        ("input_layernorm", "input_layernorm"),
        ("pre_mlp_layernorm", "post_attention_layernorm"),
    ):
        yield one(f"{norm}.weight", (width,), f"{name}.weight")
    yield _qkv(config, "weight", (width,))
    if config.qkv_bias:
        yield _qkv(config, "bias", ())
    yield one("self_attention.linear_proj.weight", (width, width), "self_attn.o_proj.weight")
    yield Key(
        ours="mlp.linear_fc1.weight",
        shape=(2 * hidden, width),
        theirs=tuple((f"mlp.{part}_proj.weight", (hidden, width)) for part in ("gate", "up")),
    )
    yield one("mlp.linear_fc2.weight", (width, hidden), "mlp.down_proj.weight")


def _qkv(config: DecoderConfig, leaf: str, rest: tuple[int, ...]) -> Key:
    groups = config.key_value_heads or config.heads
    heads = {"q": config.heads, "k": groups, "v": groups}
    rows = {part: count * config.head_size for part, count in heads.items()}
    return Key(
        ours=f"self_attention.linear_qkv.{leaf}",
        shape=(sum(rows.values()), *rest),
        theirs=tuple((f"self_attn.{p}_proj.{leaf}", (count, *rest)) for p, count in rows.items()),
        groups=groups,
    )


def _cross_attention(width: int, vision_width: int) -> Iterator[Key]:
    for ours, name, columns in (
        ("linear_q", "q_proj", width),
        ("linear_k", "k_proj", vision_width),
        ("linear_v", "v_proj", vision_width),
        ("linear_proj", "o_proj", width),
    ):
        shape = (width, columns)
        yield one(f"cross_attention.{ours}.weight", shape, f"cross_attn.{name}.weight")
    for ours, name, size in (("query", "norm1", width), ("vision", "norm2", vision_width)):
        yield one(f"cross_attention.{ours}_norm.weight", (size,), f"cross_attn.{name}.weight")
