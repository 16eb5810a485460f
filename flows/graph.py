"""The pipeline's graph, read from DVC.

This, `flows/runcache.py` and `infra/core/dvccache.py` import its internals, and nothing else does.

`dvc.api` does not show the graph, so this reads `Repo.index`; tests/flows/test_graph.py holds what
it returns to what `dvc dag` and `dvc status` print, and the version of DVC is pinned.
"""

import dataclasses
import os
import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from vlfoundry.flows.dvclocks import at_work, patiently
from vlfoundry.flows.runcache import known
from vlfoundry.flows.stamps import CODE, describe_change, lock_entry
from vlfoundry.infra.core.code import refresh
from vlfoundry.infra.core.dvccache import read_settings
from vlfoundry.infra.core.errors import ConfigError, DataError
from vlfoundry.infra.core.files import write_atomic

DEFAULT_TIMEOUT_S = 12 * 3600.0
ALL_SLOTS = "all"
CUT_HASH = re.compile(r"^[ -]*md5:(?! *['\"]?[0-9a-f]{32}(\.dir)?['\"]? *$)", re.MULTILINE)
"""a line of dvc.lock with something else than a hash"""
NEVER = "never run"
LOCK_ADVICE = (
    "delete dvc.lock and run again: stages whose results DVC's cache has are not run again"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageNode:
    """One DVC stage."""

    name: str
    """As `dvc repro` takes it, e.g. "shard" or "sft@full"."""
    cmd: str
    """The shell command; empty for a file that `dvc add` tracks."""
    deps: tuple[str, ...]
    """Paths it reads, relative to the root (parameters excluded)."""
    outs: tuple[str, ...]
    """Paths it writes, relative to the root."""
    upstream: tuple[str, ...]
    """Names of the stages whose outputs it reads."""
    slots: int | None = None
    """CPU slots that it takes while it runs (`meta: {cpu: 1}`); None is the whole machine."""
    timeout_s: float = DEFAULT_TIMEOUT_S
    """Time limit in seconds (`meta: {timeout_s: 600}`)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Graph:
    """All stages, and what DVC says about each."""

    nodes: tuple[StageNode, ...]
    """Every stage after the stages that it depends on."""
    changed: dict[str, str]
    """Why a stage is out of date by itself, in words; stages that are not are absent."""
    has_code: bool = False
    """Whether its first step is `code`."""
    restorable: frozenset[str] = frozenset()
    """Of the stale stages, those whose results DVC's cache has, so that they need not run. What is
    after a stage that must run is never among them: what it will read is not known yet."""
    running: dict[str, int] = dataclasses.field(default_factory=dict)
    """Stages that another DVC runs at present, which are stale, and its process ID."""

    def node(self, name: str) -> StageNode:
        """The stage of that name. Raises ConfigError, naming the known ones."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise ConfigError(
            f"no stage {name!r} in dvc.yaml; expected one of {[node.name for node in self.nodes]}"
        )

    @cached_property
    def stale(self) -> frozenset[str]:
        """Names of the stages that must run: changed themselves, or downstream of one that is."""
        stale: set[str] = set()
        for node in self.nodes:
            if node.name in self.changed or not stale.isdisjoint(node.upstream):
                stale.add(node.name)
        return frozenset(stale)

    def state(self, name: str) -> Literal["up to date", "stale", "running"]:
        """How a stage is, in a word."""
        if name in self.running:
            return "running"
        return "stale" if name in self.stale else "up to date"

    def reason(self, name: str) -> str | None:
        """Why a stage must run, in words; None if it need not."""
        if name in self.changed:
            return self.changed[name]
        upstream = sorted(set(self.node(name).upstream) & self.stale)
        return f"after {', '.join(upstream)}" if upstream else None

    def needed_for(self, names: tuple[str, ...]) -> frozenset[str]:
        """`names` and everything upstream of them; all stages where `names` is empty.

        A name without its variant stands for all variants: "sft" for "sft@simple", "sft@full".
        """
        if not names:
            return frozenset(node.name for node in self.nodes)
        known = [node.name for node in self.nodes]
        frontier = [
            match
            for name in names
            for match in ([n for n in known if n.split("@")[0] == name] or [self.node(name).name])
        ]
        needed: set[str] = set()
        while frontier:
            name = frontier.pop()
            if name not in needed:
                needed.add(name)
                frontier += self.node(name).upstream
        return frozenset(needed)


