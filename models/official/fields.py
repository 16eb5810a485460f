"""Fields of other programs' configs: what each may be, and what it is where it is left out.

A table names every field of an official config class. A field is read and checked here, or it may
only have the values that ours computes, or it is known not to change what is computed. One that no
table knows is told to whoever imports the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vlfoundry.infra.core.errors import ConfigError
from vlfoundry.infra.core.givenfiles import shown

MISSING = object()
"""the default of a field that has none"""


@dataclass(frozen=True, kw_only=True)
class Field:
    """One option of an official config."""

    default: Any
    """what the official class takes where the file does not say; `MISSING`: there is none"""
    expected: str
    """in words, for messages"""
    fits: Callable[[Any], bool]
    """whether ours can be built with a value"""
    fixed: bool = False
    """whether there is but one way that ours computes"""


@dataclass(frozen=True, kw_only=True)
class Table:
    """The fields of one official config class."""

    fields: Mapping[str, Field]
    """that are read, or refused with other values than ours computes"""
    harmless: frozenset[str] = field(default_factory=frozenset)
    """that change nothing of what is computed"""


def size(default: Any = MISSING, *, most: int, least: int = 1, null: bool = False) -> Field:
    """A whole number."""

    def fits(value: Any) -> bool:
        return (null and value is None) or (_whole(value) and least <= value <= most)

    words = f"a whole number from {least} to {most}" + (" or null" if null else "")
    return Field(default=default, expected=words, fits=fits)


def number(
    default: Any = MISSING, *, low: float, high: float = math.inf, open_low: bool = False
) -> Field:
    """A finite number of [low, high], or of (low, high]."""

    def fits(value: Any) -> bool:
        good = isinstance(value, int | float) and not isinstance(value, bool)
        good = good and abs(value) < 1e300
        return good and (value > low if open_low else value >= low) and value <= high

    above = f"above {low:g}" if open_low else f"of at least {low:g}"
    below = "" if high == math.inf else f" and at most {high:g}"
    return Field(default=default, expected=f"a number {above}{below}", fits=fits)


def flag(default: Any = MISSING) -> Field:
    """True or false."""
    return Field(default=default, expected="true or false", fits=lambda v: isinstance(v, bool))


def among(default: Any, *values: Any) -> Field:
    """One of several values that ours can be built with."""
    return Field(
        default=default,
        expected=f"one of {', '.join(map(repr, values))}",
        fits=lambda value: any(_same(value, known) for known in values),
    )


def only(*values: Any, default: Any = MISSING, why: str = "") -> Field:
    """What ours computes and nothing else; the first value is the default unless one is given."""
    return Field(
        default=values[0] if default is MISSING else default,
        expected=f"{values[0]!r}: " + (why or "nothing else is built here"),
        fits=lambda value: any(_same(value, known) for known in values),
        fixed=True,
    )


def empty(why: str) -> Field:
    """A field that is absent, null, false, 0 or empty where what it asks for is not asked for."""
    return Field(default=None, expected=f"null: {why}", fits=lambda value: not value)


def mapping(default: Any = MISSING) -> Field:
    """A nested config, with a table of its own; null where it has a default."""

    def fits(value: Any) -> bool:
        return isinstance(value, Mapping) or (value is None and default is not MISSING)

    return Field(default=default, expected="a mapping of fields to values", fits=fits)


def text(default: Any = None) -> Field:
    """A text, or null."""
    return Field(default=default, expected="a text", fits=lambda v: v is None or isinstance(v, str))


def read(facts: Any, table: Table, part: str = "") -> dict[str, Any]:
    """Every field of a table, with its default where the file does not have it.

    Args:
        facts: the config, or a part of it.
        part: where that is in the file, e.g. "llm_config"; messages begin with it.

    Raises:
        ConfigError: names the field, its value, and what was expected.
    """
    if not isinstance(facts, Mapping):
        raise ConfigError(
            f"{part or 'config'} is {shown(facts)}, expected a mapping of fields to values"
        )
    values = {}
    for name, known in table.fields.items():
        value = facts.get(name, known.default)
        if value is MISSING:
            raise ConfigError(f"{label(part, name)} is missing, expected {known.expected}")
        if not known.fits(value):
            raise wrong(facts, part, name, value, known.expected)
        values[name] = value
    return values


def require_multiple(facts: Mapping, values: Mapping, part: str, name: str, of: str) -> None:
    """Raises ConfigError unless one field's value is a multiple of another's."""
    if values[name] % values[of]:
        raise wrong(facts, part, name, values[name], f"a multiple of {of} = {values[of]}")


def wrong(facts: Mapping, part: str, name: str, value: Any, expected: str) -> ConfigError:
    """The error for a field whose value does not do."""
    default = "" if name in facts else " (left out, so the official default)"
    return ConfigError(f"{label(part, name)} is {shown(value)}{default}, expected {expected}")


def left_out(
    facts: Mapping, table: Table, part: str = "", *, of: Collection[str]
) -> dict[str, Any]:
    """Which of some fields a config does not say, and the defaults that were taken."""
    return {
        label(part, name): known.default
        for name, known in table.fields.items()
        if name in of and name not in facts and known.default is not None and not known.fixed
    }


def unknown(facts: Mapping, table: Table, part: str = "") -> list[str]:
    """Fields of a config that its table does not have."""
    names = {*table.fields, *table.harmless}
    return [label(part, str(name)) for name in facts if name not in names]


def label(part: str, name: str) -> str:
    """A field with the part of the file that it is in."""
    return f"{part}.{name}" if part else name


def names(*groups: str | Iterable[str]) -> frozenset[str]:
    """Names from texts with blanks between them, and from other sets."""
    return frozenset(n for g in groups for n in (g.split() if isinstance(g, str) else g))


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _same(value: Any, known: Any) -> bool:
    """Equal, and neither is a truth value that stands for a number."""
    return value == known and isinstance(value, bool) == isinstance(known, bool)
