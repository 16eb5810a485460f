"""Reads "a folder in this format": a concept set or a pair set.

Concept set: one or more Parquet files of artwork (`id`, `concept`, `image` {bytes, path}) and
`concepts.parquet` (`concept`, `name` [{lang, text}], optional `keywords` [{lang, text: [..]}],
`group`, `subgroup`, `char`). The classes of a language are the concepts that have a drawing there
and a name in that language.

Pair set: Parquet files with `id`, `image` {bytes, path}, `captions` [{lang, text}] and an optional
`label`.

Where `bytes` is empty the picture is read from `path`, relative to the folder, which may also be a
URL (s3://bucket/folder).
"""

import abc
import dataclasses
import re
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vlfoundry.eval.datasets.labels import one_spelling, read_label, told
from vlfoundry.eval.datasets.pictures import decode_squares, pixel_key
from vlfoundry.infra.core.config import canonical_json
from vlfoundry.infra.core.errors import DataError
from vlfoundry.infra.core.roots import Root, is_text
from vlfoundry.infra.data.images.decode import Encoded

PICTURE_ROWS, TEXT_ROWS = 16, 1024
"""rows of a file that are read at once"""
LANGUAGE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,34}")
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
    row: int = 0
    """Its row there, from 0."""
    data: bytes
    """The encoded file."""
    concept: str = ""
    """Key of its class in a concept set."""
    label: str = ""
    """Label of a pair set, in the spelling of its class, or empty."""
    captions: tuple[tuple[str, str], ...] = ()
    """(language, text) of a pair set."""

    @property
    def encoded(self) -> Encoded:
        """What a model is shown."""
        return Encoded(data=self.data, where=self.where)

    @property
    def where(self) -> str:
        """What errors call it."""
        return f"{self.source}.parquet, row {self.row}, {self.id}"


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

    def __init__(self, folder: str | Path, pictures: Sequence[Picture]) -> None:
        self.folder, self.pictures = str(folder), tuple(pictures)

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def sources(self) -> tuple[str, ...]:
        """Stems of the files that the pictures come from."""
        return tuple(dict.fromkeys(picture.source for picture in self.pictures))

    @cached_property
    def files(self) -> tuple[list[Encoded], np.ndarray]:
        """The distinct files, as they are stored, and which of them each picture has, int64 [N].

        Rows that share a file are decoded and shown once.
        """
        number: dict[bytes, int] = {}
        shown: list[Encoded] = []
        which = np.empty(len(self.pictures), np.int64)
        for index, picture in enumerate(self.pictures):
            which[index] = number.setdefault(picture.data, len(number))
            if which[index] == len(shown):
                shown.append(picture.encoded)
        return shown, which

    def batches(self, side_px: int, size: int, *, keep_alpha: bool = False) -> Iterator[np.ndarray]:
        """Decoded squares, `size` at a time: uint8 [<=size, S, S, 3 or 4]."""
        for start in range(0, len(self.pictures), size):
            part = self.pictures[start : start + size]
            yield decode_squares(
                [p.data for p in part],
                side_px,
                names=[p.where for p in part],
                keep_alpha=keep_alpha,
            )

    def squares(self, side_px: int, *, keep_alpha: bool = False) -> np.ndarray:
        """All pictures at once: for sets of small drawings."""
        batches = list(self.batches(side_px, 256, keep_alpha=keep_alpha))
        return np.concatenate(batches)

    @cached_property
    def look(self) -> np.ndarray:
        """int64 [N]: equal numbers for pictures that are the same, pixel by pixel."""
        numbers: dict[bytes, int] = {}
        shown, which = self.files
        keys = (pixel_key(file.data, file.where) for file in shown)
        of_file = [numbers.setdefault(key, len(numbers)) for key in keys]
        return np.array(of_file, np.int64)[which]

    def _said(self) -> Any:
        """All that is known of the pictures, as JSON."""
        return [[p.concept, p.label, p.captions] for p in self.pictures]

    def facts(self) -> dict[str, Any]:
        """What a score file says of its data."""
        import hashlib

        digest = hashlib.sha256()
        shown, which = self.files
        of_file = [hashlib.sha256(file.data).digest() for file in shown]
        for picture, file in zip(self.pictures, which.tolist(), strict=True):
            digest.update(picture.id.encode() + b"\0" + of_file[file])
        digest.update(canonical_json(self._said()).encode())
        return {
            "folder": self.folder.rstrip("/").rpartition("/")[2],
            "sources": list(self.sources),
            "pictures": len(self.pictures),
            "fingerprint": digest.hexdigest(),
        }


