"""What a model folder says of itself, read without PyTorch: kind, config, names and shapes."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

from vlfoundry.infra.core.config import build, to_dict
from vlfoundry.infra.core.errors import ConfigError, ModelError
from vlfoundry.infra.core.givenfiles import disguise, read_mapping, shown
from vlfoundry.models.estimate.weights import weights
from vlfoundry.models.internvl.config import PARTS, InternVLConfig

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
        ModelError: the folder is not a model folder of this format.
        ConfigError: a number of its config cannot be.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ModelError(f"{path} does not exist; {folder} is not a model folder")
    facts = read_mapping(path)
    if facts.get("format") != FORMAT:
        raise ModelError(f"{path} has format {shown(facts.get('format'))}, expected {FORMAT!r}")
    kind, numbers = facts.get("kind"), facts.get("model")
    if not isinstance(kind, str) or kind not in PARTS:
        raise ModelError(
            f"{path} is damaged: kind is {shown(kind)}, expected one of {', '.join(PARTS)}; copy "
            "it again"
        )
    if not isinstance(numbers, dict):
        raise ModelError(
            f"{path} is damaged: model is {shown(numbers)}, expected a mapping; copy it again"
        )
    try:
        config = build(InternVLConfig, numbers, "model")
        config.check(kind)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return kind, config


def check_shapes(folder: str | Path, kind: str, config: InternVLConfig) -> None:
    """Hold a config against the header of the weights, before a model of that size is built.

    Raises:
        ModelError: the weights are those of another config; names the field or the tensor.
    """
    path, held = Path(folder) / "weights.safetensors", weight_shapes(folder)
    for tower, depth in config.depths(kind).items():
        if depth > len(held):
            raise ModelError(
                f"{Path(folder) / 'config.json'}: {tower}.depth is {depth}, expected at most "
                f"{len(held)}, for {path.name} has no more tensors; copy the folder again"
            )
    for weight in weights(kind, config):
        if held.get(weight.name, weight.shape) != weight.shape:
            raise ModelError(
                f"weight {weight.name!r} in {path} has shape {list(held[weight.name])}; "
                f"{Path(folder) / 'config.json'} asks for {list(weight.shape)}"
            )


def is_model_folder(folder: Path) -> bool:
    """Whether a folder's config.json is one of ours."""
    try:
        facts = read_mapping(folder / "config.json")
    except ModelError:
        return False
    return facts.get("format") == FORMAT


def refuse_overwriting(target: Path) -> None:
    """Raises ModelError if something is in the folder that is to be made."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ModelError(f"{target} is there already; name a folder that is not there, or is empty")


def weight_shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of each weight, from the header of the folder's file.

    Raises:
        ModelError: there is no such file, or it is cut or has no such header.
    """
    path = Path(folder) / "weights.safetensors"
    if not path.is_file():
        raise ModelError(f"{path} does not exist; {folder} is not a complete model folder")
    found = disguise(path)
    if found:
        raise ModelError(f"{path} {found}")
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(size, path.stat().st_size)))
        header.pop("__metadata__", None)
        shapes = {name: tuple(facts["shape"]) for name, facts in header.items()}
        end = max((facts["data_offsets"][1] for facts in header.values()), default=0)
    except (struct.error, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ModelError(f"{path} is damaged: it has no header of tensors; copy it again") from None
    there = path.stat().st_size - 8 - size
    if end != there:
        raise ModelError(
            f"{path} is damaged: it has {there:,} bytes of tensors, expected {end:,}; copy it again"
        )
    return shapes


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
