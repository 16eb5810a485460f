"""Data sets that Megatron-Energon has prepared, read without it.

`energon prepare` leaves WebDataset shards and, in `.nv-meta/index.sqlite`, the place of every part
of every sample. That is all a `ShardSet` needs, which then gives them what energon has not: a
shuffle over all samples, and a state of two integers that any number of ranks can go on from.

    index = index_energon("/data/coco")
    Path("/data/coco/index.json").write_text(canonical_json(index))      # then ShardSet(...)

Source: the files that megatron-energon 7.4.1 writes.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlfoundry.infra.core.config import load_params
from vlfoundry.infra.core.errors import DataError
from vlfoundry.infra.data.shards.write import INDEX_FORMAT, picture_id

META_FOLDER = ".nv-meta"
PICTURES = ("jpg", "jpeg", "png", "webp")
META = "json"
QUERY = """
    SELECT sample_key, part_name, content_byte_offset, content_byte_size
    FROM samples JOIN sample_parts USING (tar_file_id, sample_index)
    WHERE tar_file_id = ? ORDER BY sample_index, content_byte_offset
"""

Part = tuple[str, str, int, int]
"""key, name of the part, where it begins in the shard, bytes"""


def index_energon(folder: str | Path, split: str = "train") -> dict[str, Any]:
    """Index of one split of a prepared data set, as `data.shards.write.index_shards` gives it.

    A sample is its first picture and its part `json`; other parts are left alone.

    Raises:
        DataError: the folder is not prepared, has no such split, or a sample lacks a part.
    """
    folder = Path(folder)
    numbers = {name: i for i, name in enumerate(_shard_counts(folder))}
    names, excluded = _split(folder, split)
    address = f"file:{folder / META_FOLDER / 'index.sqlite'}?mode=ro&immutable=1"
    try:
        with contextlib.closing(sqlite3.connect(address, uri=True)) as database:
            shards = [
                _shard(folder, name, database.execute(QUERY, [numbers[name]]), excluded)
                for name in names
            ]
    except (sqlite3.Error, KeyError) as error:
        raise DataError(
            f"{folder}: energon's index does not fit its split: {error!r}; prepare it again"
        ) from error
    return {
        "format": INDEX_FORMAT,
        "samples": sum(len(shard["keys"]) for shard in shards),
        "shards": shards,
    }


def _shard_counts(folder: Path) -> dict[str, int]:
    """Shards in the order in which the index numbers them."""
    path = folder / META_FOLDER / ".info.json"
    if not path.is_file():
        raise DataError(f"{path} does not exist; run `energon prepare` (7 or later) on {folder}")
    return json.loads(path.read_text(encoding="utf-8"))["shard_counts"]


def _split(folder: Path, split: str) -> tuple[list[str], set[str]]:
    """Shards of a split, and the samples (`shard/key`) that are left out of it."""
    config = load_params(folder / META_FOLDER / "split.yaml")
    parts = config["split_parts"]
    if split not in parts:
        raise DataError(f"{folder} has no split {split!r}; it has {sorted(parts)}")
    excluded = {name for pattern in config["exclude"] for name in _expanded(pattern)}
    names = [name for pattern in parts[split] for name in _expanded(pattern)]
    return [name for name in names if name not in excluded], excluded


def _expanded(pattern: str) -> Iterator[str]:
    """`a_{000..012}.tar` and `{a,b}.tar` to names."""
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if not braces:
        yield pattern
        return
    first, dots, last = braces[1].partition("..")
    options = (
        [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
        if dots
        else braces[1].split(",")
    )
    for option in options:
        yield from _expanded(pattern[: braces.start()] + option + pattern[braces.end() :])


def _shard(folder: Path, name: str, rows: sqlite3.Cursor, excluded: set[str]) -> dict[str, Any]:
    keys: list[str] = []
    offsets: list[int] = []
    for key, group in itertools.groupby(rows, key=lambda row: row[0]):
        if f"{name}/{key}" in excluded:
            continue
        parts: list[Part] = list(group)
        picture = next((part for part in parts if part[1].lower() in PICTURES), None)
        meta = next((part for part in parts if part[1] == META), None)
        if picture is None or meta is None:
            raise DataError(
                f"{folder / name}: sample {key!r} has the parts {[part[1] for part in parts]}, "
                f"expected {META} and one of {list(PICTURES)}"
            )
        keys.append(key)
        offsets += [*picture[2:], *meta[2:]]
    data = memoryview((folder / name).read_bytes())
    images = zip(offsets[::4], offsets[1::4], strict=True)
    return {
        "name": name,
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "keys": keys,
        "offsets": offsets,
        "pictures": [picture_id(data[start : start + size]) for start, size in images],
    }
