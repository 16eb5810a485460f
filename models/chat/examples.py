"""Conversations as a model of ours learns them: token ids, labels, and the tiles of their pictures.

Letters: B examples, T tokens, N tiles, S side of a tile (px).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from infra.decode import Encoded
from infra.errors import DataError
from models.chat.dialogue import Dialogue
from models.chat.jsonl import ChatFile
from models.chat.labels import IGNORE
from models.chat.visual import frame_indices
from models.tiling import Tiling, picture_size, plan, share_tiles, tile
from models.tokenizer import pad

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


@dataclass(frozen=True, kw_only=True)
class Example:
    """One conversation, ready to be batched; its pictures are not decoded yet."""

    ids: list[int]
    """T"""
    labels: list[int]
    """T; -100 but on the answers and their ends"""
    tiles: int
    """N"""
    pictures: Callable[[], np.ndarray]
    """decodes the tiles, uint8 [N, S, S, 3], in the order of their places"""


class Conversations:
    """The samples of one chat file.

    Args:
        path: of the file.
        root: what its pictures are relative to: a folder or a URL; None: the file's folder.
        dialogue: how the model is spoken to.
        tiling: of a sample's only picture; several share its tiles.
        tile_tokens: visual tokens of a tile.
        max_tokens: longest example.
    """

    def __init__(
        self,
        path: Path,
        root: str | None,
        dialogue: Dialogue,
        *,
        tiling: Tiling,
        tile_tokens: int,
        max_tokens: int,
    ) -> None:
        self._file, self._root = ChatFile(path), root or str(path.parent)
        self._dialogue, self._tiling = dialogue, tiling
        self._tile_tokens, self._max_tokens = tile_tokens, max_tokens

    def __len__(self) -> int:
        return len(self._file)

    def example(self, index: int, draw: np.random.Generator) -> Example:
        """Sample `index`; `draw` decides which frames of a video are seen.

        Raises:
            DataError: the line is not in the format, a picture cannot be read (then, or when it is
                decoded), or the example is too long; names file and line.
        """
        sample = self._file[index]
        where = f"{self._file.path}:{index + 1}"
        if sample.video:
            names = self._frames(sample.video, draw, where)
            messages, most = sample.with_frames(len(names)), 1
        else:
            names, messages = list(sample.images), sample.messages
            most = share_tiles(self._tiling.max_tiles, max(1, len(names)))
        least = min(self._tiling.min_tiles, most)
        tiling = dataclasses.replace(self._tiling, min_tiles=least, max_tiles=most)
        sizes = sample.sizes_px or [self._size(name, where) for name in names]
        tiles = [plan(*size, tiling).tiles for size in sizes]
        visual = [n * self._tile_tokens for n in tiles]
        ids, labels = self._dialogue.conversation(messages, visual)
        if len(ids) > self._max_tokens:
            raise DataError(
                f"{where}: {len(ids)} tokens, {sum(visual)} of them of "
                f"{len(names)} pictures; expected at most {self._max_tokens} (sft.max_tokens): "
                "raise it, lower sft.max_tiles, or cut the conversation"
            )
        return Example(
            ids=ids,
            labels=labels,
            tiles=sum(tiles),
            pictures=partial(self._decoded, names, tiles, tiling, where),
        )

    def _decoded(
        self, names: Sequence[str], expected: Sequence[int], tiling: Tiling, where: str
    ) -> np.ndarray:
        side = tiling.tile_px
        decoded = [np.empty((0, side, side, 3), np.uint8)]
        for name, count in zip(names, expected, strict=True):
            with _named(where, name):
                tiles = tile(self._encoded(name), tiling)
                if len(tiles) != count:
                    raise DataError(
                        f"its width and height say {count} tiles, but it has {len(tiles)}; "
                        "correct `width` and `height`, or leave them out"
                    )
            decoded.append(tiles)
        return np.concatenate(decoded)

    def _size(self, name: str, where: str) -> tuple[int, int]:
        with _named(where, name):
            return picture_size(self._encoded(name))

    def _encoded(self, name: str) -> Encoded:
        return Encoded(data=self._read(name), where=name)

    def _read(self, name: str) -> bytes:
        import fsspec

        with fsspec.open(f"{self._root}/{name}", "rb") as stream:
            return stream.read()

    def _frames(self, video: str, draw: np.random.Generator, where: str) -> list[str]:
        """Names of the frames that are seen of a video, which is a folder of pictures."""
        import fsspec

        fs, folder = fsspec.url_to_fs(f"{self._root}/{video}")
        try:
            names = sorted(path.rpartition("/")[2] for path in fs.ls(folder, detail=False))
        except OSError as error:
            raise DataError(
                f"{where}: video: {video} below {self._root} is not a folder of frames: {error}"
            ) from error
        frames = [name for name in names if name.lower().endswith(PICTURES)]
        if not frames:
            raise DataError(
                f"{where}: video: {video} below {self._root} holds no pictures; "
                f"expected its frames ({', '.join(PICTURES)}), in the order of their names"
            )
        return [f"{video.rstrip('/')}/{frames[i]}" for i in frame_indices(len(frames), draw=draw)]


@contextlib.contextmanager
def _named(where: str, picture: str) -> Iterator[None]:
    """What is wrong with a picture is raised with the line that names it."""
    try:
        yield
    except (OSError, DataError) as error:
        what = str(error).removeprefix(f"{picture}: ")
        raise DataError(f"{where}: image: {picture}: {what}") from error


def padded(examples: Sequence[Example], pad_id: int) -> dict[str, np.ndarray]:
    """Examples as rows of one length: `ids` and `labels` int64 [B, T], `pictures` uint8
    [N, S, S, 3]."""
    ids, _ = pad([example.ids for example in examples], pad_id)
    labels, _ = pad([example.labels for example in examples], IGNORE)
    return {"ids": ids, "labels": labels, "pictures": _all_tiles(examples)}


def packed(examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """Examples one behind another in one row: `ids` and `labels` int64 [1, T], `cu_seqlens` int32
    [B + 1] (where each begins, and where the last ends), `tiles` int64 [B] (how many each has)."""
    ends = np.cumsum([0] + [len(example.ids) for example in examples])
    return {
        "ids": np.array([[i for example in examples for i in example.ids]], np.int64),
        "labels": np.array([[i for example in examples for i in example.labels]], np.int64),
        "cu_seqlens": ends.astype(np.int32),
        "tiles": np.array([example.tiles for example in examples], np.int64),
        "pictures": _all_tiles(examples),
    }


def _all_tiles(examples: Sequence[Example]) -> np.ndarray:
    return np.concatenate([example.pictures() for example in examples])