def load_graph(root: Path, say: Callable[[str], None] = print, *, beside: bool = False) -> Graph:
    """Read graph and status in one go (about 3 CPU-s, most of it imports).

    The step `code`, which always runs, has run by then, and is left out: what it says is up to
    date.

    Args:
        root: the checkout.
        say: is told if this waits for another DVC process.
        beside: do not wait until what another DVC runs has ended, which may take days: it is stale.

    Raises:
        ConfigError: DVC cannot read its settings.
        DataError: dvc.yaml or dvc.lock cannot be read, or another DVC keeps its lock.
        OSError: DVC's folder cannot be written.
    """
    os.environ.setdefault("DVC_NO_ANALYTICS", "1")
    read_settings(root)
    from dvc.exceptions import DvcException
    from dvc.lock import LockError
    from dvc.repo import Repo
    from dvc.rwlock import RWLockFileCorruptedError

    def read() -> Graph:
        with Repo(str(root)) as repo:
            graph = repo.index.graph
            names = {stage: name for stage in graph if (name := _name(stage, root)) != CODE}
            code = refresh(root) if len(names) < len(graph) else {}
            nodes = [_node(stage, graph, names, root) for stage in names]
            running = _running(names, root) if beside else {}
            by_address = {stage.addressing: name for stage, name in names.items()}
            reasons = {
                name: _reason(details)
                for address, details in _status(repo, nodes, by_address, running).items()
                if (name := by_address.get(address))
            }
            recorded = {names[s] for s in names if not s.cmd or any(o.hash_info for o in s.outs)}
            changed = {
                name: describe_change(text, name, code, root) if name in recorded else NEVER
                for name, text in reasons.items()
            }
            changed |= {name: f"process {pid} runs it now" for name, pid in running.items()}
            found = Graph(
                nodes=tuple(_in_order(nodes)), changed=changed, has_code=bool(code), running=running
            )
            restorable = _restorable(found, {name: stage for stage, name in names.items()})
        return dataclasses.replace(found, restorable=restorable)

    check_lock_file(root)
    try:
        return patiently(read, (LockError, RWLockFileCorruptedError), root, say)
    except DvcException as error:
        said = str(error)
        cause = error.__cause__
        while cause:
            said += f": {cause}" if str(cause) not in said else ""
            cause = cause.__cause__
        advice = f"; {LOCK_ADVICE}" if "dvc.lock" in said else ""
        if "not a git repository" in said:
            advice = f"; `git init {root}` makes it one"
        said = " ".join(said.split())
        raise DataError(f"DVC cannot read the pipeline in {root}: {said}{advice}") from error


def check_lock_file(root: Path) -> None:
    """Raises DataError for a dvc.lock that is no record of a run: empty, not YAML's mapping, or cut
    in a hash, which DVC may take for a number."""
    path = root / "dvc.lock"
    if not path.exists():
        return
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, IsADirectoryError):
        text = ""
    if not re.search(r"^schema:", text, re.MULTILINE) or CUT_HASH.search(text):
        raise DataError(f"{path} is damaged; {LOCK_ADVICE}")


def lock_is_whole(text: str) -> bool:
    """Whether DVC would read the text of a dvc.lock."""
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError
    from voluptuous import Invalid

    if CUT_HASH.search(text) or not text.endswith("\n"):
        return False
    try:
        COMPILED_LOCKFILE_SCHEMA(YAML(typ="safe", pure=True).load(text))
    except (YAMLError, Invalid):
        return False
    return True


