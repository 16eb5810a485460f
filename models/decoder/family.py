"""What a family of language models is: its flavours, its config.json, the names of its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vlfoundry.models.decoder.hf_keys import decoder_keys
from vlfoundry.models.layers.config import DecoderConfig
from vlfoundry.models.official.fields import Table
from vlfoundry.models.official.keymap import Key


def nothing(_: Any) -> dict[str, Any]:
    """No options beyond those that all families share."""
    return {}


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of causal decoders that `models.decoder` computes.

    A file of `models/families/` assigns one to `FAMILY`; nothing else has to be edited.
    """

    name: str
    """`model_type` in a Hugging Face config.json"""
    architecture: str
    """`architectures[0]` in it"""
    table: Table
    """every field of its config class (`models.official.configs.decoder_table`)"""
    fits: Callable[[DecoderConfig], bool]
    """whether a config is of this family; no config may be of two"""
    options: Callable[[Mapping[str, Any]], dict[str, Any]] = nothing
    """fields of a `DecoderConfig` from the official ones, beyond those that all families share"""
    official: Callable[[DecoderConfig], dict[str, Any]] = nothing
    """the inverse: official fields beyond those that all families share"""
    keys: Callable[[DecoderConfig], Iterable[Key]] = decoder_keys
    """names of its weights in Hugging Face checkpoints, and ours"""
    in_transformers: bool = True
    """whether transformers has the class itself"""
    flavours: Mapping[str, DecoderConfig] = dataclasses.field(default_factory=dict)
    """published sizes by name, e.g. "qwen2.5-7b" """


def is_llama_like(config: DecoderConfig) -> bool:
    """Whether a config's weights bear LLaMA's names."""
    return config.names == "llama"
