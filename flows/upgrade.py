"""`vlfoundry upgrade`: a project's dvc.yaml as this version writes it, and what that means."""

import difflib
from collections.abc import Iterator
from pathlib import Path

from vlfoundry.flows.definition import updated
from vlfoundry.flows.stamps import changes, lineage_of, version_changes
from vlfoundry.infra.core import code
from vlfoundry.infra.core.files import write_atomic
from vlfoundry.infra.core.project import DEFINITION, PROJECT_FORMAT, WRITTEN_BY

SHOWN_LINES = 40


def upgrade(root: Path) -> Iterator[str]:
    """Render dvc.yaml again; say which steps mean something else now, and why.

    Stages that are not ours stay as they are. Nothing is run and nothing else is written.

    Yields lines for people. Raises DataError if dvc.yaml cannot be read.
    """
    path = root / DEFINITION
    before, after = path.read_text(encoding="utf-8"), updated(root)
    if before == after:
        yield f"{DEFINITION} is as this version writes it"
    else:
        write_atomic(path, after)
        found = WRITTEN_BY.search(before)
        by = f"{found[2] or 'an unknown version'}, format {found[1]}" if found else "format 1"
        yield f"{DEFINITION} is rendered again (it was of {by}; this is format {PROJECT_FORMAT})"
        yield from _difference(before, after)
    yield from _meanings(root)


def _difference(before: str, after: str) -> Iterator[str]:
    lines = list(difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0))
    yield from (f"    {line}" for line in lines[2 : SHOWN_LINES + 2])
    if len(lines) > SHOWN_LINES + 2:
        yield f"    ... {len(lines) - SHOWN_LINES - 2} lines more"


def _meanings(root: Path) -> Iterator[str]:
    found = code.refresh(root)
    changed, made = [], 0
    for address in _made(root):
        now = found.get(address.partition("@")[0])
        lineage = lineage_of(root, address)
        if now is None or not lineage:
            continue
        made += 1
        earlier = (lineage.get("accepted") or {}).get("counts_as") or lineage.get("code")
        if earlier != now.counts_as:
            what = ", ".join(changes(now, lineage))
            changed.append(address)
            yield f"{address}: its code means something else now ({what or 'it listed files'})"
        elif other := ", ".join(version_changes(lineage, now.libraries)):
            counts = "stale" if now.strict else "up to date, code.strict_versions is false"
            yield f"{address}: other libraries: {other} ({counts})"
    if changed:
        yield (
            f"{len(changed)} of {made} steps will run again, and what reads from them; if that "
            'cannot change a result: `vlfoundry accept STEP --because "..."`'
        )
    else:
        yield f"the code of {made} steps that have run means what it did"


def _made(root: Path) -> list[str]:
    """Addresses of what has run here."""
    places = [path.parent.relative_to(root / "artifacts") for path in _lineages(root)]
    return sorted("@".join(place.parts) for place in places)


def _lineages(root: Path) -> Iterator[Path]:
    yield from (root / "artifacts").glob("*/lineage.json")
    yield from (root / "artifacts").glob("*/*/lineage.json")
