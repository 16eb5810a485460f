"""What a Python source means: what is left of it without comments, docstrings and annotations.

Two sources with the same meaning compute the same. What is left out:

* comments, formatting, docstrings and other strings that stand alone;
* annotations of arguments, returns and variables, but not those in the body of a class:
  configurations are built from them;
* what stands under `if TYPE_CHECKING:`, which never runs;
* imports of the standard library that then nothing uses.
"""

import ast
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

REGISTRY = "vlfoundry.infra.core.members"
"""who imports it reaches all modules of its own package"""
MEMBERS = ".*"


@dataclass(frozen=True)
class Source:
    """What a source file means, and what it may import."""

    meaning: str
    """Hexadecimal sha256."""
    imports: tuple[str, ...]
    """Names of modules, in functions too. `from a import b` gives `a` and `a.b`, whatever b is.
    `MEMBERS` stands for every module of the source's own package, and in a folder of it for the
    one of the same name."""


def read_source(text: str) -> Source:
    """What a source means. Raises SyntaxError if it cannot be parsed."""
    tree = _Running().visit(ast.parse(text))
    names = list(_imported(tree))
    imports = tuple(dict.fromkeys([*names, *([MEMBERS] if REGISTRY in names else [])]))
    plain = ast.dump(_without_unused(_Bare().visit(tree)))
    return Source(hashlib.sha256(plain.encode()).hexdigest(), imports)


def table_meaning(text: str) -> str:
    """The same for a table in JSON: its formatting does not count, the order of its keys does."""
    plain = json.dumps(json.loads(text), ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(plain.encode()).hexdigest()


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in _statements(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _statements(block: ast.AST) -> Iterator[ast.AST]:
    """All of them at any depth, without the expressions, which are most of a tree."""
    for field in ("body", "orelse", "finalbody", "handlers", "cases"):
        for inner in getattr(block, field, ()):
            yield inner
            yield from _statements(inner)


class _Running(ast.NodeTransformer):
    """Leaves out what only a type checker reads."""

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        self.generic_visit(node)
        return node.orelse if _is_for_types(node.test) else node


class _Bare(ast.NodeTransformer):
    """Leaves out what changes nothing when the code runs."""

    def __init__(self) -> None:
        self._in_class = False

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        alone = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if alone else self.generic_visit(node)

    def visit_Pass(self, node: ast.Pass) -> None:
        return None

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self._function(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        return self._function(node)

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.AST:
        node.returns = None
        return self._within(node, in_class=False)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return self._within(node, in_class=True)

    def _within(self, node: ast.stmt, *, in_class: bool) -> ast.AST:
        before, self._in_class = self._in_class, in_class
        self.generic_visit(node)
        self._in_class = before
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        self.generic_visit(node)
        if self._in_class:
            return node
        if node.value is None:
            return None
        return ast.Assign(targets=[node.target], value=node.value)


def _is_for_types(test: ast.expr) -> bool:
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", None)
    return name == "TYPE_CHECKING"


def _without_unused(tree: ast.Module) -> ast.Module:
    """Without the imports from the standard library whose names nothing uses any more."""
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    used |= set(_exported(tree.body))
    kept: list[ast.stmt] = []
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            if names := _needed(node, used):
                node.names = names
                kept.append(node)
        else:
            kept.append(node)
    tree.body = kept
    return tree


def _needed(node: ast.Import | ast.ImportFrom, used: set[str]) -> list[ast.alias]:
    origin = node.module if isinstance(node, ast.ImportFrom) else None
    if origin == "__future__":
        return node.names
    return sorted(
        (
            alias
            for alias in node.names
            if (origin or alias.name).partition(".")[0] not in sys.stdlib_module_names
            or (alias.asname or alias.name.partition(".")[0]) in used
        ),
        key=lambda alias: alias.name,
    )


def _exported(body: Sequence[ast.stmt]) -> Iterator[str]:
    """What `__all__` names."""
    for node in body:
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets
        ):
            values = (c.value for c in ast.walk(node.value) if isinstance(c, ast.Constant))
            yield from (value for value in values if isinstance(value, str))
