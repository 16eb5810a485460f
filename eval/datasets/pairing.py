"""Which texts belong to which pictures of a folder.

Letters: N pictures, M distinct captions.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from vlfoundry.eval.datasets.folders import ConceptSet, DataFolder, Picture
from vlfoundry.infra.core.errors import DataError

MIN_CANDIDATES = 2
Captions = Callable[[DataFolder, int, str], tuple[str, ...]]
"""of the picture with this number, in a language"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs:
    """Pictures and captions of one language, and which belong together."""

    rows: np.ndarray
    """int64 [N]: pictures of the set that have a caption."""
    texts: tuple[str, ...]
    """M distinct captions."""
    right: np.ndarray
    """bool [N, M]."""


def pair_up(data: DataFolder, lang: str, captions: Captions) -> Pairs:
    """Which captions of `lang` belong to which pictures. Raises DataError if fewer than two do.

    Args:
        captions: gives those of one picture.
    """
    own = [captions(data, index, lang) for index in range(len(data))]
    by_look: dict[int, set[str]] = {}
    for look, texts in zip(data.look, own, strict=True):
        by_look.setdefault(int(look), set()).update(texts)
    column = {text: i for i, text in enumerate(dict.fromkeys(t for texts in own for t in texts))}
    rows = [index for index, texts in enumerate(own) if texts]
    if len(rows) < MIN_CANDIDATES or len(column) < MIN_CANDIDATES:
        raise DataError(
            f"{data.folder}: {len(rows)} pictures have a caption in {lang!r} ({len(column)} "
            f"distinct), expected at least {MIN_CANDIDATES}; the languages are {data.languages}"
        )
    right = np.zeros((len(rows), len(column)), bool)
    for row, index in enumerate(rows):
        right[row, [column[text] for text in by_look[int(data.look[index])]]] = True
    return Pairs(rows=np.array(rows), texts=tuple(column), right=right)


def keyword_caption(name: str, keywords: Sequence[str]) -> str:
    """The keywords in one line, without the name; empty if nothing is left."""
    return ", ".join(word for word in keywords if word.casefold() != name.casefold())


def keyword_captions(data: DataFolder, index: int, lang: str) -> tuple[str, ...]:
    """Captions of a picture: a concept's keywords, or all that a pair set has in the language."""
    picture = data.pictures[index]
    if not isinstance(data, ConceptSet):
        return _own_captions(picture, lang)
    concept = data.concepts[picture.concept]
    caption = keyword_caption(concept.names.get(lang, ""), concept.keywords.get(lang, ()))
    return (caption,) if caption else ()


def name_captions(data: DataFolder, index: int, lang: str) -> tuple[str, ...]:
    """Captions of a picture: a concept's name, or all that a pair set has in the language."""
    picture = data.pictures[index]
    if not isinstance(data, ConceptSet):
        return _own_captions(picture, lang)
    name = data.concepts[picture.concept].names.get(lang)
    return (name,) if name else ()


def _own_captions(picture: Picture, lang: str) -> tuple[str, ...]:
    return tuple(text for tag, text in picture.captions if tag == lang)
