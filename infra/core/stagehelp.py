"""What a stage's `--help` prints: parameters with their docstrings, and files."""

import ast
import dataclasses
import importlib
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlfoundry.infra.core.stage import Stage

WIDTH = 100
INDENT = "      "


def help_lines(stage: "Stage") -> Iterator[str]:
    """The help of a stage, a line each."""
    variant = " variant=V" if stage.variants else ""
    yield f"python -m vlfoundry.stages.{stage.name} [--dry-run]{variant} [key=value ...]"
    yield ""
    yield from (inspect.getdoc(_module(stage)) or "").splitlines()
    yield ""
    yield "Values come from params.yaml; key=value lays others over them for this time."
    if stage.variants:
        yield f"variant: one of {', '.join(stage.variants)}"
    yield ""
    yield "Parameters (with the default where params.yaml may leave it out):"
    yield from _parameters(stage.config, "")
    yield ""
    yield "Reads (relative to the root of the project):"
    yield from (f"  {path}" for path in stage.inputs)
    for name, paths in stage.variant_inputs.items():
        yield from (f"  {path}  (variant={name})" for path in paths)
    yield "  and the model folders that the parameters name, if any"
    yield ""
    yield "Writes:"
    folder = f"artifacts/{stage.name}" + ("/{variant}" if stage.variants else "")
    yield from (f"  {path}" for path in (*stage.outputs, f"{folder}/lineage.json"))
    place = f"work/{stage.name}" + ("-{variant}" if stage.variants else "")
    yield f"  {place}/RUN KEY/  (state to resume from)"


def _module(stage: "Stage") -> types.ModuleType:
    return importlib.import_module(stage.run.__module__)


def _parameters(config: type, prefix: str) -> Iterator[str]:
    """Every leaf below a config as `key: type = default`, its docstring below."""
    hints, said = typing.get_type_hints(config), docstrings(config)
    for field in dataclasses.fields(config):
        key, hint = f"{prefix}{field.name}", hints[field.name]
        nested = [part for part in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(part)]
        default = "" if nested else _default(field)
        yield f"  {key}: {_type(hint)}{default}"
        text = " ".join(said.get(field.name, "").split())
        yield from textwrap.wrap(text, WIDTH, initial_indent=INDENT, subsequent_indent=INDENT)
        for part in nested:
            middle = "NAME." if typing.get_origin(hint) in (dict, tuple) else ""
            yield from _parameters(typing.cast(type, part), f"{key}.{middle}")


def docstrings(config: type) -> dict[str, str]:
    """The string below each field of a dataclass, those of its bases included."""
    found: dict[str, str] = {}
    for cls in reversed(config.__mro__):
        if not dataclasses.is_dataclass(cls):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        body = typing.cast(ast.ClassDef, tree).body
        for field, text in itertools.pairwise(body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
            ):
                found[field.target.id] = str(text.value.value)
    return found


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return f" = {field.default!r}"
    if field.default_factory is not dataclasses.MISSING:
        return f" = {field.default_factory()!r}"
    return ""


def _type(hint: Any) -> str:
    if isinstance(hint, type) and not typing.get_args(hint):
        return hint.__name__
    text = str(hint).replace("typing.", "")
    for part in typing.get_args(hint):
        if isinstance(part, type):
            text = text.replace(f"{part.__module__}.{part.__qualname__}", part.__qualname__)
    return text
