"""The step `code` as DVC's record has it, and what its files say in words."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vlfoundry.infra.core import code
from vlfoundry.infra.core.code import Code
from vlfoundry.infra.core.dvccache import md5_of

CODE = "code"
"""The step that always runs."""
COMMAND = "exec python -m vlfoundry.infra.core.code"
SHOWN = 4
"""modules that are named"""


def lock_entry(root: Path) -> str:
    """The entry of the step in dvc.lock, byte for byte as DVC writes it."""
    lines = [f"  {CODE}:", f"    cmd: {COMMAND}", "    outs:"]
    for name in code.steps(code.package_of(root)):
        path = code.step_file(name)
        lines += [f"    - path: {path}", "      hash: md5", f"      md5: {md5_of(root / path)}"]
        lines += [f"      size: {(root / path).stat().st_size}"]
    return "\n".join(lines) + "\n"


def describe_change(reason: str, address: str, found: Mapping[str, Code], root: Path) -> str:
    """A reason for which a step is stale, in which its code's file is told as what changed."""
    path = code.step_file(address)
    now = found.get(address.partition("@")[0])
    if now is None or path not in reason:
        return reason
    what = ", ".join(changes(now, lineage_of(root, address)))
    return reason.replace(f"modified {path}", f"code ({what})" if what else "code")


def lineage_of(root: Path, address: str) -> dict[str, Any]:
    """What a step wrote of the code that made what lies there now; empty if nothing does."""
    path = root / "artifacts" / address.replace("@", "/") / "lineage.json"
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError):
        return {}


def changes(now: Code, made_by: Mapping[str, Any]) -> Iterator[str]:
    """What differs from the code that a lineage tells of: modules, and libraries if they count.

    Nothing if it does not tell: older lineages list files alone.
    """
    sources = made_by.get("sources")
    if isinstance(sources, Mapping):
        modules = [n.removeprefix("vlfoundry.") for n in code.differences(sources, now.modules)]
        yield from modules[:SHOWN]
        if len(modules) > SHOWN:
            yield f"{len(modules) - SHOWN} modules more"
    if now.strict:
        yield from version_changes(made_by, now.libraries)


def version_changes(made_by: Mapping[str, Any], now: Mapping[str, str]) -> Iterator[str]:
    """Libraries that have another version than a lineage tells of, in words."""
    before = made_by.get("libraries") or now
    for name in sorted({*before, *now}):
        old, new = before.get(name, "none"), now.get(name, "none")
        if old != new:
            yield f"{name} {old} -> {new}"


def libraries(root: Path, names: Iterable[str]) -> dict[str, list[str]]:
    """Other versions than are installed -> the steps that were made with them, of those that are
    up to date."""
    installed, found = code.versions(), dict[str, list[str]]()
    for name in names:
        for difference in version_changes(lineage_of(root, name), installed):
            found.setdefault(difference, []).append(name)
    return found
