"""The registry of language-model families: each module of this folder declares one as `FAMILY`.

No PyTorch here: the command line reads the flavours.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from vlfoundry.infra.core.errors import ConfigError
from vlfoundry.infra.core.givenfiles import shown
from vlfoundry.infra.core.members import members
from vlfoundry.models.decoder.family import Family
from vlfoundry.models.decoder.official import config_from_official, config_to_official
from vlfoundry.models.layers.config import DecoderConfig
from vlfoundry.models.official.fields import label


@functools.cache
def families() -> dict[str, Family]:
    """Every family by its name, which is its `model_type`."""
    return {family.name: family for family in members(__name__, "FAMILY")}


def flavours() -> dict[str, DecoderConfig]:
    """Every published size of every family, by its name."""
    return {name: config for f in families().values() for name, config in f.flavours.items()}


def flavour(name: str, **changes) -> DecoderConfig:
    """A published size, with fields changed.

    Raises:
        ConfigError: no family has one of that name.
    """
    known = flavours()
    if name not in known:
        raise ConfigError(f"unknown language model {name!r}; choose from {sorted(known)}")
    return dataclasses.replace(known[name], **changes)


def family_of(config: DecoderConfig) -> Family:
    """The family that a config belongs to.

    Raises:
        ConfigError: there is none with these options together.
    """
    for family in families().values():
        if family.fits(config):
            return family
    raise ConfigError(
        f"no family of language models has names={config.names!r}, qkv_bias={config.qkv_bias}, "
        f"qk_norm={config.qk_norm} and head_dim={config.head_dim} together; those that are known: "
        f"{', '.join(families())}"
    )


def family_of_official(config: Mapping, part: str = "", default: str = "llama") -> Family:
    """The family of a Hugging Face config, by the class if one is named: so do the official chat
    models choose it.

    Args:
        config: a config.json, or a part of one.
        part: where that is in its file; messages begin with it.
        default: the `model_type` where the file does not say it.

    Raises:
        ConfigError: none that is known.
    """
    model_type, classes = config.get("model_type", default), config.get("architectures")
    if classes:
        named = classes[0] if isinstance(classes, list) else classes
        found = [f for f in families().values() if f.architecture == named]
    else:
        found = [f for f in families().values() if f.name == model_type]
    if not found:
        name = "architectures" if classes else "model_type"
        known = ", ".join(f"{f.name} ({f.architecture})" for f in families().values())
        raise ConfigError(
            f"{label(part, name)} is {shown(classes or model_type)}, expected a language model "
            f"that can be read: {known}"
        )
    return found[0]


def read_official(
    config: Mapping, part: str = "", *, name: str | None = None, default: str = "llama"
) -> DecoderConfig:
    """A Hugging Face config.json (or an InternVL's `llm_config`) as ours.

    Args:
        config, part, default: as of `family_of_official`.
        name: the family, where the file need not say it.

    Raises:
        ConfigError: the language model is of another shape, or has an option that ours lacks; names
            the field.
    """
    family = families()[name] if name else family_of_official(config, part, default)
    return config_from_official(config, family, part)


def write_official(config: DecoderConfig) -> dict[str, Any]:
    """The inverse of `read_official`."""
    return config_to_official(config, family_of(config))
