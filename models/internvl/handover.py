"""What an exported model needs beside its weights: tokenizer, processor, how it is spoken to.

Files that came in with an import stay as they are, where the format is the one they came in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlfoundry.infra.core.givenfiles import read_mapping
from vlfoundry.models.chat.official import KEPT, PIECES, OfficialTokenizer
from vlfoundry.models.chat.templates import END_IMG, IMG, IMG_CONTEXT
from vlfoundry.models.internvl.config import InternVLConfig
from vlfoundry.models.internvl.tokenizer import load_tokenizer
from vlfoundry.models.official.fields import size
from vlfoundry.models.preprocess.geometry import PictureConfig
from vlfoundry.models.preprocess.normalize import MEAN, STD
from vlfoundry.models.tokenizer import BOS, EOS, PAD, SPECIAL_TOKENS, TextTokenizer, Tokenizer

OWN = "tokenizer.json"
PICTURES = "preprocessor_config.json"
BICUBIC = 3
"""Pillow's number"""
EMBEDDING = ("internvl_14b", "internvl_c_pth")
"""formats whose tokenizer puts begin and end around every text"""
SEEING = ("internvit", "internvit_pth")
"""formats without texts"""
LANGUAGE = {
    "internvl_14b": "qllama_config", "internvl_c_pth": "qllama_config",
    "internvl_chat": "llm_config", "transformers": "text_config", "llava": "", "llava_full": "",
}  # fmt: skip
"""where a format's config.json has its language model's"""


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder has a tokenizer of ours, or official files of one."""
    return (folder / OWN).is_file() or any((folder / KEPT / name).is_file() for name in PIECES)


def is_ours(official: Path) -> bool:
    """Whether official files hold a tokenizer of our own, as exports of our models do."""
    pieces = next((official / name for name in PIECES if (official / name).is_file()), None)
    if pieces is None or pieces.name != OWN:
        return False
    added = read_mapping(pieces).get("added_tokens")
    if not isinstance(added, list):
        return False
    found = {t.get("id"): t.get("content") for t in added if isinstance(t, dict)}
    return all(found.get(index) == token for index, token in enumerate(SPECIAL_TOKENS))


def write_companions(
    folder: Path,
    target: Path,
    format: str,
    kind: str,
    config: InternVLConfig,
    facts: dict[str, Any],
) -> None:
    """Write what belongs beside the weights, and the ids of special tokens into `facts`.

    Args:
        folder: a model folder.
        target: has the weights, and the small files that were imported with them.
        format: that is written.
        kind: of the model.
        config: of the model.
        facts: the config.json that will be written.

    Raises:
        ModelError: the tokenizer is damaged, or cannot be what the format needs.
    """
    if format != "transformers":
        _write(target / PICTURES, _clip(config.vision.image_px))
    own = (folder / OWN).is_file()
    if format in SEEING or not has_tokenizer(folder) or not (own or format == "transformers"):
        return
    tokenizer = load_tokenizer(folder)
    chats = kind in ("chat_simple", "chat_full") and _knows_dialogue(tokenizer)
    ids = _ids(tokenizer, chats)
    part = LANGUAGE[format]
    (facts[part] if part else facts).update(ids)
    _write(target / "generation_config.json", _read(folder / KEPT / "generation_config.json") | ids)
    told = _own_config(config) if own else _read(folder / KEPT / "tokenizer_config.json")
    if own:
        _write_own(folder / OWN, target / OWN, embeds=format in EMBEDDING)
    if format == "transformers":
        told |= {
            "extra_special_tokens": _names_of_pictures(tokenizer),
            "processor_class": _PROCESSOR,
        }
        told.pop("additional_special_tokens", None)
        if chats:
            _write_text(target / "chat_template.jinja", tokenizer.dialogue.jinja())
        _write(target / PICTURES, tiles(config))
        processor = {
            "processor_class": _PROCESSOR,
            "image_seq_length": config.visual_tokens("chat_simple"),
        }
        _write(target / "processor_config.json", processor)
    elif chats:
        told["chat_template"] = tokenizer.dialogue.jinja()
    _write(target / "tokenizer_config.json", told)


_PROCESSOR = "InternVLProcessor"
_SPARE = ("<video>", "</quad>")


def _knows_dialogue(tokenizer: TextTokenizer) -> bool:
    return not isinstance(tokenizer, OfficialTokenizer) or tokenizer.template is not None


def _ids(tokenizer: TextTokenizer, chats: bool) -> dict[str, int]:
    """Ids of special tokens; what ends an answer is the dialogue's."""
    begin = {} if tokenizer.bos_id is None else {"bos_token_id": tokenizer.bos_id}
    end = tokenizer.dialogue.stop_id if chats else tokenizer.eos_id
    return begin | {"eos_token_id": end, "pad_token_id": tokenizer.pad_id}


