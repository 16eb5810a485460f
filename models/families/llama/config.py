"""LLaMA's numbers and named flavours."""

from __future__ import annotations

import dataclasses

from vlfoundry.infra.core.errors import ConfigError
from vlfoundry.models.layers.config import DecoderConfig as LlamaConfig
from vlfoundry.models.layers.config import RopeScaling

__all__ = ["FLAVOURS", "LlamaConfig", "llama"]

_7B = LlamaConfig(
    vocab_size=49954,
    width=4096,
    depth=32,
    heads=32,
    mlp_hidden=11008,
    max_tokens=80,
    init_std=0.02,
    embedding_init_std=0.02,
)
_VICUNA_13B = dataclasses.replace(
    _7B, vocab_size=32000, max_tokens=2048, width=5120, depth=40, heads=40, mlp_hidden=13824
)
_INTERNLM2_7B = LlamaConfig(
    vocab_size=92544,
    width=4096,
    depth=32,
    heads=32,
    key_value_heads=8,
    mlp_hidden=14336,
    max_tokens=32768,
    eps=1e-5,
    rope_base=1e6,
    rope_scaling=RopeScaling(kind="dynamic", factor=2.0),
    names="internlm2",
    init_std=0.02,
    embedding_init_std=0.02,
)
_QWEN2_7B = dataclasses.replace(
    _INTERNLM2_7B,
    vocab_size=152064,
    width=3584,
    depth=28,
    heads=28,
    key_value_heads=4,
    mlp_hidden=18944,
    eps=1e-6,
    qkv_bias=True,
    rope_scaling=None,
    names="llama",
)
_QWEN2_HALF_B = dataclasses.replace(
    _QWEN2_7B,
    vocab_size=151936,
    width=896,
    depth=24,
    heads=14,
    key_value_heads=2,
    mlp_hidden=4864,
    tied_head=True,
)
# The vocabularies are the language models' own: what a chat model adds to one (the markers of
# images, boxes and references) is in the `config.json` of its checkpoint.
FLAVOURS: dict[str, LlamaConfig] = {
    "chinese-alpaca-7b": _7B,
    "vicuna-7b": dataclasses.replace(_7B, vocab_size=32000, max_tokens=2048),
    "vicuna-13b": _VICUNA_13B,
    "llama2-13b": dataclasses.replace(_VICUNA_13B, max_tokens=4096, eps=1e-5),
    "yi-34b": LlamaConfig(
        vocab_size=64000,
        width=7168,
        depth=60,
        heads=56,
        key_value_heads=8,
        mlp_hidden=20480,
        max_tokens=4096,
        eps=1e-5,
        rope_base=5e6,
        init_std=0.02,
        embedding_init_std=0.02,
    ),
    "internlm2-1.8b": dataclasses.replace(
        _INTERNLM2_7B, width=2048, depth=24, heads=16, mlp_hidden=8192
    ),
    "internlm2-7b": _INTERNLM2_7B,
    "internlm2-20b": dataclasses.replace(
        _INTERNLM2_7B, width=6144, depth=48, heads=48, mlp_hidden=16384
    ),
    "qwen2-0.5b": _QWEN2_HALF_B,
    # InternVL's chat models have two matrices for embedding and head.
    "qwen2-0.5b-untied": dataclasses.replace(_QWEN2_HALF_B, tied_head=False),
    "qwen2.5-7b": _QWEN2_7B,
    "small": LlamaConfig(),
}


def llama(name: str, **changes) -> LlamaConfig:
    """A named flavour, with fields changed.

    Raises:
        ConfigError: no flavour has that name.
    """
    if name not in FLAVOURS:
        raise ConfigError(f"LLaMA flavour {name!r} does not exist; known: {sorted(FLAVOURS)}")
    return dataclasses.replace(FLAVOURS[name], **changes)
