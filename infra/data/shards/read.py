"""Random access to shards, and the order of samples as a function of (seed, global index).

Nothing here depends on the number of ranks or workers, and there is no state to save beyond one
integer: sample g of a run belongs to epoch g // n and stands at position g % n of that epoch's
permutation. A run killed on four ranks goes on on two with the same samples in the same order.
"""

import bisect
import contextlib
import functools
import math
import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import orjson

from vlfoundry.infra.core.errors import DataError
from vlfoundry.infra.core.splitmix import mix64
from vlfoundry.infra.data.shards.write import INDEX_FILE, Sample, parse_index

READ_AHEAD_BYTES = 8 << 20
"""remote: what is asked for at once when samples are read in order, and the longest request"""
GAP_BYTES = 64 << 10
"""remote: bytes between two members that cost less to fetch than another request"""
OPEN_SHARDS = 256
"""local: shards that are mapped at the same time; a process may have 1,024 files open"""
TABLE_SAMPLES = 1 << 17
"""up to so many samples an epoch's order is a table; beyond, it is computed where it is needed"""
ROUNDS = 8

_PLACE = struct.Struct("=5q")
_new = tuple.__new__  # a named tuple's own is a call of Python more

Span = tuple[int, int, int]
"""shard, first byte, number of bytes"""
MemberSpan = tuple[int, int, int, int, int]
"""of a sample: shard; first byte and number of bytes of its picture; the same of its JSON"""
Pair = tuple[bytes, bytes]


class ShardSet(Sequence[Sample]):
    """The samples of a shard folder, in the order in which they were written.

    The folder may be local (memory-mapped) or anything fsspec can address (ranged reads), e.g.
    `s3://bucket/shards/stage1`, or `simplecache::s3://...` to keep whole shards on a local disk.
    Reading one sample costs the same wherever it stands. Remote samples are best asked for
    together (`samples`, or by iterating): their ranges travel at the same time.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        storage_options: dict[str, Any] | None = None,
    ):
        self.folder = os.fspath(folder)
        options = storage_options or {}
        where = f"{self.folder}/{INDEX_FILE}"
        index = parse_index(_read_text(where, options), where)
        self._names: list[str] = [shard["name"] for shard in index["shards"]]
        counts = [len(shard["keys"]) for shard in index["shards"]]
        self._keys: list[str] = [key for shard in index["shards"] for key in shard["keys"]]
        tables = [np.asarray(s["offsets"], np.int64).reshape(-1, 4) for s in index["shards"]]
        if [len(table) for table in tables] != counts or index["samples"] != len(self._keys):
            raise DataError(f"{where}: counts disagree; run the shard stage again")
        spans = np.concatenate([np.empty((0, 4), np.int64), *tables])
        shards = np.repeat(np.arange(len(counts)), counts)
        # Bytes: a row of them costs a third of a row of an array.
        self._places = np.column_stack([shards, spans]).tobytes()
        self._pictures = [name for shard in index["shards"] for name in shard["pictures"]]
        self._digests = [shard["sha256"] for shard in index["shards"]]
        self._storage = _open_storage(
            self.folder, self._names, [shard["bytes"] for shard in index["shards"]], options
        )

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, i: int) -> Sample:  # pyrefly: ignore[bad-override]
        image_bytes, meta = self.members(i)
        parts = self._keys[i], image_bytes, self._parse(i, meta)
        return _new(Sample, parts)  # pyrefly: ignore[bad-specialization]

    def __iter__(self) -> Iterator[Sample]:
        if isinstance(self._storage, _MappedShards):
            yield from map(self.__getitem__, range(len(self)))
            return
        for chunk in self._chunks():
            yield from self.samples(chunk)

    def samples(self, indices: Sequence[int]) -> list[Sample]:
        """Several samples at once, in the order that is asked for.

        Raises:
            DataError: a shard is missing or was cut, or a sample is damaged; names it.
        """
        spans: list[Span] = []
        for i in indices:
            shard, image_at, image_size, meta_at, meta_size = self._span(i)
            spans += [(shard, image_at, image_size), (shard, meta_at, meta_size)]
        parts = self._storage.read(spans)
        return [
            Sample(key=self._keys[i], image_bytes=image, meta=self._parse(i, meta))
            for i, image, meta in zip(indices, parts[::2], parts[1::2], strict=True)
        ]

    def metas(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Caption, language and so on of several samples, without touching the pictures."""
        places = map(self._span, indices)
        parts = self._storage.read([(shard, at, size) for shard, _, _, at, size in places])
        return [self._parse(i, part) for i, part in zip(indices, parts, strict=True)]

    def images(self, indices: Sequence[int]) -> list[bytes]:
        """The encoded pictures alone of several samples."""
        places = map(self._span, indices)
        return self._storage.read([(shard, at, size) for shard, at, size, _, _ in places])

    @functools.cached_property
    def pictures(self) -> np.ndarray:
        """Which picture each sample has, int64 [n]: equal bytes, equal number; numbered as they
        first come."""
        numbers: dict[str, int] = {}
        found = (numbers.setdefault(name, len(numbers)) for name in self._pictures)
        return np.fromiter(found, np.int64, len(self._pictures))

    def members(self, i: int) -> Pair:
        """A sample as it stands in its shard: the encoded picture, and JSON."""
        return self._storage.pair(self._span(i))

    def image_bytes(self, i: int) -> bytes:
        """The encoded picture alone."""
        return self.images([i])[0]

    def meta(self, i: int) -> dict[str, Any]:
        """Caption, language and so on alone, without touching the picture."""
        return self.metas([i])[0]

    def where(self, i: int) -> str:
        """A sample's shard, place in it and key, for messages."""
        shard, start, *_ = self._span(i)
        return f"{self.folder}/{self._names[shard]} at byte {start} (sample {self._keys[i]!r})"

    @contextlib.contextmanager
    def named(self, i: int) -> Iterator[None]:
        """What is wrong with sample `i` inside, such as a picture that cannot be decoded, is raised
        as a DataError that names it."""
        try:
            yield
        except (DataError, OSError, ValueError) as error:
            raise DataError(f"{self.where(i)}: {error}") from error

    @functools.cached_property
    def fingerprint(self) -> str:
        """What the samples are and their order, from the hashes in the index (no data is read)."""
        import hashlib

        return hashlib.sha256("\n".join(self._digests).encode()).hexdigest()

    def _parse(self, i: int, meta: bytes) -> dict[str, Any]:
        try:
            return orjson.loads(meta)
        except ValueError as error:
            raise DataError(f"{self.where(i)}: its metadata is no JSON: {error}") from error

    def _chunks(self) -> Iterator[range]:
        """Samples in order, about READ_AHEAD_BYTES at a time."""
        places = np.frombuffer(self._places, np.int64).reshape(-1, 5)
        ends = np.cumsum(places[:, 2] + places[:, 4]) // READ_AHEAD_BYTES
        breaks = np.flatnonzero(np.diff(ends)) + 1
        for start, stop in zip([0, *breaks], [*breaks, len(self)], strict=True):
            yield range(int(start), int(stop))

    def _span(self, i: int) -> MemberSpan:
        if not 0 <= i < len(self._keys):
            raise IndexError(f"sample {i} of {len(self._keys)}")
        return _PLACE.unpack_from(self._places, _PLACE.size * i)  # pyrefly: ignore[bad-return]


