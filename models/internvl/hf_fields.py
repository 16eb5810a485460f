"""Which tables of fields the config.json of each format is read with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vlfoundry.models.families import families, family_of_official
from vlfoundry.models.internvl.hf import TOWER
from vlfoundry.models.official.configs import (
    CHAT,
    DUAL,
    LLAVA,
    NATIVE,
    NATIVE_VISION,
    SHAPES,
    VISION,
)
from vlfoundry.models.official.fields import Table, left_out, names, unknown

Read = tuple[Mapping, Table, str]
"""a config or a part of it, its table, and where the part is"""
TOWERS = {
    "internvit": {"vision": ""},
    "internvit_pth": {"vision": ""},
    "internvl_14b": {"vision": "vision_config", "text": "qllama_config"},
    "internvl_c_pth": {"vision": "vision_config", "text": "qllama_config"},
    "internvl_chat": {"vision": "vision_config", "language": "llm_config"},
    "transformers": {"vision": "vision_config", "language": "text_config"},
    "llava": {"vision": TOWER, "language": ""},
    "llava_full": {
        "vision": f"{TOWER}.vision_config", "text": f"{TOWER}.qllama_config", "language": "",
    },
}  # fmt: skip
"""where the numbers of each of our towers are in the config.json of a format"""
DEPTH = "num_hidden_layers"


def taken_defaults(format: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json does not say of its tensors, and what the official classes take then."""
    found: dict[str, Any] = {}
    for part in _parts(format, facts):
        found |= left_out(*part, of=SHAPES)
    return found


def unknown_fields(format: str, facts: Mapping[str, Any]) -> list[str]:
    """Fields of a config.json that no official class of the format has."""
    return [name for part in _parts(format, facts) for name in unknown(*part)]


def _parts(format: str, facts: Mapping[str, Any]) -> Iterator[Read]:
    if format in ("internvit", "internvit_pth"):
        yield facts, VISION, ""
    elif format in ("internvl_14b", "internvl_c_pth"):
        yield facts, DUAL, ""
        yield facts.get("vision_config") or {}, VISION, "vision_config"
        yield facts["qllama_config"], families()["llama"].table, "qllama_config"
    elif format == "internvl_chat":
        yield facts, CHAT, ""
        yield facts.get("vision_config") or {}, VISION, "vision_config"
        language = facts["llm_config"]
        yield language, family_of_official(language).table, "llm_config"
    elif format == "transformers":
        text = facts["text_config"]
        yield facts, NATIVE, ""
        yield facts.get("vision_config") or {}, NATIVE_VISION, "vision_config"
        yield text, family_of_official(text, default="qwen2").table, "text_config"
    else:
        yield from _llava(format, facts)


def _llava(format: str, facts: Mapping[str, Any]) -> Iterator[Read]:
    llama = families()["llama"].table
    harmless = names(LLAVA.harmless, llama.harmless)
    yield facts, Table(fields={**LLAVA.fields, **llama.fields}, harmless=harmless), ""
    inner = "internvl_14b" if format == "llava_full" else "internvit"
    for part, table, place in _parts(inner, facts[TOWER]):
        yield part, table, f"{TOWER}.{place}" if place else TOWER
