"""Class labels of a pair set as its tools wrote them: one class, one label.

A label that came out of a CSV may have blanks around it, another case, another Unicode form (NFD
instead of NFC), or be what a program writes where there is none (NaN, None, null).
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from vlfoundry.infra.core.errors import DataError

NOTHING = frozenset({"nan", "NaN", "NAN", "None", "null", "NULL", "<NA>", "NaT"})
"""how programs write a label that is not there"""


def read_label(value: Any, where: str) -> str:
    """A label as it stands in its row, or "" where there is none.

    Raises DataError if it is neither text nor a number nor a truth value.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # a column of numbers with gaps is one of floats
    if not isinstance(value, str | int | float):
        raise DataError(
            f"{where}: label is {str(value)[:80]!r}, expected a text or a number; a class has one"
        )
    text = str(value)
    return "" if not text.strip() or text.strip() in NOTHING else text


def one_spelling(labels: Iterable[str]) -> dict[str, str]:
    """Each label as it was found, to the spelling that stands for its class: the commonest."""
    labels = list(labels)
    classes: dict[str, Counter[str]] = {}
    for label in labels:
        tidy = " ".join(unicodedata.normalize("NFC", label).split())
        classes.setdefault(class_key(label), Counter())[tidy] += 1
    chosen = {key: max(sorted(found), key=found.__getitem__) for key, found in classes.items()}
    return {label: chosen[class_key(label)] for label in labels}


def class_key(label: str) -> str:
    """What is equal for labels of one class. Case is none of it in labels of a single letter: in
    data sets of letters `A` and `a` are two classes."""
    tidy = " ".join(unicodedata.normalize("NFKC", label).split())
    return tidy if len(tidy) == 1 else tidy.casefold()


def told(spelling: Mapping[str, str]) -> list[str]:
    """What was read as something else, for people: "'red ', 'Red' are read as 'red'"."""
    changed: dict[str, list[str]] = {}
    for found, label in spelling.items():
        if found != label:
            changed.setdefault(label, []).append(found)
    return [
        f"{', '.join(map(repr, sorted(found)))} {'are' if len(found) > 1 else 'is'} read as {to!r}"
        for to, found in sorted(changed.items())
    ]
