"""Weights of a decoder in the Hugging Face layout, or in InternLM2's, and ours."""

from __future__ import annotations

import re
from collections.abc import Iterator

from vlfoundry.models.layers.config import DecoderConfig
from vlfoundry.models.official.keymap import Key, one, prefixed, renamed

_INTERNLM2 = (
    # Patterns of LLaMA's names, and what InternLM2 has.
    (r"\bembed_tokens\.", "tok_embeddings."),
    (r"^lm_head\.", "output."),
    (r"\binput_layernorm\.", "attention_norm."),
    (r"\bpost_attention_layernorm\.", "ffn_norm."),
    (r"\bself_attn\.o_proj\.", "attention.wo."),
    (r"\bmlp\.gate_proj\.", "feed_forward.w1."),
    (r"\bmlp\.up_proj\.", "feed_forward.w3."),
    (r"\bmlp\.down_proj\.", "feed_forward.w2."),
)


def decoder_keys(
    config: DecoderConfig, *, head: bool = True, cross_every: int = 0, vision_width: int = 0
) -> Iterator[Key]:
    """Names like `model.layers.0.self_attn.q_proj.weight`, and the canonical ones.

    q, k and v are one matrix of ours, by groups: the queries of a group, its key, its value. Gate
    and up are one matrix, gate first.

    Args:
        config: the decoder's.
        head: whether there is a head onto the vocabulary. A tied one has no weights of its own.
        cross_every: every so many layers look at an image of `vision_width` channels; 0: none.
    """
    table = (config.vocab_size, config.width)
    yield one("embedding.weight", table, "model.embed_tokens.weight")
    yield one("decoder.final_layernorm.weight", (config.width,), "model.norm.weight")
    if head and not config.tied_head:
        yield one("head.weight", table, "lm_head.weight")
    for index in range(config.depth):
        layer = list(_layer(config))
        if cross_every and index % cross_every == 0:
            layer += _cross_attention(config, vision_width)
        yield from prefixed(layer, ours=f"decoder.layers.{index}.", theirs=f"model.layers.{index}.")


def internlm2_keys(config: DecoderConfig) -> Iterator[Key]:
    """Names like `model.layers.0.attention.wqkv.weight`, and the canonical ones.

    InternLM2 has q, k and v in one matrix of the same order of rows as ours: by groups, the
    queries of a group, its key, its value.
    """
    for key in decoder_keys(config):
        if key.ours.endswith("linear_qkv.weight"):
            layer = key.names[0].removesuffix("self_attn.q_proj.weight")
            yield one(key.ours, key.shape, f"{layer}attention.wqkv.weight")
        else:
            yield from renamed([key], _internlm2_name)


def _internlm2_name(llama: str) -> str:
    for pattern, internlm2 in _INTERNLM2:
        llama = re.sub(pattern, internlm2, llama)
    return llama


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
    for norm in ("q", "k") if config.qk_norm else ():
        name = f"self_attn.{norm}_norm.weight"
        yield one(f"self_attention.{norm}_layernorm.weight", (config.head_size,), name)
    shape = (width, config.heads_width)
    yield one("self_attention.linear_proj.weight", shape, "self_attn.o_proj.weight")
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


def _cross_attention(config: DecoderConfig, vision_width: int) -> Iterator[Key]:
    width, heads = config.width, config.heads_width
    for ours, name, shape in (
        ("linear_q", "q_proj", (heads, width)),
        ("linear_k", "k_proj", (heads, vision_width)),
        ("linear_v", "v_proj", (heads, vision_width)),
        ("linear_proj", "o_proj", (width, heads)),
    ):
        yield one(f"cross_attention.{ours}.weight", shape, f"cross_attn.{name}.weight")
    for ours, name, size in (("query", "norm1", width), ("vision", "norm2", vision_width)):
        yield one(f"cross_attention.{ours}_norm.weight", (size,), f"cross_attn.{name}.weight")
