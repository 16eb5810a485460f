"""LLaMA's numbers and named flavours."""

from __future__ import annotations

import dataclasses

from infra.errors import ConfigError
from models.common.config import DecoderConfig as LlamaConfig

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
FLAVOURS: dict[str, LlamaConfig] = {
    "chinese-alpaca-7b": _7B,
    "vicuna-7b": dataclasses.replace(_7B, vocab_size=32000, max_tokens=2048),
    "vicuna-13b": dataclasses.replace(
        _7B, vocab_size=32000, max_tokens=2048, width=5120, depth=40, heads=40, mlp_hidden=13824
    ),
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
