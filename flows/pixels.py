"""What a model is given of one picture, as PNG files: the same code that trains and evaluates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vlfoundry.infra.core.config import build, load_params
from vlfoundry.infra.core.errors import ConfigError, DataError
from vlfoundry.infra.core.files import require_writable_folder
from vlfoundry.infra.data.images.bulk import composite, decode_rgba
from vlfoundry.models.internvl.config import PARTS, InternVLConfig
from vlfoundry.models.internvl.folder import read_config, refuse_overwriting
from vlfoundry.models.preprocess.geometry import CHAT, TASKS, WORDS, Geometry, Sight

PURPOSES = ("train", "evaluate")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given:
    """What a model is given of one picture."""

    size_px: tuple[int, int]
    """width and height of the upright picture"""
    geometry: Geometry
    """what was done with it"""
    squares: np.ndarray
    """uint8 [N, S, S, 3], the thumbnail last"""


def write_pixels(
    image: Path,
    out: Path,
    *,
    model: str | None,
    purpose: str,
    task: str | None,
    root: Callable[[], Path],
    say: Callable[[str], None],
) -> Given:
    """Write what a model is given of a picture as `00.png`, `01.png`, ... in the folder `out`.

    Args:
        image: any picture in one of `infra.data.images.decode.FORMATS`.
        out: a folder that is not there yet, or is empty.
        model: a registered name or a model folder; None: what params.yaml says.
        purpose: train or evaluate.
        task: what it is evaluated on; None: chat, of a model that does not chat retrieval.
        root: finds the checkout.
        say: prints a line.

    Raises:
        DataError: the picture cannot be read.
        ConfigError: purpose or task is none that there is.
        ModelError: the model cannot be read, or `out` is in use.
    """
    if purpose not in PURPOSES:
        raise ConfigError(f"--for is {purpose!r}, expected one of {', '.join(PURPOSES)}")
    refuse_overwriting(out)
    require_writable_folder(out, "the squares")
    sight = _sight(model, task, root)
    if not image.is_file():
        raise DataError(f"{image} is not a file, expected a picture")
    found = given(image.read_bytes(), str(image), sight, purpose, task)
    _write(found.squares, out)
    width, height = found.size_px
    count, side = found.squares.shape[:2]
    say(f"{image}: {width} x {height} px, upright")
    say(WORDS[found.geometry])
    say(f"{count} {'square' if count == 1 else 'squares'} of {side} x {side} px -> {out}")
    return found


def given(data: bytes, where: str, sight: Sight, purpose: str, task: str | None) -> Given:
    """What a model that sees by `sight` is given of an encoded picture."""
    from vlfoundry.infra.data.images.decode import Encoded, picture_size

    size = picture_size(data, where)
    if purpose == "evaluate":
        task = task or (CHAT if sight.chats else "retrieval")
        squares = sight.squares(Encoded(data=data, where=where), task)
        return Given(size_px=size, geometry=sight.geometry(task), squares=squares)
    return Given(
        size_px=size, geometry=sight.geometry("train"), squares=_trained_on(data, where, sight)
    )


def _trained_on(data: bytes, where: str, sight: Sight) -> np.ndarray:
    """As `models.chat.examples` and `infra.data.shards.pairs` do it, but without augmentation."""
    if sight.chats:
        from vlfoundry.infra.data.images.decode import Encoded
        from vlfoundry.models.preprocess.tiling import tile

        return tile(Encoded(data=data, where=where), sight.pictures.tiling(sight.side_px))
    return composite(decode_rgba(data, sight.side_px, where))[None]


def _sight(model: str | None, task: str | None, root: Callable[[], Path]) -> Sight:
    chats = task in (None, CHAT)
    known = [*(name for name in TASKS if name != "train"), CHAT]
    if task is not None and task not in known:
        raise ConfigError(f"--task is {task!r}, expected one of {', '.join(known)}")
    if model is None:
        return _of_params(root()).sight("chat_simple" if chats else "internvl_g")
    from vlfoundry.infra.registry.gto import resolve_model

    kind, config = read_config(resolve_model(model))
    if task == CHAT and "language" not in PARTS[kind]:
        raise ConfigError(f"{model} is of kind {kind}, which does not chat; leave --task out")
    return config.sight(kind)


def _of_params(root: Path) -> InternVLConfig:
    from vlfoundry.stages import sft

    params = load_params(root / "params.yaml")
    needed = {name: params[name] for name in sft.STAGE.parameters}
    return sft.architecture(build(sft.Config, needed))


def _write(squares: np.ndarray, out: Path) -> None:
    from PIL import Image

    try:
        out.mkdir(parents=True, exist_ok=True)
        for number, square in enumerate(squares):
            Image.fromarray(square).save(out / f"{number:02d}.png")
    except OSError as error:
        raise ConfigError(f"{out} cannot be written ({error}); name another folder") from error