class ConceptSet(DataFolder):
    """Drawings of named concepts."""

    kind = "concept set"

    def __init__(
        self, folder: str | Path, pictures: Sequence[Picture], concepts: dict[str, Concept]
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

    def _said(self) -> Any:
        return [super()._said(), [dataclasses.astuple(self.concepts[c]) for c in self.drawn]]

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

    def __init__(self, folder: str | Path, pictures: Sequence[Picture]) -> None:
        spelling = one_spelling(p.label for p in pictures if p.label)
        super().__init__(
            folder,
            [dataclasses.replace(p, label=spelling[p.label]) if p.label else p for p in pictures],
        )
        self.told = tuple(told(spelling))
        """What was done to labels, for people."""

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
    root = Root(folder)
    files, with_concepts = _files(root, folder)
    _refuse_missing_sources(folder, sources, files)
    chosen = [files[stem] for stem in (dict.fromkeys(sources) if sources else files)]
    pictures = [p for file in chosen for p in _read_pictures(root, file, with_concepts)]
    _refuse_repeated_ids(pictures, folder)
    if not pictures:
        raise DataError(f"{folder}: {chosen} hold no row")
    if not with_concepts:
        return PairSet(folder, pictures)
    concepts = _read_concepts(root)
    named = [p for p in pictures if p.concept in concepts]
    if not named:
        raise DataError(
            f"{folder}: none of {len(pictures)} drawings has its concept (the first: "
            f"{pictures[0].concept!r}) in {CONCEPTS_FILE}"
        )
    return ConceptSet(folder, named, concepts)


def check_choices(
    folder: str | Path,
    *,
    sources: Sequence[str] | None = None,
    train_sources: Sequence[str] | None = None,
    languages: Sequence[str] | None = None,
) -> None:
    """Look whether a folder has what is asked of it, before its pictures are read.

    Raises DataError for a source, or a language that no name of a concept set is in.
    """
    root = Root(folder)
    files, with_concepts = _files(root, folder)
    for asked in (sources, train_sources):
        _refuse_missing_sources(folder, asked, files)
    if languages and with_concepts:
        where = f"{root.place.rstrip('/')}/{CONCEPTS_FILE}"
        rows = _rows(root, CONCEPTS_FILE, ("name",))
        there = {lang for row in rows for lang, _ in _texts(row["name"], "name", where)}
        refuse_missing_languages(folder, languages, there)


def refuse_missing_languages(
    folder: str | Path, asked: Sequence[str], there: Collection[str]
) -> None:
    """Raises DataError for a language that is asked for and is not there."""
    missing = [lang for lang in asked if lang not in there]
    if missing:
        raise DataError(
            f"{folder} has nothing in {missing}; it has {sorted(there)}: choose among these"
        )


def _files(root: Root, folder: str | Path) -> tuple[dict[str, str], bool]:
    """Files of pictures by their stems, and whether it is a concept set."""
    if root.is_local and not Path(folder).is_dir():
        raise DataError(f"{folder} is not a directory; {FORMATS}")
    names = [Path(name) for name in root.names() if name.endswith(".parquet")]
    files = {name.stem: name.name for name in names if name.name != CONCEPTS_FILE}
    if not files:
        raise DataError(f"{folder} holds no Parquet file of pictures; {FORMATS}")
    return files, CONCEPTS_FILE in {name.name for name in names}


def _refuse_missing_sources(
    folder: str | Path, asked: Sequence[str] | None, files: Collection[str]
) -> None:
    unknown = sorted(set(asked or ()) - set(files))
    if unknown:
        raise DataError(f"{folder} has no source {unknown}; it has {sorted(files)}")


def read_concept_set(folder: str | Path, *, sources: Sequence[str] | None = None) -> ConceptSet:
    """`read_folder` where only a concept set will do. Raises DataError for a pair set."""
    data = read_folder(folder, sources=sources)
    if not isinstance(data, ConceptSet):
        raise DataError(f"{folder} is a {data.kind}, expected a concept set: no {CONCEPTS_FILE}")
    return data


def _read_pictures(root: Root, file: str, with_concepts: bool) -> Iterator[Picture]:
    needed = ("id", "concept", "image") if with_concepts else ("id", "image", "captions")
    known: dict[bytes, bytes] = {}  # rows of one picture share its bytes
    for row, values in enumerate(_rows(root, file, needed, ("label",))):
        where = f"{root.place.rstrip('/')}/{file}, row {row}"
        if with_concepts and not isinstance(values["concept"], str):
            raise DataError(f"{where}: concept is {values['concept']!r}, expected a string")
        yield Picture(
            id=_text(values["id"], "id", where),
            source=Path(file).stem,
            row=row,
            data=known.setdefault(data := _image_bytes(values["image"], root, where), data),
            concept=values.get("concept") or "",
            label=read_label(values.get("label"), where),
            captions=() if with_concepts else _texts(values["captions"], "captions", where),
        )


def _read_concepts(root: Root) -> dict[str, Concept]:
    concepts: dict[str, Concept] = {}
    optional = ("keywords", "group", "subgroup")
    for row, values in enumerate(_rows(root, CONCEPTS_FILE, ("concept", "name"), optional)):
        where = f"{root.place.rstrip('/')}/{CONCEPTS_FILE}, row {row}"
        key = _text(values["concept"], "concept", where)
        if key in concepts:
            raise DataError(f"{where}: concept {key!r} stands there twice, expected once")
        concepts[key] = Concept(
            concept=key,
            names=dict(_texts(values["name"], "name", where)),
            keywords=_keyword_lists(values.get("keywords"), where),
            group=_text_or_none(values.get("group"), "group", where),
            subgroup=_text_or_none(values.get("subgroup"), "subgroup", where),
        )
    return concepts


def _rows(
    root: Root, file: str, needed: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[dict[str, Any]]:
    """Rows as dictionaries, a row group at a time; only the columns named."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    where, row = f"{root.place.rstrip('/')}/{file}", 0
    try:
        opened = root.open(file)
    except DataError as error:
        raise DataError(f"{where} {error}") from error
    try:
        table = pq.ParquetFile(opened)
        columns = table.schema_arrow.names
        missing = [name for name in needed if name not in columns]
        if missing:
            raise DataError(f"{where} lacks the columns {missing}, has {columns}; {FORMATS}")
        wanted = [name for name in (*needed, *optional) if name in columns]
        size = PICTURE_ROWS if "image" in wanted else TEXT_ROWS
        for batch in table.iter_batches(batch_size=size, columns=wanted):
            try:
                yield from batch.to_pylist()
            except UnicodeDecodeError:
                raise _not_utf8(batch, where, row) from None
            row += len(batch)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{where} cannot be read as Parquet ({error})") from error


def _not_utf8(batch: Any, where: str, first_row: int) -> DataError:
    """Which row and column hold bytes that are no text."""
    for row in range(len(batch)):
        for name in batch.schema.names:
            try:
                batch.column(name)[row].as_py()
            except UnicodeDecodeError as error:
                return DataError(
                    f"{where}, row {first_row + row}: {name} holds bytes that are not UTF-8 "
                    f"({error.reason}), expected text"
                )
    raise AssertionError("to_pylist failed on a batch of which every value can be read")


def _text(value: Any, column: str, where: str) -> str:
    is_wanted = isinstance(value, str | int) and not isinstance(value, bool)
    if not is_wanted or value == "" or not is_text(str(value)):
        raise DataError(f"{where}: {column} is {_shown(value)}, expected a text that is not empty")
    return str(value)


def _text_or_none(value: Any, column: str, where: str) -> str:
    return "" if value is None or value == "" else _text(value, column, where)


def _texts(value: Any, column: str, where: str) -> tuple[tuple[str, str], ...]:
    """[{lang, text}] to ((lang, text), ...), empty texts left out."""
    try:
        pairs = [(entry["lang"], entry["text"]) for entry in value or ()]
    except (TypeError, KeyError, IndexError) as error:
        raise DataError(
            f"{where}: {column} is {_shown(value)}, expected a list of {{lang, text}}"
        ) from error
    kept = [
        (_tag(lang, f"{column}.lang", where), _word(text, f"{column}.text", where))
        for lang, text in pairs
    ]
    return tuple((lang, text) for lang, text in kept if lang and text)


def _word(value: Any, column: str, where: str) -> str:
    """A text without blanks around it, which may be empty or missing."""
    if value is None:
        return ""
    if not isinstance(value, str) or not is_text(value):
        raise DataError(f"{where}: {column} is {_shown(value)}, expected a text")
    return value.strip()


def _tag(value: Any, column: str, where: str) -> str:
    """A language as its tag, which also names files; empty where there is none."""
    tag = _word(value, column, where)
    if tag and not LANGUAGE.fullmatch(tag):
        raise DataError(
            f"{where}: {column} is {_shown(value)}, expected a language tag such as en or zh-Hans"
        )
    return tag


def _keyword_lists(value: Any, where: str) -> dict[str, tuple[str, ...]]:
    try:
        lists = {entry["lang"]: entry["text"] or () for entry in value or ()}
    except (TypeError, KeyError, IndexError) as error:
        raise DataError(
            f"{where}: keywords is {_shown(value)}, expected a list of {{lang, text: [..]}}"
        ) from error
    found: dict[str, tuple[str, ...]] = {}
    for lang, words in lists.items():
        if not isinstance(words, str | list | tuple):
            raise DataError(f"{where}: keywords.text is {_shown(words)}, expected a list of texts")
        several = [words] if isinstance(words, str) else words
        kept = [word for w in several if (word := _word(w, "keywords.text", where))]
        tag = _tag(lang, "keywords.lang", where)
        if tag and kept:
            found[tag] = tuple(kept)
    return found


def _shown(value: Any) -> str:
    text = ascii(value) if isinstance(value, str) and not is_text(value) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _image_bytes(value: Any, root: Root, where: str) -> bytes:
    if isinstance(value, bytes) and value:
        return value
    if not isinstance(value, dict):
        raise DataError(f"{where}: image is {type(value).__name__}, expected {{bytes, path}}")
    data, path = value.get("bytes"), value.get("path")
    if data is not None and not isinstance(data, bytes):
        raise DataError(
            f"{where}: image.bytes is {_shown(data)}, expected the bytes of an encoded picture"
        )
    if data:
        return data
    if path is None or path == "":
        raise DataError(f"{where}: image has neither bytes nor a path, expected one of them")
    try:
        return root.read(path)
    except DataError as error:
        raise DataError(
            f"{where}: image has no bytes, and its path {_shown(path)}: {error}"
        ) from error


def _refuse_repeated_ids(pictures: Sequence[Picture], folder: str | Path) -> None:
    seen: dict[str, str] = {}
    for picture in pictures:
        if picture.id in seen:
            raise DataError(
                f"{folder}: id {picture.id!r} stands in {seen[picture.id]}.parquet and again in "
                f"{picture.source}.parquet, expected ids to be unique"
            )
        seen[picture.id] = picture.source
