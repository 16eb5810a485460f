"""`vlfoundry accept`: somebody declares that a change of a step's code is harmless."""

import dataclasses
import datetime
import getpass
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlfoundry.flows.stamps import changes
from vlfoundry.infra.core import code
from vlfoundry.infra.core.code import ACCEPTED, Code, Declaration
from vlfoundry.infra.core.config import to_dict
from vlfoundry.infra.core.errors import ConfigError, DataError
from vlfoundry.infra.core.files import write_atomic
from vlfoundry.infra.core.git import git
from vlfoundry.infra.core.stage import CODE_FILE

SHORT = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Earlier:
    """The code that a step was last begun or ended with."""

    counts_as: str
    facts: Mapping[str, Any]
    place: Path
    written: float


def accept(root: Path, steps: tuple[str, ...], because: str) -> Iterator[str]:
    """Let the present code of some steps count as that with which they were last begun.

    dvc.lock, run keys and the state of a run that was stopped then hold as they are.

    Yields lines for people.

    Raises:
        ConfigError: no such step, or no reason.
        DataError: there is nothing to accept.
    """
    if not because.strip():
        raise ConfigError("--because is empty; say why the change cannot change a result")
    known = code.steps(code.package_of(root))
    for step in steps:
        _check_step(step, known)
    found = code.read_code(steps, root)
    new = [_declare(root, found[step], because.strip()) for step in dict.fromkeys(steps)]
    replaced = {(entry.step, entry.code) for entry in new}
    kept = [e for e in code.declarations(root) if (e.step, e.code) not in replaced]
    write_atomic(root / ACCEPTED, _text([*kept, *new]))
    code.refresh(root)
    for entry in new:
        what = ", ".join(entry.modules) or "what changed is not known"
        now, before = entry.code[:SHORT], entry.counts_as[:SHORT]
        yield f"{entry.step}: code {now} counts as {before} ({what})"
    yield f"{ACCEPTED} says so, and so will the lineage of what these steps make; commit it"


def _check_step(step: str, known: list[str]) -> None:
    if step in known:
        return
    name = step.partition("@")[0]
    if name in known:
        raise ConfigError(f"all variants of {name} share their code; write {name}, not {step}")
    raise ConfigError(f"no step {step!r}; expected one of {known}")


def _declare(root: Path, now: Code, because: str) -> Declaration:
    earlier = max(_earlier(root, now.step), key=lambda one: one.written, default=None)
    if earlier is None:
        raise DataError(f"{now.step}: no earlier code is known, so there is nothing to accept")
    if earlier.counts_as == now.counts_as:
        raise DataError(
            f"{now.step}: its code counts as that of {earlier.place.relative_to(root)} already"
        )
    return Declaration(
        step=now.step, code=now.identity, counts_as=earlier.counts_as, because=because,
        by=_person(root), on=datetime.date.today().isoformat(),
        modules=tuple(changes(dataclasses.replace(now, strict=False), earlier.facts)),
    )  # fmt: skip


def _earlier(root: Path, step: str) -> Iterator[Earlier]:
    """All that the project and its workspaces still have: of what lies there, and was begun."""
    patterns = (
        f"artifacts/{step}/lineage.json", f"artifacts/{step}/*/lineage.json",
        f"work/{step}/*/{CODE_FILE}", f"work/{step}-*/*/{CODE_FILE}",
    )  # fmt: skip
    places = (root, *(root / "work" / "workspaces").glob("*/"))
    for path in (path for place in places for pattern in patterns for path in place.glob(pattern)):
        try:
            facts = json.loads(path.read_bytes())
            counts_as = (facts.get("accepted") or {}).get("counts_as") or facts["code"]
        except (ValueError, KeyError):
            continue  # an older version's, or cut
        yield Earlier(counts_as=counts_as, facts=facts, place=path, written=path.stat().st_mtime)


def _person(root: Path) -> str:
    name, mail = (_setting(root, f"user.{key}") for key in ("name", "email"))
    return f"{name} <{mail}>" if name and mail else name or mail or getpass.getuser()


def _setting(root: Path, key: str) -> str:
    return git(root, "config", "--default", "", "--get", key).strip()


def _text(entries: list[Declaration]) -> str:
    from ruamel.yaml import YAML

    yaml, stream = YAML(), io.StringIO()
    yaml.width = 100
    yaml.dump([to_dict(entry) for entry in entries], stream)
    return code.ABOUT + stream.getvalue()
