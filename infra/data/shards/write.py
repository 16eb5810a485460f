"""WebDataset tar shards with an index, written so that equal samples give equal bytes.

A shard folder holds `00000.tar`, `00001.tar`, ... and `index.json`. Each sample is two tar
members, `<key>.webp` and `<key>.json`; any WebDataset reader can stream them. The index adds
what a tar lacks: where each member's bytes begin, so that a sample is one `pread` away, and which
samples have the same picture.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vlfoundry.infra.core.config import canonical_json
from vlfoundry.infra.core.errors import DataError

INDEX_FILE = "index.json"
INDEX_FORMAT = "vlfoundry.shards.v2"
IMAGE_SUFFIX = ".webp"
META_SUFFIX = ".json"
BLOCK = 512


class Sample(NamedTuple):
    """One training sample as it stands in a shard."""

    key: str
    """Name of the sample inside its shard folder; unique there, without a dot."""
    image_bytes: bytes
    """The encoded picture (WebP, RGBA kept)."""
    meta: dict[str, Any]
    """Caption, language, source and what else the maker of the shard recorded."""


def write_shards(
    folder: str | Path, samples: Iterable[Sample], samples_per_shard: int = 4096
) -> dict[str, Any]:
    """Write `samples` in their order as shards of `samples_per_shard`; return the index.

    The folder is emptied of older shards first. Raises DataError for a key with a dot or slash
    (a tar reader would split the name there) or one that occurs twice.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("*.tar"), folder / INDEX_FILE]:
        old.unlink(missing_ok=True)
    shards, seen = [], set()
    for number, batch in enumerate(_batches(samples, samples_per_shard)):
        for sample in batch:
            _check_key(sample.key, seen)
        shards.append(_write_shard(folder / f"{number:05d}.tar", batch))
    index = {
        "format": INDEX_FORMAT,
        "samples": sum(len(shard["keys"]) for shard in shards),
        "shards": shards,
    }
    (folder / INDEX_FILE).write_text(canonical_json(index) + "\n", encoding="utf-8")
    return index


def index_shards(folder: str | Path) -> dict[str, Any]:
    """Build the index of shards that another tool wrote, by one scan of the tar headers.

    Samples must be pairs of one picture and one `.json` next to each other, as in WebDataset.
    """
    shards = []
    for path in sorted(Path(folder).glob("*.tar")):
        shards.append(_scan_shard(path))
    if not shards:
        raise DataError(f"{folder} holds no .tar file; expected WebDataset shards")
    samples = sum(len(shard["keys"]) for shard in shards)
    return {"format": INDEX_FORMAT, "samples": samples, "shards": shards}


def parse_index(text: str, where: str) -> dict[str, Any]:
    """Read the text of an index file. Raises DataError if it is not one."""
    try:
        index = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is no JSON: {error}; run the shard stage again") from error
    if not isinstance(index, dict) or index.get("format") != INDEX_FORMAT:
        got = index.get("format") if isinstance(index, dict) else type(index).__name__
        raise DataError(f"{where}: format is {got!r}, expected {INDEX_FORMAT!r}")
    return index


def _write_shard(path: Path, samples: list[Sample]) -> dict[str, Any]:
    keys, offsets, pictures = [], [], []
    buffer = io.BytesIO()
    for sample in samples:
        meta = canonical_json(sample.meta).encode()
        image_at = _append(buffer, sample.key + IMAGE_SUFFIX, sample.image_bytes)
        meta_at = _append(buffer, sample.key + META_SUFFIX, meta)
        keys.append(sample.key)
        offsets += [image_at, len(sample.image_bytes), meta_at, len(meta)]
        pictures.append(picture_id(sample.image_bytes))
    buffer.write(b"\0" * (2 * BLOCK))
    data = buffer.getvalue()
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    partial.replace(path)
    digest = hashlib.sha256(data).hexdigest()
    return {
        "name": path.name,
        "sha256": digest,
        "bytes": len(data),
        "keys": keys,
        "offsets": offsets,
        "pictures": pictures,
    }


def picture_id(image_bytes: bytes | memoryview) -> str:
    """What samples with the same encoded picture have in common: 64 bits of a hash."""
    return hashlib.sha256(image_bytes).hexdigest()[:16]


def _append(buffer: io.BytesIO, name: str, data: bytes) -> int:
    """Append one tar member and return where its content begins."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    member.mode = 0o644
    member.mtime = 0
    buffer.write(member.tobuf(format=tarfile.USTAR_FORMAT))
    start = buffer.tell()
    buffer.write(data)
    buffer.write(b"\0" * (-len(data) % BLOCK))
    return start


def _scan_shard(path: Path) -> dict[str, Any]:
    keys: list[str] = []
    offsets: list[int] = []
    with tarfile.open(path, "r:") as archive:
        members = [member for member in archive if member.isfile()]
    if len(members) % 2:
        raise DataError(f"{path} holds {len(members)} files, expected pairs of picture and .json")
    for first, second in zip(members[::2], members[1::2], strict=True):
        image, meta = (second, first) if first.name.endswith(META_SUFFIX) else (first, second)
        key = meta.name.removesuffix(META_SUFFIX)
        if not meta.name.endswith(META_SUFFIX) or image.name.rpartition(".")[0] != key:
            raise DataError(
                f"{path}: {first.name!r} and {second.name!r} are no pair of picture and .json"
            )
        keys.append(key)
        offsets += [image.offset_data, image.size, meta.offset_data, meta.size]
    data = memoryview(path.read_bytes())
    images = zip(offsets[::4], offsets[1::4], strict=True)
    return {
        "name": path.name,
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "keys": keys,
        "offsets": offsets,
        "pictures": [picture_id(data[start : start + size]) for start, size in images],
    }


def _check_key(key: str, seen: set[str]) -> None:
    if not key or "." in key or "/" in key or len(key) > 90:
        raise DataError(f"sample key {key!r}: expected 1-90 characters without '.' and '/'")
    if key in seen:
        raise DataError(f"sample key {key!r} occurs twice; keys must be unique in a shard folder")
    seen.add(key)


def _batches(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    batch: list[Sample] = []
    for sample in samples:
        batch.append(sample)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