class _Storage(Protocol):
    def read(self, spans: Sequence[Span]) -> list[bytes]: ...

    def pair(self, place: MemberSpan) -> Pair:
        """`read` of a sample's two spans, without a list of them."""
        ...


class _MappedShards:
    """Shards on a local disk, mapped into memory when they are first needed, OPEN_SHARDS at a time
    (a map holds its file open). Reading them instead costs half as much again, in system calls."""

    def __init__(self, folder: str, names: list[str], sizes: list[int]):
        self._folder, self._names, self._sizes = folder, names, sizes
        self._maps: dict[int, mmap.mmap] = {}

    def read(self, spans: Sequence[Span]) -> list[bytes]:
        maps = self._maps
        return [
            (maps.get(shard) or self._map(shard))[start : start + size]
            for shard, start, size in spans
        ]

    def pair(self, place: MemberSpan) -> Pair:
        shard, at, size, then_at, then_size = place
        mapped = self._maps.get(shard) or self._map(shard)
        return mapped[at : at + size], mapped[then_at : then_at + then_size]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # maps do not survive pickling; reopen lazily

    def _map(self, shard: int) -> mmap.mmap:
        path = f"{self._folder}/{self._names[shard]}"
        mapped = _map_file(path)
        _check_size(path, len(mapped), self._sizes[shard])
        while len(self._maps) >= OPEN_SHARDS:
            # Not closed here: another thread may be in a read of it.
            self._maps.pop(next(iter(self._maps)), None)
        self._maps[shard] = mapped
        return mapped


class _RemoteShards:
    """Shards behind fsspec. Ranges that lie close together are one request; all requests of a read
    are under way at the same time, where the file system can do that (S3 can)."""

    def __init__(self, folder: str, names: list[str], sizes: list[int], options: dict[str, Any]):
        self._folder, self._names, self._sizes = folder, names, sizes
        self._options = options
        self._checked: set[int] = set()

    def read(self, spans: Sequence[Span]) -> list[bytes]:
        import fsspec
        from fsspec.utils import merge_offset_ranges

        # Not kept: a file system does not survive a fork, and fsspec remembers it for us.
        fs, folder = fsspec.url_to_fs(self._folder, **self._options)
        paths = [f"{folder}/{self._names[shard]}" for shard, _, _ in spans]
        try:
            self._check(fs, dict(zip((shard for shard, _, _ in spans), paths, strict=True)))
            blocks = merge_offset_ranges(
                paths,
                [start for _, start, _ in spans],
                [start + size for _, start, size in spans],
                max_gap=GAP_BYTES,
                max_block=READ_AHEAD_BYTES,
            )
            contents = fs.cat_ranges(*blocks, on_error="raise")
        except FileNotFoundError as error:
            raise DataError(
                f"a shard of {self._folder} is missing: {error}; upload the folder again"
            ) from error
        begins = list(zip(*blocks[:2], strict=True))
        result = []
        for path, (_, start, size) in zip(paths, spans, strict=True):
            block = bisect.bisect_right(begins, (path, start)) - 1
            offset = start - begins[block][1]
            result.append(contents[block][offset : offset + size])
        return result

    def pair(self, place: MemberSpan) -> Pair:
        shard, at, size, then_at, then_size = place
        first, second = self.read([(shard, at, size), (shard, then_at, then_size)])
        return first, second

    def _check(self, fs: Any, paths: dict[int, str]) -> None:
        """Sizes of shards that are read for the first time."""
        new = [shard for shard in paths if shard not in self._checked]
        for shard, size in zip(new, fs.sizes([paths[shard] for shard in new]), strict=True):
            _check_size(f"{self._folder}/{self._names[shard]}", size, self._sizes[shard])
            self._checked.add(shard)