def _own_config(config: InternVLConfig) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": config.chat.max_tokens,
        "clean_up_tokenization_spaces": False,
    }


def _names_of_pictures(tokenizer: TextTokenizer) -> dict[str, str]:
    """What transformers' processor asks the tokenizer for. It wants a token for videos, which the
    models here are not given: one that texts do not have, so that none is added to the vocabulary.
    """
    known = (
        SPECIAL_TOKENS if isinstance(tokenizer, Tokenizer) else getattr(tokenizer, "special", ())
    )
    spare = next((token for token in _SPARE if token in known), _SPARE[0])
    return {
        "start_image_token": IMG,
        "end_image_token": END_IMG,
        "context_image_token": IMG_CONTEXT,
        "video_token": spare,
    }


def _write_own(source: Path, target: Path, *, embeds: bool) -> None:
    """Our own tokenizer; where texts are embedded it puts begin and end around them itself."""
    if not embeds:
        Tokenizer.load(source).save(target)
        return
    from tokenizers.processors import TemplateProcessing

    tokenizer = Tokenizer.load(source)
    around = [(BOS, tokenizer.bos_id), (EOS, tokenizer.eos_id)]
    tokenizer.save(target, TemplateProcessing(single=f"{BOS} $A {EOS}", special_tokens=around))


def tiles(config: InternVLConfig) -> dict[str, Any]:
    """How transformers' processor cuts a picture: as the model is trained and asked, if it can."""
    many = config.pictures.geometry == "tiles"
    side = config.vision.image_px
    return {
        "image_processor_type": "GotOcr2ImageProcessor",
        "processor_class": _PROCESSOR,
        "crop_to_patches": many,
        "min_patches": config.pictures.min_tiles if many else 1,
        "max_patches": config.pictures.max_tiles if many else 1,
        "size": {"height": side, "width": side},
        **_pixels(),
    }


def pictures_told(folder: Path) -> PictureConfig | None:
    """How the processor of a folder of transformers cuts pictures; None: it does not say.

    Raises:
        ModelError: its file is damaged.
    """
    told = _read(folder / "processor_config.json").get("image_processor")
    told = told if isinstance(told, dict) else _read(folder / PICTURES)
    most: Any = told.get("max_patches")
    least: Any = told.get("min_patches", 1)
    if not all(size(most=1024).fits(number) for number in (most, least)):
        return None
    if most == 1:
        return PictureConfig(geometry="squeeze")
    return PictureConfig(min_tiles=min(least, most), max_tiles=most)


def unlike_ours(format: str, config: InternVLConfig) -> str:
    """What is done to pictures in another way where a model is exported to; empty: nothing."""
    pictures = config.pictures
    if format != "transformers" or pictures.geometry == "squeeze":
        return ""
    if pictures.geometry == "tiles":
        if pictures.thumbnail or pictures.max_tiles == 1:
            return ""
        return "its processor adds a thumbnail to a picture in tiles, which this model is not given"
    return (
        "its processor squeezes pictures into a square; this model is given them by "
        f"{pictures.geometry}"
    )


def _clip(image_px: int) -> dict[str, Any]:
    """What official code reads with CLIPImageProcessor; the aspect ratio is not kept."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"height": image_px, "width": image_px},
        "crop_size": {"height": image_px, "width": image_px},
        "do_center_crop": False,
        **_pixels(),
    }


def _pixels() -> dict[str, Any]:
    return {
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(MEAN),
        "image_std": list(STD),
    }


def _read(path: Path) -> dict[str, Any]:
    return read_mapping(path) if path.is_file() else {}


def _write(path: Path, facts: Mapping[str, Any]) -> None:
    _write_text(path, json.dumps(facts, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
