"""LLaMA, and those published in its shape: Vicuna, Alpaca, Yi."""

from __future__ import annotations

import dataclasses

from vlfoundry.models.decoder.family import Family, is_llama_like
from vlfoundry.models.layers.config import DecoderConfig
from vlfoundry.models.official.configs import decoder_table

_7B = DecoderConfig(
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

# The vocabularies are the language models' own: what a chat model adds to one (the markers of
# images, boxes and references) is in the `config.json` of its checkpoint.
FAMILY = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    table=decoder_table(vocab=32000, hidden=11008, tokens=2048, groups=None),
    fits=lambda config: is_llama_like(config) and not config.qkv_bias and not config.qk_norm,
    flavours={
        "chinese-alpaca-7b": _7B,
        "vicuna-7b": dataclasses.replace(_7B, vocab_size=32000, max_tokens=2048),
        "vicuna-13b": _VICUNA_13B,
        "llama2-13b": dataclasses.replace(_VICUNA_13B, max_tokens=4096, eps=1e-5),
        "yi-34b": DecoderConfig(
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
        "small": DecoderConfig(),
    },
)