def _open_storage(
    folder: str, names: list[str], sizes: list[int], options: dict[str, Any]
) -> _Storage:
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    fs, inner = fsspec.url_to_fs(folder, **options)
    if isinstance(fs, LocalFileSystem):
        return _MappedShards(inner, names, sizes)
    return _RemoteShards(folder, names, sizes, options)


def _map_file(path: str) -> mmap.mmap:
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (FileNotFoundError, ValueError) as error:
        raise DataError(f"{path} is missing or empty: {error}") from error


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
            "run the shard stage, or infra.data.shards.write.index_shards on shards of another tool"
        ) from error


def global_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of n samples in one epoch. [n] int64."""
    if n <= TABLE_SAMPLES:
        generator = np.random.Generator(np.random.Philox(key=_key(seed, epoch)))
        return generator.permutation(n)
    return scattered(np.arange(n), n, seed, epoch)


def scattered(positions: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Samples at some positions of an epoch's permutation of any n, without making the rest of it.

    A Feistel network on the grid of a x b >= n cells (each round shifts one coordinate by a hash of
    the other), walked on from cells that are no sample. Source: Black and Rogaway 2002, sections 3
    and 4, with additions modulo a and b. int64 [P] -> int64 [P].
    """
    width = math.isqrt(n - 1) + 1
    height = -(-n // width)
    keys = np.random.Philox(key=_key(seed, epoch)).random_raw(ROUNDS)
    cells = positions.astype(np.uint64)
    outside = np.ones(len(cells), bool)
    while outside.any():
        cells[outside] = _shuffled(cells[outside], width, height, keys)
        outside = cells >= n
    return cells.astype(np.int64)


def _shuffled(cells: np.ndarray, width: int, height: int, keys: np.ndarray) -> np.ndarray:
    row, column = np.divmod(cells, np.uint64(width))
    for first, second in keys.reshape(-1, 2):
        column = (column + mix64(row ^ first) % np.uint64(width)) % np.uint64(width)
        row = (row + mix64(column ^ second) % np.uint64(height)) % np.uint64(height)
    return row * np.uint64(width) + column


class SampleStream:
    """The endless stream of samples of a run; its whole state is (seed, global index)."""

    def __init__(self, n: int, seed: int):
        if n < 1:
            raise DataError(f"a sample stream needs at least one sample, got {n}")
        self.n, self.seed = n, seed
        self._tables: dict[int, np.ndarray] = {}

    def indices(self, start: int, count: int) -> list[tuple[int, int]]:
        """(epoch, index) of the global samples start, start + 1, ..., start + count - 1."""
        return self.at(np.arange(start, start + count))

    def at(self, numbers: np.ndarray) -> list[tuple[int, int]]:
        """(epoch, index) of any global samples: ascending int64 [N]."""
        result: list[tuple[int, int]] = []
        epochs, positions = np.divmod(numbers, self.n)
        for epoch in np.unique(epochs).tolist():
            found = self._samples(epoch, positions[epochs == epoch])
            result += [(epoch, index) for index in found.tolist()]
        return result

    def rank_indices(self, step: int, batch: int, rank: int, ranks: int) -> list[tuple[int, int]]:
        """The contiguous slice of global batch `step` that belongs to `rank` of `ranks`."""
        return self.indices(*rank_slice(step, batch, rank, ranks))

    def _samples(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        if self.n > TABLE_SAMPLES:
            return scattered(positions, self.n, self.seed, epoch)
        if epoch not in self._tables:
            if len(self._tables) >= 2:  # a batch spans at most the end of one epoch and the next
                del self._tables[min(self._tables)]
            self._tables[epoch] = global_order(self.n, self.seed, epoch)
        return self._tables[epoch][positions]


def rank_slice(step: int, batch: int, rank: int, ranks: int) -> tuple[int, int]:
    """First global sample of a rank in global batch `step`, and how many it has."""
    if batch % ranks:
        raise DataError(
            f"a batch of {batch} samples cannot be split over {ranks} ranks; "
            f"expected a multiple of {ranks}"
        )
    share = batch // ranks
    return step * batch + rank * share, share


def _key(seed: int, epoch: int) -> np.ndarray:
    return np.array([seed & 0xFFFFFFFFFFFFFFFF, epoch], dtype=np.uint64)
