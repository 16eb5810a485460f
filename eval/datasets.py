"""Reads "a folder in this format": a concept set or a pair set.

Concept set: one or more Parquet files of artwork (`id`, `concept`, `image` {bytes, path}) and
`concepts.parquet` (`concept`, `name` [{lang, text}], optional `keywords` [{lang, text: [..]}],
`group`, `subgroup`, `char`). The classes of a language are the concepts that have a drawing there
and a name in that language.

Pair set: Parquet files with `id`, `image` {bytes, path}, `captions` [{lang, text}] and an optional
`label`.

Where `bytes` is empty the picture is read from `path`, relative to the folder.
"""

import abc
import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from eval.pictures import decode_squares, pixel_key
from infra.decode import Encoded
from infra.errors import DataError

PICTURE_ROWS, TEXT_ROWS = 16, 1024
"""rows of a file that are read at once"""
CONCEPTS_FILE = "concepts.parquet"
FORMATS = (
    "expected a concept set (artwork Parquet with id, concept, image {bytes, path}, and "
    "concepts.parquet) or a pair set (Parquet with id, image {bytes, path}, captions "
    "[{lang, text}])"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture with what is known of it."""

    id: str
    """Unique inside the folder."""
    source: str
    """Stem of the Parquet file that it comes from."""
    data: bytes
    """The encoded file."""
    concept: str = ""
    """Key of its class in a concept set."""
    label: str = ""
    """Label of a pair set, or empty."""
    captions: tuple[tuple[str, str], ...] = ()
    """(language, text) of a pair set."""

    @property
    def encoded(self) -> Encoded:
        """What a model is shown."""
        return Encoded(data=self.data, where=self.id)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Concept:
    """What is known of a class."""

    concept: str
    """Key, e.g. its code points."""
    names: dict[str, str]
    """Language to name."""
    keywords: dict[str, tuple[str, ...]]
    """Language to keywords; empty where there are none."""
    group: str = ""
    """Coarse class, empty if unknown."""
    subgroup: str = ""
    """Finer class, empty if unknown."""


class DataFolder(abc.ABC):
    """Pictures of one folder, in the order of the files and their rows."""

    kind: str

    @property
    @abc.abstractmethod
    def languages(self) -> tuple[str, ...]:
        """Languages of the texts, those with most texts first."""

    def __init__(self, folder: Path, pictures: Sequence[Picture]) -> None:
        self.folder, self.pictures = folder, tuple(pictures)

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def sources(self) -> tuple[str, ...]:
        """Stems of the files that the pictures come from."""
        return tuple(dict.fromkeys(picture.source for picture in self.pictures))

    @cached_property
    def _files(self) -> tuple[list[int], np.ndarray]:
        """The first picture of each distinct file, and which of these each picture has, int64 [N].

        Rows that share a file are decoded and shown once.
        """
        number: dict[bytes, int] = {}
        first: list[int] = []
        which = np.empty(len(self.pictures), np.int64)
        for index, picture in enumerate(self.pictures):
            which[index] = number.setdefault(picture.data, len(number))
            if which[index] == len(first):
                first.append(index)
        return first, which

    def by_file(
        self, encode: Callable[[list[Encoded]], np.ndarray], size: int
    ) -> np.ndarray:
        """What `encode` makes of the pictures as they are stored, `size` at a time: [N, ...]."""
        first, which = self._files
        shown = [self.pictures[index].encoded for index in first]
        parts = [encode(shown[start : start + size]) for start in range(0, len(shown), size)]
        return np.concatenate(parts)[which]

    def batches(self, side_px: int, size: int, *, keep_alpha: bool = False) -> Iterator[np.ndarray]:
        """Decoded squares, `size` at a time: uint8 [<=size, S, S, 3 or 4]."""
        for start in range(0, len(self.pictures), size):
            part = self.pictures[start : start + size]
            yield decode_squares(
                [p.data for p in part], side_px, names=[p.id for p in part], keep_alpha=keep_alpha
            )

    def squares(self, side_px: int, *, keep_alpha: bool = False) -> np.ndarray:
        """All pictures at once: for sets of small drawings."""
        batches = list(self.batches(side_px, 256, keep_alpha=keep_alpha))
        return np.concatenate(batches)

    @cached_property
    def look(self) -> np.ndarray:
        """int64 [N]: equal numbers for pictures that are the same, pixel by pixel."""
        numbers: dict[bytes, int] = {}
        first, which = self._files
        keys = (pixel_key(self.pictures[i].data, self.pictures[i].id) for i in first)
        of_file = [numbers.setdefault(key, len(numbers)) for key in keys]
        return np.array(of_file, np.int64)[which]

    def facts(self) -> dict[str, Any]:
        """What a score file says of its data."""
        import hashlib

        digest = hashlib.sha256()
        for picture in self.pictures:
            digest.update(picture.id.encode() + b"\0" + hashlib.sha256(picture.data).digest())
        return {
            "folder": self.folder.name,
            "sources": list(self.sources),
            "pictures": len(self.pictures),
            "fingerprint": digest.hexdigest(),
        }


class ConceptSet(DataFolder):
    """Drawings of named concepts."""

    kind = "concept set"

    def __init__(
        self, folder: Path, pictures: Sequence[Picture], concepts: dict[str, Concept]
    ) -> None:
        super().__init__(folder, pictures)
        self.concepts = concepts

    @property
    def languages(self) -> tuple[str, ...]:
        """Languages in which a drawn concept has a name, most names first."""
        counts: dict[str, int] = {}
        for concept in self.drawn:
            for lang in self.concepts[concept].names:
                counts[lang] = counts.get(lang, 0) + 1
        return tuple(sorted(counts, key=lambda lang: (-counts[lang], lang)))

    @cached_property
    def drawn(self) -> tuple[str, ...]:
        """Concepts with a drawing, in order of their key."""
        return tuple(sorted({picture.concept for picture in self.pictures}))

    def classes(self, lang: str | None = None) -> tuple[str, ...]:
        """Drawn concepts with a name in `lang`, or in any language."""
        drawn = (self.concepts[concept] for concept in self.drawn)
        return tuple(c.concept for c in drawn if (lang in c.names if lang else c.names))

    def only(self, concepts: Collection[str]) -> "ConceptSet":
        """The same set with the drawings of these concepts alone."""
        wanted = set(concepts)
        return ConceptSet(
            self.folder, [p for p in self.pictures if p.concept in wanted], self.concepts
        )


class PairSet(DataFolder):
    """Pictures with captions."""

    kind = "pair set"

    @property
    def languages(self) -> tuple[str, ...]:
        """Languages of the captions, most captions first."""
        counts: dict[str, int] = {}
        for picture in self.pictures:
            for lang, _ in picture.captions:
                counts[lang] = counts.get(lang, 0) + 1
        return tuple(sorted(counts, key=lambda lang: (-counts[lang], lang)))


def read_folder(folder: str | Path, *, sources: Sequence[str] | None = None) -> DataFolder:
    """Read a concept set or a pair set; `sources` chooses files by their stems, default all.

    Raises DataError with the file, the row and what was expected.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; {FORMATS}")
    files = {f.stem: f for f in sorted(folder.glob("*.parquet")) if f.name != CONCEPTS_FILE}
    if not files:
        raise DataError(f"{folder} holds no Parquet file of pictures; {FORMATS}")
    unknown = sorted(set(sources or ()) - set(files))
    if unknown:
        raise DataError(f"{folder} has no source {unknown}; it has {sorted(files)}")
    chosen = [files[stem] for stem in (dict.fromkeys(sources) if sources else files)]
    with_concepts = (folder / CONCEPTS_FILE).is_file()
    pictures = [p for file in chosen for p in _read_pictures(folder, file, with_concepts)]
    _refuse_repeated_ids(pictures, folder)
    if not pictures:
        raise DataError(f"{folder}: {[f.name for f in chosen]} hold no row")
    if not with_concepts:
        return PairSet(folder, pictures)
    concepts = _read_concepts(folder / CONCEPTS_FILE)
    named = [p for p in pictures if p.concept in concepts]
    if not named:
        raise DataError(
            f"{folder}: none of {len(pictures)} drawings has its concept (the first: "
            f"{pictures[0].concept!r}) in {CONCEPTS_FILE}"
        )
    return ConceptSet(folder, named, concepts)


def read_concept_set(folder: str | Path, *, sources: Sequence[str] | None = None) -> ConceptSet:
    """`read_folder` where only a concept set will do. Raises DataError for a pair set."""
    data = read_folder(folder, sources=sources)
    if not isinstance(data, ConceptSet):
        raise DataError(f"{folder} is a {data.kind}, expected a concept set: no {CONCEPTS_FILE}")
    return data


def _read_pictures(folder: Path, file: Path, with_concepts: bool) -> Iterator[Picture]:
    needed = ("id", "concept", "image") if with_concepts else ("id", "image", "captions")
    known: dict[bytes, bytes] = {}  # rows of one picture share its bytes
    for row, values in enumerate(_rows(file, needed, ("label",))):
        where = f"{file}, row {row}"
        if with_concepts and not isinstance(values["concept"], str):
            raise DataError(f"{where}: concept is {values['concept']!r}, expected a string")
        yield Picture(
            id=_text(values["id"], "id", where),
            source=file.stem,
            data=known.setdefault(data := _image_bytes(values["image"], folder, where), data),
            concept=values.get("concept") or "",
            label=str(values["label"]) if values.get("label") is not None else "",
            captions=() if with_concepts else _texts(values["captions"], "captions", where),
        )


def _read_concepts(file: Path) -> dict[str, Concept]:
    concepts: dict[str, Concept] = {}
    optional = ("keywords", "group", "subgroup")
    for row, values in enumerate(_rows(file, ("concept", "name"), optional)):
        where = f"{file}, row {row}"
        key = _text(values["concept"], "concept", where)
        if key in concepts:
            raise DataError(f"{where}: concept {key!r} stands there twice, expected once")
        concepts[key] = Concept(
            concept=key,
            names=dict(_texts(values["name"], "name", where)),
            keywords=_keyword_lists(values.get("keywords"), where),
            group=values.get("group") or "",
            subgroup=values.get("subgroup") or "",
        )
    return concepts


def _rows(
    file: Path, needed: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """Rows as dictionaries, a row group at a time; only the columns named."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
        columns = table.schema_arrow.names
        missing = [name for name in needed if name not in columns]
        if missing:
            raise DataError(f"{file} lacks the columns {missing}, has {columns}; {FORMATS}")
        wanted = [name for name in (*needed, *optional) if name in columns]
        size = PICTURE_ROWS if "image" in wanted else TEXT_ROWS
        for batch in table.iter_batches(batch_size=size, columns=wanted):
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} cannot be read as Parquet ({error})") from error


def _text(value: Any, column: str, where: str) -> str:
    if value is None or value == "" or not isinstance(value, str | int):
        raise DataError(f"{where}: {column} is {value!r}, expected a text that is not empty")
    return str(value)


def _texts(value: Any, column: str, where: str) -> tuple[tuple[str, str], ...]:
    """[{lang, text}] to ((lang, text), ...), empty texts left out."""
    try:
        pairs = [(entry["lang"], entry["text"]) for entry in value or ()]
    except (TypeError, KeyError) as error:
        raise DataError(
            f"{where}: {column} is {str(value)[:80]!r}, expected a list of {{lang, text}}"
        ) from error
    return tuple((lang, text.strip()) for lang, text in pairs if lang and text and text.strip())


def _keyword_lists(value: Any, where: str) -> dict[str, tuple[str, ...]]:
    try:
        lists = {entry["lang"]: entry["text"] or () for entry in value or ()}
    except (TypeError, KeyError) as error:
        raise DataError(
            f"{where}: keywords is {str(value)[:80]!r}, expected a list of {{lang, text: [..]}}"
        ) from error
    return {
        lang: tuple(w.strip() for w in ([words] if isinstance(words, str) else words) if w)
        for lang, words in lists.items()
        if words
    }


def _image_bytes(value: Any, folder: Path, where: str) -> bytes:
    if isinstance(value, bytes) and value:
        return value
    if not isinstance(value, dict):
        raise DataError(f"{where}: image is {type(value).__name__}, expected {{bytes, path}}")
    if value.get("bytes"):
        return value["bytes"]
    path = value.get("path")
    if not path:
        raise DataError(f"{where}: image has neither bytes nor a path, expected one of them")
    file = folder / path
    if not file.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{where}: image path {path!r} leads out of the folder {folder}")
    if not file.is_file():
        raise DataError(f"{where}: image has no bytes, and its path {path!r} is no file there")
    return file.read_bytes()


def _refuse_repeated_ids(pictures: Sequence[Picture], folder: Path) -> None:
    seen: dict[str, str] = {}
    for picture in pictures:
        if picture.id in seen:
            raise DataError(
                f"{folder}: id {picture.id!r} stands in {seen[picture.id]}.parquet and again in "
                f"{picture.source}.parquet, expected ids to be unique"
            )
        seen[picture.id] = picture.source
