"""Run keys: which parameters, inputs and source files a result came from.

The git commit is not part of it, or any commit would break resume; neither are layout, ranks,
threads and place, which change how fast a stage runs and not what it makes.
"""

import ast
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from infra.config import canonical_json
from infra.fingerprint import fingerprint

PACKAGES = ("flows", "stages", "eval", "models", "infra")


def import_closure(module: str, root: str | Path = ".") -> list[Path]:
    """Our own source files that importing `module` may reach, relative to `root`, sorted.

    Found by reading the source: imports inside functions count, other people's packages do not.
    A JSON file beside a module and named like it (`scenes.json`) is part of that module.
    """
    root = Path(root)
    waiting, found = [module], {}
    while waiting:
        name = waiting.pop()
        path = _module_path(root, name)
        if name in found or path is None:
            continue
        found[name] = path
        waiting += [name.rpartition(".")[0]] if "." in name else []
        waiting += _imported_names(root / path)
    tables = [path.with_suffix(".json") for path in found.values()]
    return sorted({*found.values(), *(path for path in tables if (root / path).is_file())})


def run_key(
    stage: str,
    parameters: Mapping[str, Any],
    inputs: Mapping[str, str],
    sources: Iterable[Path],
    root: str | Path = ".",
) -> str:
    """Hexadecimal sha256 over a stage's parameters, input fingerprints and source files.

    Args:
        inputs: path of each input -> its fingerprint.
        sources: files relative to `root`, as `import_closure` gives them.
    """
    facts = {
        "stage": stage,
        "parameters": parameters,
        "inputs": dict(inputs),
        "sources": {path.as_posix(): fingerprint(Path(root) / path) for path in sources},
    }
    return hashlib.sha256(canonical_json(facts).encode()).hexdigest()


def _module_path(root: Path, module: str) -> Path | None:
    if module.partition(".")[0] not in PACKAGES:
        return None
    relative = Path(*module.split("."))
    for candidate in (relative.with_suffix(".py"), relative / "__init__.py"):
        if (root / candidate).is_file():
            return candidate
    return None


def _imported_names(path: Path) -> list[str]:
    names = []
    for node in _statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def _statements(block: ast.AST) -> Iterator[ast.AST]:
    """All of them at any depth, without the expressions, which are most of a tree."""
    for field in ("body", "orelse", "finalbody", "handlers", "cases"):
        for inner in getattr(block, field, ()):
            yield inner
            yield from _statements(inner)
