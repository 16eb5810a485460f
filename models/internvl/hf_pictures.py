"""How official chat models are given pictures, as their `config.json` says, to ours and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlfoundry.infra.core.config import build, to_dict
from vlfoundry.models.preprocess.geometry import PictureConfig

NATIVE_PICTURES = {"dynamic_image_size": True, "use_thumbnail": True, "max_dynamic_patch": 12}
"""transformers' own internvl is for models that see tiles; how many stands in its processor's
file, and is 12 in all that are published"""
GRIDS = "vlfoundry_pictures"
"""what we add to a LLaVA-style config.json where its own words do not reach: it knows no tiles"""


def pictures_from_official(config: Mapping) -> PictureConfig:
    """Of an InternVL-Chat; what is left out is as in the official class."""
    if config.get("dynamic_image_size", False):
        tiles = {
            "min_tiles": config.get("min_dynamic_patch", 1),
            "max_tiles": config.get("max_dynamic_patch", 6),
            "thumbnail": config.get("use_thumbnail", False),
        }
        return build(PictureConfig, tiles, "config.json: the tiles of pictures")
    return PictureConfig(geometry="pad" if config.get("pad2square", False) else "squeeze")


def pictures_to_official(pictures: PictureConfig) -> dict[str, Any]:
    """The inverse of `pictures_from_official`; a crop, which it has no word for, becomes a
    squeeze."""
    tiles = pictures.geometry == "tiles"
    return {
        "dynamic_image_size": tiles,
        "use_thumbnail": tiles and pictures.thumbnail,
        "min_dynamic_patch": pictures.min_tiles,
        "max_dynamic_patch": pictures.max_tiles,
        "pad2square": pictures.geometry == "pad",
    }


def pictures_from_llava(config: Mapping) -> PictureConfig:
    """Of an InternVL-Chat 1.0 in LLaVA's form: padded, or else the middle square."""
    if GRIDS in config:
        return build(PictureConfig, config[GRIDS], f"config.json: {GRIDS}")
    return PictureConfig(geometry="pad" if config.get("image_aspect_ratio") == "pad" else "crop")


def pictures_to_llava(pictures: PictureConfig) -> dict[str, Any]:
    """The inverse of `pictures_from_llava`."""
    if pictures.geometry == "crop":
        return {"image_aspect_ratio": None}
    if pictures.geometry == "pad":
        return {"image_aspect_ratio": "pad"}
    return {"image_aspect_ratio": "pad", GRIDS: to_dict(pictures)}
