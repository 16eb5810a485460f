"""The meaning of a source changes with what it computes, and with nothing else."""

import textwrap

import pytest

from vlfoundry.infra.core.meaning import read_source, table_meaning

PLAIN = '''
"""A module."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from vlfoundry.infra.core.files import write_atomic, kind_of

SCALE: float = 2.5
NAMES = ("one", "two")


@dataclass(frozen=True)
class Config:
    """Options."""

    lr: float = 0.1
    """of the optimizer"""
    names: Sequence[str] = NAMES


def loss(values: Sequence[float], weights: Mapping[str, float] | None = None) -> float:
    """The sum."""
    total: float = 0.0
    for value in values:  # each
        total += math.sqrt(value) * SCALE
    return total


class Refused(Exception):
    pass
'''


def meaning(text: str) -> str:
    return read_source(textwrap.dedent(text)).meaning


HARMLESS = {
    "a comment": ("total: float", "# sums\n    total: float"),
    "no docstring": ('    """The sum."""\n', ""),
    "another docstring": ('"""The sum."""', '"""The sum of all values,\n    scaled."""'),
    "a docstring of a field": ('"""of the optimizer"""', '"""Of the optimizer."""'),
    "a docstring of a module": ('"""A module."""', '"""Another module."""'),
    "a docstring in place of pass": ("(Exception):\n    pass", '(Exception):\n    """Refused."""'),
    "quotes": ('("one", "two")', "('one', 'two')"),
    "line breaks": ('("one", "two")', '(\n    "one",\n    "two",\n)'),
    "joined strings": ('"one",', '"o" "ne",'),
    "another spelling of a number": ("= 0.1", "= 1e-1"),
    "annotation of an argument": ("values: Sequence[float]", "values: list[float]"),
    "no annotation of an argument": ("values: Sequence[float]", "values"),
    "annotation of the result": (") -> float:", ") -> int:"),
    "annotation of a local": ("total: float = 0.0", "total = 0.0"),
    "a local declared": ("    for value", "    kind: str\n    for value"),
    "annotation of a global": ("SCALE: float =", "SCALE ="),
    "names for annotations": ("Mapping, Sequence", "Iterable, Mapping, MutableMapping, Sequence"),
    "imports in another order": ("write_atomic, kind_of", "kind_of, write_atomic"),
    "imports for type checkers": (
        "SCALE: float",
        "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    import torch\n\nSCALE: float",
    ),
}
HARMFUL = {
    "a constant": ("2.5", "2.6"),
    "an operator": ("+=", "-="),
    "a default": ("= None) ->", "= {}) ->"),
    "the annotation of a field": ("lr: float = 0.1", "lr: int = 0.1"),
    "the order of fields": (
        '    lr: float = 0.1\n    """of the optimizer"""\n    names: Sequence[str] = NAMES\n',
        '    names: Sequence[str] = NAMES\n    lr: float = 0.1\n    """of the optimizer"""\n',
    ),
    "a decorator": ("@dataclass(frozen=True)", "@dataclass(frozen=False)"),
    "a string": ('"one"', '"One"'),
    "what a module is imported from": ("vlfoundry.infra.core.files", "vlfoundry.infra.core.space"),
    "a name that is used": ("import math", "import cmath as math"),
    "a bare expression": ("    return total", "    print(total)\n    return total"),
}


def changed(what: tuple[str, str]) -> str:
    assert PLAIN.count(what[0]) == 1, what[0]
    return PLAIN.replace(*what)


@pytest.mark.parametrize("what", HARMLESS.values(), ids=HARMLESS)
def test_it_stays(what: tuple[str, str]) -> None:
    assert meaning(changed(what)) == meaning(PLAIN)


@pytest.mark.parametrize("what", HARMFUL.values(), ids=HARMFUL)
def test_it_changes(what: tuple[str, str]) -> None:
    assert meaning(changed(what)) != meaning(PLAIN)


def test_an_annotation_in_a_class_within_a_function_counts() -> None:
    text = "def make():\n    class Local:\n        side: int = 3\n    return Local\n"
    assert meaning(text) != meaning(text.replace("int", "str"))
    inside = "class C:\n    def run(self):\n        side: int = 3\n        return side\n"
    assert meaning(inside) == meaning(inside.replace("int", "str"))


def test_imports_in_functions_are_found_and_those_for_types_are_not() -> None:
    found = read_source(
        "from typing import TYPE_CHECKING\n"
        "import typing\n"
        "if TYPE_CHECKING:\n    from a import b\n"
        "if typing.TYPE_CHECKING:\n    import c\nelse:\n    import d\n"
        "def run():\n    try:\n        import e.f\n"
        "    except ImportError:\n        from g import h\n"
    )
    assert set(found.imports) == {"typing", "typing.TYPE_CHECKING", "d", "e.f", "g", "g.h"}


def test_a_table_means_its_values_in_their_order() -> None:
    assert table_meaning('{"a": 1, "b": "é"}') == table_meaning('{\n "a": 1,\n "b": "\\u00e9"}')
    assert table_meaning('{"a": 1, "b": 2}') != table_meaning('{"b": 2, "a": 1}')
    assert table_meaning("[1]") != table_meaning("[1.0]")
