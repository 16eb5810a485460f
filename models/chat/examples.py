"""Conversations as a model of ours learns them: token ids, labels, and the tiles of their pictures.

Letters: B examples, T tokens, N tiles, S side of a tile (px).
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from vlfoundry.infra.core.errors import DataError
from vlfoundry.infra.core.roots import Root
from vlfoundry.infra.data.images.decode import Encoded
from vlfoundry.models.chat.dialogue import Dialogue
from vlfoundry.models.chat.jsonl import ChatFile, Problem, Sample
from vlfoundry.models.chat.labels import IGNORE
from vlfoundry.models.chat.visual import frame_indices
from vlfoundry.models.preprocess.tiling import Tiling, picture_size, plan, share_tiles, tile
from vlfoundry.models.tokenizer import pad

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
LONGEST_TOKEN = 256
"""letters; no vocabulary has a longer piece"""


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


class LineError(DataError):
    """Training cannot use a line of a chat file."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


class Conversations:
    """The samples of one chat file.

    Args:
        path: of the file.
        root: what its pictures are relative to: a folder or a URL; None: the file's folder; `/`:
            its lines hold absolute paths.
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
        self._root = Root(root or path.parent)
        self.file = ChatFile(path, absolute_paths=self._root.absolute)
        self._dialogue, self._tiling = dialogue, tiling
        self._tile_tokens, self._max_tokens = tile_tokens, max_tokens

    def __len__(self) -> int:
        return len(self.file)

    def example(self, index: int, draw: np.random.Generator) -> Example:
        """Sample `index`; `draw` decides which frames of a video are seen.

        Raises:
            DataError: the line is not in the format, a picture cannot be read (then, or when it is
                decoded), or the example is too long; names file and line.
        """
        sample = self.file[index]
        names = self._seen(sample, index, draw)
        tiling = self._share(len(names), is_video=bool(sample.video))
        field = "video" if sample.video else "image"
        sizes = sample.sizes_px or [self._size(name, index, field) for name in names]
        tiles = [plan(*size, tiling).tiles for size in sizes]
        ids, labels = self._row(sample, index, tiles)
        return Example(
            ids=ids,
            labels=labels,
            tiles=sum(tiles),
            pictures=partial(self._decoded, names, tiles, tiling, index, field),
        )

    def check(self, index: int, *, pictures: bool = True) -> Problem | None:
        """What training would stop at, or would learn wrong, in line `index`; None: nothing.

        pictures: decode them, every frame of a video; without it only the line itself is looked at.
        """
        sample = self.file.look(index)
        if isinstance(sample, Problem):
            return sample
        try:
            if pictures or not (sample.images or sample.video):
                self._check_pictures(sample, index)
            elif sample.sizes_px:
                tiling = self._share(len(sample.images), is_video=False)
                self._row(sample, index, [plan(*size, tiling).tiles for size in sample.sizes_px])
        except LineError as error:
            return error.problem
        return None

    def _check_pictures(self, sample: Sample, index: int) -> None:
        for place, (name, said) in enumerate(zip(sample.images, sample.sizes_px, strict=False)):
            found = self._size(name, index, "image")
            if said != found:
                field = "width" if said[0] != found[0] else "height"
                field = field if len(sample.images) == 1 else f"{field}[{place}]"
                raise self._error(
                    index,
                    field,
                    f"got {said[0]} x {said[1]} px, but {name} is {found[0]} x {found[1]} px; "
                    "correct `width` and `height`, or leave them out",
                )
        example = self.example(index, np.random.default_rng(index))
        if sample.video:  # training draws other frames each time
            for name in self._frames(sample.video, index):
                self._decoded([name], [1], self._share(1, is_video=True), index, "video")
        else:
            example.pictures()

    def _error(self, index: int, field: str, message: str) -> LineError:
        return LineError(self.file.problem(index, field, message))

    def _seen(self, sample: Sample, index: int, draw: np.random.Generator) -> list[str]:
        """The pictures of a sample, of a video the frames that are seen."""
        if not sample.video:
            return list(sample.images)
        frames = self._frames(sample.video, index)
        return [frames[i] for i in frame_indices(len(frames), draw=draw)]

    def _share(self, pictures: int, *, is_video: bool) -> Tiling:
        """How each picture of a sample that has so many is cut."""
        most = 1 if is_video else share_tiles(self._tiling.max_tiles, max(1, pictures))
        least = min(self._tiling.min_tiles, most)
        return dataclasses.replace(self._tiling, min_tiles=least, max_tiles=most)

    def _row(self, sample: Sample, index: int, tiles: Sequence[int]) -> tuple[list[int], list[int]]:
        """Ids and labels; `tiles` of each picture or frame."""
        messages = sample.with_frames(len(tiles)) if sample.video else sample.messages
        visual = [n * self._tile_tokens for n in tiles]
        letters = sum(len(text) for _, text in messages)
        if letters > self._max_tokens * LONGEST_TOKEN:  # megabytes take minutes to encode
            raise self._error(
                index,
                "conversations",
                f"{letters:,} letters, which are more than {self._max_tokens} tokens "
                "(sft.max_tokens); shorten the conversation",
            )
        ids, labels = self._dialogue.conversation(messages, visual)
        if len(ids) > self._max_tokens:
            raise self._error(
                index,
                "conversations",
                f"{len(ids)} tokens, {sum(visual)} of them of {sum(tiles)} tiles of {len(tiles)} "
                f"pictures; expected at most {self._max_tokens} (sft.max_tokens): raise it, lower "
                "sft.max_tiles, or shorten the conversation",
            )
        return ids, labels

    def _decoded(
        self,
        names: Sequence[str],
        expected: Sequence[int],
        tiling: Tiling,
        index: int,
        field: str,
    ) -> np.ndarray:
        side = tiling.tile_px
        decoded = [np.empty((0, side, side, 3), np.uint8)]
        for name, count in zip(names, expected, strict=True):
            with self._named(index, field, name):
                tiles = tile(self._encoded(name), tiling)
                if len(tiles) != count:
                    raise DataError(
                        f"its width and height say {count} tiles, but it has {len(tiles)}; "
                        "correct `width` and `height`, or leave them out"
                    )
            decoded.append(tiles)
        return np.concatenate(decoded)

    def _size(self, name: str, index: int, field: str) -> tuple[int, int]:
        with self._named(index, field, name):
            return picture_size(self._encoded(name))

    def _encoded(self, name: str) -> Encoded:
        return Encoded(data=self._root.read(name), where=name)

    def _frames(self, video: str, index: int) -> list[str]:
        """Names of the frames of a video, which is a folder of pictures, in the order of time."""
        folder = video.rstrip("/")
        try:
            names = self._root.names(folder)
        except DataError as error:
            raise self._error(
                index,
                "video",
                f"{video} below {self._root} is not a folder of frames: {error}; extract them, "
                "e.g. `ffmpeg -i a.mp4 a/%05d.jpg`",
            ) from error
        frames = sorted((n for n in names if n.lower().endswith(PICTURES)), key=in_order_of_numbers)
        if not frames:
            raise self._error(
                index,
                "video",
                f"{video} below {self._root} holds no pictures; expected its frames "
                f"({', '.join(PICTURES)}), in the order of the numbers in their names",
            )
        return [f"{folder}/{name}" for name in frames]

    @contextlib.contextmanager
    def _named(self, index: int, field: str, picture: str) -> Iterator[None]:
        """What is wrong with a picture is raised with the line that names it."""
        try:
            yield
        except (OSError, DataError) as error:
            what = str(error).removeprefix(f"{picture}: ")
            raise self._error(index, field, f"{picture}: {what}") from error


def in_order_of_numbers(name: str) -> list[tuple[int, str]]:
    """A key that sorts clip_2 before clip_10, however the numbers are padded; what has no number
    is sorted by its letters. (The official reader of frame folders sorts by number, too.)"""
    return [
        (int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)
    ]


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