def order_lock(root: Path, graph: Graph) -> None:
    """Put the entries of dvc.lock into the graph's order, and one of the step `code` before them.

    DVC appends a stage when it first ends, and stages that run side by side, or in a run that was
    killed and went on, end in any order. No DVC may run meanwhile.
    """
    path = root / "dvc.lock"
    if not path.is_file():
        return
    head, *entries = re.split(r"^(?=  \S)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    place = {node.name: index for index, node in enumerate(graph.nodes)}
    last = len(place)

    def name(entry: str) -> str:
        return entry.strip().partition(":")[0]

    said = [lock_entry(root)] if graph.has_code else [e for e in entries if name(e) == CODE]
    others = [entry for entry in entries if name(entry) != CODE]
    ordered = [*said, *sorted(others, key=lambda entry: place.get(name(entry), last))]
    if ordered != entries:
        write_atomic(path, head + "".join(ordered))


def _restorable(graph: Graph, stages: dict[str, Any]) -> frozenset[str]:
    """What the cache knows, each stage asked with what those before it would be restored to."""
    names, made = set[str](), dict[str, Any]()
    for node in graph.nodes:
        waits = graph.stale.intersection(node.upstream)
        if node.name in graph.stale - graph.running.keys() and waits <= names:
            found = known(stages[node.name], made)
            if found:
                names.add(node.name)
                made |= {out.fs_path: out for out in found.outs}
    return frozenset(names)


def _running(names: dict[Any, str], root: Path) -> dict[str, int]:
    written = at_work(root)
    return {
        name: written[Path(out.fs_path)]
        for stage, name in names.items()
        for out in stage.outs
        if Path(out.fs_path) in written
    }


def _status(
    repo: Any, nodes: list[StageNode], by_address: dict[str, str], running: dict[str, int]
) -> dict[str, list[Any]]:
    """What DVC says of the stages, but for those that run and whatever is after one of them: it
    would refuse to look at what is being written."""
    if not running:
        return repo.status()
    unknown = Graph(nodes=tuple(_in_order(nodes)), changed=dict.fromkeys(running, "")).stale
    asked = [address for address, name in by_address.items() if name not in unknown]
    return repo.status(targets=asked) if asked else {}


def _name(stage: Any, root: Path) -> str:
    """`stage.addressing` without its dependence on the working directory."""
    if stage.cmd is not None and getattr(stage, "name", None):
        return stage.name
    return Path(os.path.relpath(stage.path, root)).as_posix()


def _node(stage: Any, graph: Any, names: dict[Any, str], root: Path) -> StageNode:
    from dvc.dependency import ParamsDependency

    meta = stage.meta or {}
    slots = meta.get("cpu", ALL_SLOTS)
    if slots != ALL_SLOTS and not (isinstance(slots, int) and slots > 0):
        raise ConfigError(
            f"dvc.yaml, stage {names[stage]}: meta.cpu is {slots!r}, expected a number or 'all'"
        )
    return StageNode(
        name=names[stage],
        cmd=_command(stage.cmd),
        deps=tuple(
            _relative(dep, root) for dep in stage.deps if not isinstance(dep, ParamsDependency)
        ),
        outs=tuple(_relative(out, root) for out in stage.outs),
        upstream=tuple(sorted(names[o] for o in graph.successors(stage) if o in names)),
        slots=None if slots == ALL_SLOTS else slots,
        timeout_s=float(meta.get("timeout_s", DEFAULT_TIMEOUT_S)),
    )


def _command(cmd: str | list[str] | None) -> str:
    return "\n".join(cmd) if isinstance(cmd, list) else cmd or ""


def _relative(output: Any, root: Path) -> str:
    if output.fs.protocol != "local":
        return str(output)
    return Path(os.path.relpath(output.fs_path, root)).as_posix()


def _in_order(nodes: list[StageNode]) -> list[StageNode]:
    """Topological order; ties by the order of dvc.yaml (the graph keeps it)."""
    waiting, done, ordered = list(nodes), set[str](), []
    while waiting:
        node = next(node for node in waiting if done.issuperset(node.upstream))
        waiting.remove(node)
        done.add(node.name)
        ordered.append(node)
    return ordered


def _reason(details: list[Any]) -> str:
    """DVC's nested status as one line: `changed deps: params.yaml (sft.lr), modified a.txt`."""
    parts = []
    for detail in details:
        if isinstance(detail, str):
            parts.append(detail)
            continue
        for kind, entries in detail.items():
            parts.append(f"{kind}: {', '.join(_entry(*item) for item in entries.items())}")
    return "; ".join(parts)


def _entry(path: str, what: Any) -> str:
    return f"{path} ({', '.join(what)})" if isinstance(what, dict) else f"{what} {path}"
