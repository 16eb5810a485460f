"""What a model folder says of itself, read without PyTorch: kind, config, names and shapes."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

from infra.config import build, to_dict
from infra.errors import ModelError
from models.internvl.config import PARTS, InternVLConfig

FORMAT = "vlfoundry.model.v1"


def write_config(folder: Path, kind: str, config: InternVLConfig) -> None:
    """Write the `config.json` of a model folder."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"format": FORMAT, "kind": kind, "model": to_dict(config)}
    if "language" not in PARTS[kind]:
        del facts["model"]["pictures"]  # how a chat model is given them
    text = json.dumps(facts, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def read_config(folder: str | Path) -> tuple[str, InternVLConfig]:
    """Kind and config of a model folder.

    Raises:
        ModelError: the folder is no model folder of this format.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ModelError(f"{path} does not exist; {folder} is no model folder")
    facts = json.loads(path.read_text(encoding="utf-8"))
    if facts.get("format") != FORMAT:
        raise ModelError(f"{path} has format {facts.get('format')!r}, expected {FORMAT!r}")
    return facts["kind"], build(InternVLConfig, facts["model"], str(path))


def is_model_folder(folder: Path) -> bool:
    """Whether a folder's config.json is one of ours."""
    try:
        facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(facts, dict) and facts.get("format") == FORMAT


def refuse_overwriting(target: Path) -> None:
    """Raises ModelError if something is in the folder that is to be made."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelError(f"{target} is there already; name a folder that is not, or is empty")


def weight_shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of each weight, from the header of the folder's file.

    Raises:
        ModelError: there is no such file, or it has no such header.
    """
    path = Path(folder) / "weights.safetensors"
    if not path.is_file():
        raise ModelError(f"{path} does not exist; {folder} is no complete model folder")
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(size, path.stat().st_size)))
        header.pop("__metadata__", None)
        return {name: tuple(facts["shape"]) for name, facts in header.items()}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{path} is no complete safetensors file; make it again") from None


def is_below(name: str, part: str) -> bool:
    """Whether a weight belongs to a part, by whole components of its name."""
    return name == part or name.startswith(f"{part}.")


def refuse_other_adapters(
    ours: InternVLConfig, folder: str | Path, parts: Mapping[str, str]
) -> None:
    """Adapters that are left behind, or scaled otherwise, would make another model of the part.

    Args:
        ours: of the model that is filled.
        folder: a trained model's.
        parts: part of the new model -> part of the folder.
    """
    config = read_config(folder)[1]
    for target, source in parts.items():
        theirs, own = config.lora_of(source), ours.lora_of(target)
        if theirs is not None and (own is None or not own.holds(theirs)):
            raise ModelError(
                f"{source!r} of {folder} has adapters ({theirs}), and {target!r} of this model "
                f"has {own or 'none'}; fold them in with `vlfoundry merge`, or give the model "
                "the same lora"
            )
