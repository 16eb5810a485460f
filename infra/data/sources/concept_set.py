"""Reads a concept set: artwork files (drawings by concept) beside `concepts.parquet` (names).

The format is described in `data/README.md`; any folder in it can be ingested and evaluated.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlfoundry.infra.core.errors import DataError
from vlfoundry.infra.core.tables import read_table

CONCEPTS_FILE = "concepts.parquet"
SEPARATOR = ", "


@dataclass(frozen=True, kw_only=True)
class Concept:
    """One thing that can be drawn, with what people call it."""

    id: str
    """Code points, hexadecimal, joined by `-`; any unique text will do."""
    group: str
    subgroup: str
    names: dict[str, str]
    """One name by language."""
    keywords: dict[str, tuple[str, ...]]
    """Further words by language."""


@dataclass(frozen=True, kw_only=True)
class Artwork:
    """One vendor's drawing of one concept, as it is stored."""

    id: str
    concept: str
    image_bytes: bytes


def read_concepts(folder: str | Path) -> dict[str, Concept]:
    """All concepts of a concept set by id, in the order of the file."""
    columns = ["concept", "group", "subgroup", "name", "keywords"]
    table = read_table(Path(folder) / CONCEPTS_FILE, columns)
    return {
        row["concept"]: Concept(
            id=row["concept"],
            group=row["group"],
            subgroup=row["subgroup"],
            names={entry["lang"]: entry["text"] for entry in row["name"]},
            keywords={entry["lang"]: tuple(entry["text"]) for entry in row["keywords"] or ()},
        )
        for row in table.to_pylist()
    }


def read_artwork(path: str | Path) -> list[Artwork]:
    """All drawings of one artwork file, in its order."""
    table = read_table(path, ["id", "concept", "image"])
    drawings = []
    for row in table.to_pylist():
        if not row["image"] or not row["image"]["bytes"]:
            raise DataError(f"{path}: drawing {row['id']!r} has no image bytes")
        drawings.append(
            Artwork(id=row["id"], concept=row["concept"], image_bytes=row["image"]["bytes"])
        )
    return drawings


def keyword_caption(concept: Concept, lang: str) -> str:
    """The keywords of a concept as one caption; empty if it has none that say more than its name.

    Chinese lists often repeat the name; it is left out there, so that a keyword caption is a
    second, different text.
    """
    name = concept.names.get(lang, "")
    words = [word for word in concept.keywords.get(lang, ()) if lang != "zh" or word != name]
    caption = SEPARATOR.join(words)
    return "" if caption == name else caption


def hash64(*parts: object) -> int:
    """A 64-bit number that depends on the parts alone: the same on every machine and run."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def stable_order(concepts: Sequence[str], seed: int, purpose: str) -> list[str]:
    """The concepts in a pseudo-random order in which adding one does not move the others."""
    return sorted(concepts, key=lambda concept: (hash64(seed, purpose, concept), concept))
