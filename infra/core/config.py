"""Frozen dataclasses from YAML, strictly: an unknown key names the closest known one."""

import dataclasses
import difflib
import json
import math
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlfoundry.infra.core.errors import ConfigError

PARAMS_FILE = "params.yaml"


def load_params(path: str | Path = PARAMS_FILE) -> dict[str, Any]:
    """Read a parameter file. Raises ConfigError if it is missing, not YAML, or not a mapping."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; run from the root of the repository")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from error
    params = read_yaml(text, str(path))
    if not isinstance(params, dict):
        raise ConfigError(f"{path} holds {type(params).__name__}, expected a mapping of parameters")
    return params


def apply_overrides(params: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Return `params` with assignments like `contrastive.train.lr=1e-3`; values are YAML.

    Only keys that exist can be assigned: a new key would be a silent no-op.
    """
    result = json.loads(json.dumps(params))
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator:
            raise ConfigError(f"got {assignment!r}, expected KEY=VALUE, e.g. seed=1")
        *parents, leaf = key.split(".")
        node = result
        for parent in parents:
            node = _child(node, parent, key)
        _child(node, leaf, key)
        node[leaf] = parse_value(text, key)
    return result


def merge(base: Mapping[str, Any], changes: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Return `base` with the nested `changes` laid over it; every changed key must exist."""
    result = dict(base)
    for key, value in changes.items():
        name = f"{where}.{key}" if where else key
        old = _child(result, key, name)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        result[key] = merge(old, value, name) if both else value
    return result


def parse_value(text: str, where: str = "value") -> Any:
    """Parse one YAML scalar or flow collection; `1e-3` is a number here as everywhere.

    Raises ConfigError, which names `where`, for what is not YAML.
    """
    value = read_yaml(text, f"{where}={text}")
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def build(cls: type, mapping: Mapping[str, Any], where: str = "") -> Any:
    """Make an instance of the dataclass `cls` from a nested mapping.

    Raises ConfigError for an unknown key (naming the closest known one), a missing key,
    a value of the wrong type, or what the dataclass itself refuses.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    place = where or cls.__name__
    for key in mapping:
        if key not in fields:
            raise ConfigError(f"{place}: unknown key {key!r}{_closest(key, fields)}")
    hints = typing.get_type_hints(cls)
    values = {}
    for name, field in fields.items():
        if name in mapping:
            values[name] = _convert(
                hints[name], mapping[name], f"{where}.{name}" if where else name
            )
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{place}: {name!r} is missing")
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from error


def check_ranges(
    where: str,
    config: Any,
    *,
    whole: Sequence[str] = (),
    above_zero: Sequence[str] = (),
    from_zero: Sequence[str] = (),
    shares: Sequence[str] = (),
) -> None:
    """Raises ConfigError, with the full name, unless fields are what they have to be; None passes.

    Args:
        where: in the parameters, e.g. "ingest".
        config: a dataclass, or a mapping.
        whole: numbers from 1.
        above_zero: finite ones above 0.
        from_zero: finite ones of at least 0.
        shares: 0 to 1.
    """
    for names, low, high, expected in (
        (whole, 1, math.inf, "a number of at least 1"),
        (above_zero, math.ulp(0.0), math.inf, "a number above 0"),
        (from_zero, 0, math.inf, "a number of at least 0"),
        (shares, 0, math.nextafter(1, 2), "a share, 0 to 1"),
    ):
        for name in names:
            value = config[name] if isinstance(config, Mapping) else getattr(config, name)
            if value is not None and not low <= value < high:
                raise ConfigError(f"{where}.{name} is {value}; expected {expected}")


def check_languages(languages: Sequence[str]) -> None:
    """Raises ConfigError if there is none, or one stands twice: its rows would come twice."""
    if not languages:
        raise ConfigError("languages is empty; expected at least one, e.g. [en]")
    twice = sorted({lang for lang in languages if list(languages).count(lang) > 1})
    if twice:
        raise ConfigError(f"languages has {', '.join(twice)} twice; expected each once")


SPARSE = {"sparse": True}
"""metadata of a dataclass field that is written down only where it differs from its default: an
option that is added later changes nothing (no run key, no file) where it is not used"""


def to_dict(config: Any) -> dict[str, Any]:
    """The plain JSON form of a config; `build` makes an equal config from it."""
    return json.loads(json.dumps(_plain(config)))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: _plain(found)
            for field in dataclasses.fields(value)
            for found in [getattr(value, field.name)]
            if not (field.metadata.get("sparse") and found == field.default)
        }
    if isinstance(value, Mapping):
        return {key: _plain(found) for key, found in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(found) for found in value]
    return value


