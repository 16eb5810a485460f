"""Random access to shards, and the order of samples as a function of (seed, global index).

Nothing here depends on the number of ranks or workers, and there is no state to save beyond one
integer: sample g of a run belongs to epoch g // n and stands at position g % n of that epoch's
permutation. A run killed on four ranks goes on on two with the same samples in the same order.
"""

import functools
import json
import mmap
import os
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from infra.errors import DataError
from infra.shards import INDEX_FILE, Sample, parse_index


class ShardSet(Sequence[Sample]):
    """The samples of a shard folder, in the order in which they were written.

    The folder may be local (memory-mapped) or anything fsspec can address (ranged reads), e.g.
    `s3://bucket/shards/stage1`. Reading one sample costs the same wherever it stands.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        storage_options: dict[str, Any] | None = None,
    ):
        self.folder = os.fspath(folder)
        self._options = storage_options or {}
        where = f"{self.folder}/{INDEX_FILE}"
        index = parse_index(_read_text(where, self._options), where)
        self._names: list[str] = [shard["name"] for shard in index["shards"]]
        counts = [len(shard["keys"]) for shard in index["shards"]]
        self._first = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._keys: list[str] = [key for shard in index["shards"] for key in shard["keys"]]
        tables = [np.asarray(s["offsets"], np.int64).reshape(-1, 4) for s in index["shards"]]
        self._spans = np.concatenate(tables) if tables else np.empty((0, 4), np.int64)
        if len(self._spans) != len(self._keys) or index["samples"] != len(self._keys):
            raise DataError(f"{where}: counts disagree; run the shard stage again")
        self._digests = [shard["sha256"] for shard in index["shards"]]
        self._sizes = [shard["bytes"] for shard in index["shards"]]
        self._readers: dict[int, _Reader] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, i: int) -> Sample:  # pyrefly: ignore[bad-override]
        image_bytes, meta = self._members(i)
        return Sample(key=self._keys[i], image_bytes=image_bytes, meta=json.loads(meta))

    def image_bytes(self, i: int) -> bytes:
        """The encoded picture alone."""
        shard, (start, size, _, _) = self._locate(i)
        return self._reader(shard).read(start, size)

    def meta(self, i: int) -> dict[str, Any]:
        """Caption, language and so on alone, without touching the picture."""
        shard, (_, _, start, size) = self._locate(i)
        return json.loads(self._reader(shard).read(start, size))

    @functools.cached_property
    def fingerprint(self) -> str:
        """What the samples are and their order, from the hashes in the index (no data is read)."""
        import hashlib

        return hashlib.sha256("\n".join(self._digests).encode()).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "_readers": {},
        }  # maps do not survive pickling; reopen lazily

    def _members(self, i: int) -> tuple[bytes, bytes]:
        shard, (image_at, image_size, meta_at, meta_size) = self._locate(i)
        reader = self._reader(shard)
        if reader.is_local:
            return reader.read(image_at, image_size), reader.read(meta_at, meta_size)
        start = min(image_at, meta_at)  # one request over the network for the two members
        end = max(image_at + image_size, meta_at + meta_size)
        both = reader.read(start, end - start)
        image = both[image_at - start : image_at - start + image_size]
        return image, both[meta_at - start : meta_at - start + meta_size]

    def _locate(self, i: int) -> tuple[int, list[int]]:
        if not 0 <= i < len(self._keys):
            raise IndexError(f"sample {i} of {len(self._keys)}")
        shard = int(self._first.searchsorted(i, side="right")) - 1
        return shard, self._spans[i].tolist()

    def _reader(self, shard: int) -> "_Reader":
        reader = self._readers.get(shard)
        if reader is None:
            path = f"{self.folder}/{self._names[shard]}"
            reader = _open_reader(path, self._sizes[shard], self._options)
            self._readers[shard] = reader
        return reader


class _Reader(Protocol):
    is_local: bool

    def read(self, start: int, size: int) -> bytes: ...


class _MappedFile:
    is_local = True

    def __init__(self, path: str, expected_bytes: int):
        try:
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (FileNotFoundError, ValueError) as error:
            raise DataError(f"{path} is missing or empty: {error}") from error
        _check_size(path, len(self._map), expected_bytes)

    def read(self, start: int, size: int) -> bytes:
        return self._map[start : start + size]


class _RemoteFile:
    is_local = False

    def __init__(self, fs: Any, path: str, expected_bytes: int):
        self._fs, self._path = fs, path
        _check_size(path, fs.size(path), expected_bytes)

    def read(self, start: int, size: int) -> bytes:
        return self._fs.cat_file(self._path, start=start, end=start + size)


def _open_reader(path: str, expected_bytes: int, options: dict[str, Any]) -> _Reader:
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    fs, inner = fsspec.url_to_fs(path, **options)
    if isinstance(fs, LocalFileSystem):
        return _MappedFile(inner, expected_bytes)
    return _RemoteFile(fs, inner, expected_bytes)


def _check_size(path: str, got: int, expected: int) -> None:
    if got != expected:
        raise DataError(
            f"{path} has {got} bytes, its index says {expected}; the shard was cut or replaced: "
            "run the shard stage (or `dvc checkout`) again"
        )


def _read_text(path: str, options: dict[str, Any]) -> str:
    import fsspec

    try:
        with fsspec.open(path, "r", encoding="utf-8", **options) as file:
            return file.read()  # pyrefly: ignore[missing-attribute]
    except FileNotFoundError as error:
        raise DataError(
            f"{path} does not exist; expected a folder of shards with {INDEX_FILE}: "
            "run the shard stage, or `infra.shards.index_shards` on shards of another tool"
        ) from error


def global_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of n samples in one epoch. [n] int64."""
    generator = np.random.Generator(np.random.Philox(key=_key(seed, epoch)))
    return generator.permutation(n)


class SampleStream:
    """The endless stream of samples of a run; its whole state is (seed, global index)."""

    def __init__(self, n: int, seed: int):
        if n < 1:
            raise DataError(f"a sample stream needs at least one sample, got {n}")
        self.n, self.seed = n, seed
        self._orders: dict[int, np.ndarray] = {}

    def indices(self, start: int, count: int) -> list[tuple[int, int]]:
        """(epoch, index) of the global samples start, start + 1, ..., start + count - 1."""
        result = []
        for g in range(start, start + count):
            epoch, position = divmod(g, self.n)
            result.append((epoch, int(self._order(epoch)[position])))
        return result

    def rank_indices(self, step: int, batch: int, rank: int, ranks: int) -> list[tuple[int, int]]:
        """The contiguous slice of global batch `step` that belongs to `rank` of `ranks`."""
        if batch % ranks:
            raise DataError(
                f"a batch of {batch} samples cannot be split over {ranks} ranks; "
                f"expected a multiple of {ranks}"
            )
        share = batch // ranks
        return self.indices(step * batch + rank * share, share)

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            if len(self._orders) >= 2:  # a batch spans at most the end of one epoch and the next
                del self._orders[min(self._orders)]
            self._orders[epoch] = global_order(self.n, self.seed, epoch)
        return self._orders[epoch]


def _key(seed: int, epoch: int) -> np.ndarray:
    return np.array([seed & 0xFFFFFFFFFFFFFFFF, epoch], dtype=np.uint64)