def canonical_json(value: Any) -> str:
    """The one spelling of a JSON value: what is hashed and what is written to hashed files."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _yaml() -> Any:
    from ruamel.yaml import YAML

    return YAML(typ="safe", pure=True)


def read_yaml(text: str, where: str) -> Any:
    """What a YAML text says, in JSON's types. Raises ConfigError, in one line."""
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        value = _yaml().load(text)
        json.dumps(value)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        problem = " ".join(str(error.problem or error.context).split())
        raise ConfigError(f"{where} is not YAML: {problem}{place}") from error
    except (YAMLError, RecursionError, OverflowError) as error:
        problem = " ".join(str(error).split())
        raise ConfigError(f"{where} is not YAML that can be read: {problem}") from error
    except (TypeError, ValueError) as error:  # a date, a set, bytes, itself
        raise ConfigError(f"{where} holds what a parameter cannot be: {error}") from error
    return value


def _child(node: Any, key: str, full_key: str) -> Any:
    if not isinstance(node, Mapping) or key not in node:
        known = node if isinstance(node, Mapping) else {}
        raise ConfigError(f"parameter {full_key!r} does not exist{_closest(key, known)}")
    return node[key]


def _closest(key: str, known: Mapping[str, Any]) -> str:
    matches = difflib.get_close_matches(key, list(known), n=1)
    if matches:
        return f"; did you mean {matches[0]!r}?"
    return f"; known: {', '.join(known) or 'none'}"


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise ConfigError(f"{where}: got {value!r}, expected one of {list(arguments)}")
        return value
    if origin is tuple:
        _expect(isinstance(value, list | tuple), where, value, "a list")
        if arguments[-1:] == (Ellipsis,):
            return tuple(_convert(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        _expect(len(value) == len(arguments), where, value, f"{len(arguments)} values")
        return tuple(_convert(a, v, where) for a, v in zip(arguments, value, strict=True))
    if origin is dict:
        _expect(isinstance(value, Mapping), where, value, "a mapping")
        return {str(k): _convert(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        _expect(isinstance(value, Mapping), where, value, "a mapping")
        return build(hint, value, where)
    return _convert_scalar(hint, value, where)


def _convert_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    errors = []
    for option in options:
        if option is not type(None):
            try:
                return _convert(option, value, where)
            except ConfigError as error:
                errors.append(str(error))
    raise ConfigError(" or ".join(errors))


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is Any:
        return value
    if hint is float:
        is_text = isinstance(value, str)
        value = parse_value(value) if is_text else value
        _expect(
            isinstance(value, int | float) and not isinstance(value, bool),
            where,
            value,
            "a number",
        )
        _expect(abs(value) <= sys.float_info.max, where, value, "a finite number")
        return float(value)
    if hint is int:
        _expect(
            isinstance(value, int) and not isinstance(value, bool),
            where,
            value,
            "a whole number",
        )
        return value
    _expect(
        isinstance(value, hint),
        where,
        value,
        {str: "a text", bool: "true or false"}.get(hint, str(hint)),
    )
    return value


def _expect(good: bool, where: str, value: Any, expected: str) -> None:
    if not good:
        raise ConfigError(f"{where}: got {value!r}, expected {expected}")
