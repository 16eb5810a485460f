"""The code of a step as one of its inputs: what it means, what it counts as, what computes for it.

    python -m vlfoundry.infra.core.code

is the first step of dvc.yaml. It always runs, and writes one small file a step, on which the step
depends in place of its sources: `artifacts/code/STEP.json`. A change that means nothing leaves its
bytes alone (`infra/core/meaning.py`), and so does one that a person has declared harmless
(`vlfoundry accept`, in `accepted.yaml`).

Nothing here is part of a result, nor is any other module of `NEUTRAL`.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlfoundry.infra.core.config import build, canonical_json, load_params, read_yaml, to_dict
from vlfoundry.infra.core.errors import ConfigError, DataError, UserError
from vlfoundry.infra.core.files import write_atomic
from vlfoundry.infra.core.meaning import MEMBERS, Source, read_source, table_meaning
from vlfoundry.infra.core.project import check_format

PACKAGE = "vlfoundry"
PACKAGE_FOLDER = Path(__file__).parents[2]
STEP_FILES = "artifacts/code"
ACCEPTED = "accepted.yaml"
CACHE = ".dvc/tmp/meanings.json"
REMEMBERED = 2000
"""sources, of several versions, whose meaning is kept"""
EXIT_USER_ERROR = 2
NEUTRAL: Mapping[str, str] = {
    "vlfoundry.infra.core.code": "says what code a step has, and takes no part in it",
    "vlfoundry.infra.core.meaning": "the same",
    "vlfoundry.infra.core.workfolder": "where a step keeps its state",
    "vlfoundry.infra.core.progress": "shows how far a loop is",
    "vlfoundry.infra.core.interrupts": "how a process that is asked to end does so",
    "vlfoundry.infra.core.space": "words for a full disk",
    "vlfoundry.infra.train.telemetry": "tells where time goes",
    "vlfoundry.infra.train.mfu": "counts FLOPs",
}
"""Modules that cannot change a result, and why. tests/stages/test_neutral.py shows it for each."""
LIBRARIES = (
    "torch", "megatron-core", "transformer-engine", "pillow", "simplejpeg", "tokenizers", "numpy",
)  # fmt: skip
"""whose versions may change a result"""
ABOUT = f"""\
# Changes of code that somebody has declared harmless; `{PACKAGE} accept` writes it. The code of a
# step that is named here counts as an earlier one, so that what that one made stays up to date.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeOptions:
    """`code` of params.yaml."""

    strict_versions: bool = False
    """whether another version of one of `LIBRARIES` makes a step stale"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Declaration:
    """An entry of accepted.yaml: somebody says that a change of a step's code is harmless."""

    step: str
    """As a module of `stages/` is named."""
    code: str
    """The new code's identity."""
    counts_as: str
    """That of the earlier one."""
    because: str
    """Why."""
    by: str
    """Who says so."""
    on: str
    """When: year-month-day."""
    modules: tuple[str, ...] = ()
    """What differed, if that was known."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Code:
    """The code of one step."""

    step: str
    modules: Mapping[str, str]
    """Each module that the step may import -> what it means; without `NEUTRAL`."""
    identity: str
    """Hexadecimal sha256 of all of them."""
    libraries: Mapping[str, str]
    """Version of each of `LIBRARIES` that is installed."""
    declared: Declaration | None = None
    """By which it counts as an earlier one."""
    strict: bool = False
    """Whether the libraries count."""

    @property
    def counts_as(self) -> str:
        """The identity that decides whether a step is up to date."""
        return self.declared.counts_as if self.declared else self.identity

    @property
    def stamp(self) -> dict[str, Any]:
        """What stands in the step's file, and in its run key."""
        return {
            "code": self.counts_as,
            **({"libraries": dict(self.libraries)} if self.strict else {}),
        }

    @property
    def facts(self) -> dict[str, Any]:
        """For lineage."""
        declared = {"accepted": to_dict(self.declared)} if self.declared else {}
        return {
            "code": self.identity,
            "sources": dict(self.modules),
            "libraries": dict(self.libraries),
            **declared,
        }


def steps(package: Path = PACKAGE_FOLDER) -> list[str]:
    """Names of all steps that have code: the modules of `stages/`, sorted."""
    return sorted(p.stem for p in (package / "stages").glob("*.py") if p.stem != "__init__")


def package_of(root: Path) -> Path:
    """The package whose code the steps of a project run: a checkout has its own."""
    own = root / PACKAGE
    return own if (own / "stages").is_dir() else PACKAGE_FOLDER


def read_code(
    wanted: Sequence[str], root: Path, *, params: Mapping[str, Any] | None = None,
    package: Path | None = None,
) -> dict[str, Code]:  # fmt: skip
    """The code of some steps of a project.

    Args:
        root: the project; what its sources mean is remembered there.
        params: the parameters; None: as params.yaml has them.
        package: where the code is; None: as `package_of` says.

    Raises:
        ConfigError: params.yaml or accepted.yaml is wrong.
        DataError: a source cannot be parsed.
    """
    if params is None:
        params = load_params(root / "params.yaml")
    options = build(CodeOptions, params.get("code", {}), "code")
    declared = {(entry.step, entry.code): entry for entry in declarations(root)}
    libraries = versions()
    with _Sources(package or package_of(root), root / CACHE) as sources:
        found = {}
        for step in wanted:
            modules = sources.closure(f"{PACKAGE}.stages.{step}")
            identity = hashlib.sha256(canonical_json(modules).encode()).hexdigest()
            found[step] = Code(
                step=step, modules=modules, identity=identity, libraries=libraries,
                declared=declared.get((step, identity)), strict=options.strict_versions,
            )  # fmt: skip
    return found


def closure(module: str, package: Path = PACKAGE_FOLDER) -> dict[str, str]:
    """The modules that importing one may reach, without `NEUTRAL`, and what each means.

    Found by reading the sources: imports inside functions count, other people's packages do not.
    A JSON file beside a module and named like it (`scenes.json`) is part of that module.
    """
    with _Sources(package, None) as sources:
        return sources.closure(module)


def versions() -> dict[str, str]:
    """Those of `LIBRARIES` that are installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def step_file(step: str) -> str:
    """Where the code of a step is said, relative to the project; without its variant."""
    return f"{STEP_FILES}/{step.partition('@')[0]}.json"


def write_stamp(root: Path, step: str, stamp: Mapping[str, Any]) -> bool:
    """Write the file of a step; False if it says so already.

    Raises OSError if it cannot be written.
    """
    path = root / step_file(step)
    text = json.dumps(stamp, sort_keys=True, indent=2) + "\n"
    if path.is_file() and path.read_bytes() == text.encode():
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text)
    return True


def refresh(root: Path) -> dict[str, Code]:
    """Write the files of all steps as their code is now; what that is.

    Raises as `read_code` and `write_stamp` do.
    """
    found = read_code(steps(package_of(root)), root)
    for step, code in found.items():
        write_stamp(root, step, code.stamp)
    return found


def declarations(root: Path) -> list[Declaration]:
    """What stands in accepted.yaml. Raises ConfigError if it cannot be read."""
    path = root / ACCEPTED
    if not path.is_file():
        return []
    entries = read_yaml(path.read_text(encoding="utf-8"), ACCEPTED) or []
    if not isinstance(entries, list):
        raise ConfigError(f"{path} holds {type(entries).__name__}, expected a list of declarations")
    return [build(Declaration, entry, f"{ACCEPTED}[{n}]") for n, entry in enumerate(entries)]


class _Sources:
    """The sources of a package, each read once, and what was read of them before."""

    def __init__(self, package: Path, cache: Path | None) -> None:
        self._package, self._cache = package, cache
        self._known = _load(cache) if cache else {}
        self._used: dict[str, Any] = {}
        self._read = functools.cache(self._read_once)

    def __enter__(self) -> "_Sources":
        return self

    def __exit__(self, *_error: object) -> None:
        new = self._used.keys() - self._known.keys()
        if self._cache and new and self._cache.parents[1].is_dir():
            earlier = self._known if len(self._known) < REMEMBERED else {}
            document = {"by": _reader(), "sources": earlier | self._used}
            try:
                self._cache.parent.mkdir(exist_ok=True)
                write_atomic(self._cache, json.dumps(document))
            except OSError:
                return  # it only saves time

    def closure(self, module: str) -> dict[str, str]:
        waiting, found = [module], dict[str, str]()
        while waiting:
            name = waiting.pop()
            if name in found or name in NEUTRAL or (path := self._path(name)) is None:
                continue
            source = self._read(path)
            found[name] = source.meaning
            waiting += [name.rpartition(".")[0]] if "." in name else []
            waiting += [n for n in source.imports if n != MEMBERS]
            if MEMBERS in source.imports and path.name == "__init__.py":
                waiting += [f"{name}.{p.stem}" for p in path.parent.glob("*.py") if p != path]
                for inner in path.parent.glob("*/__init__.py"):
                    folder = inner.parent.name
                    waiting += [f"{name}.{folder}", f"{name}.{folder}.{folder}"]
            table = path.with_suffix(".json")
            if table.is_file():
                found[f"{name}:{table.name}"] = table_meaning(table.read_text(encoding="utf-8"))
        return dict(sorted(found.items()))

    def _path(self, module: str) -> Path | None:
        package, *parts = module.split(".")
        if package != PACKAGE:
            return None
        place = self._package.joinpath(*parts)
        for candidate in (place / "__init__.py", place.with_suffix(".py")):
            if candidate.is_file():
                return candidate
        return None

    def _read_once(self, path: Path) -> Source:
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if digest in self._known:
            meaning, imports = self._known[digest]
            source = Source(meaning, tuple(imports))
        else:
            try:
                source = read_source(content.decode("utf-8"))
            except (SyntaxError, ValueError) as error:
                raise DataError(f"{path} cannot be read as Python: {error}") from error
        self._used[digest] = [source.meaning, list(source.imports)]
        return source


def _load(cache: Path) -> dict[str, Any]:
    try:
        document = json.loads(cache.read_bytes())
        return dict(document["sources"]) if document["by"] == _reader() else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


@functools.cache
def _reader() -> str:
    """By what sources were read: another Python, or another reader, may find another meaning."""
    own = Path(__file__).with_name("meaning.py").read_bytes()
    return hashlib.sha256(sys.version.encode() + own).hexdigest()


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    """The modules whose meaning differs, in words; sorted."""
    for name in sorted({*before, *now}):
        if name not in now:
            yield f"{name} (no longer used)"
        elif name not in before:
            yield f"{name} (new)"
        elif before[name] != now[name]:
            yield name


def main() -> int:
    """The step `code`; returns the exit status."""
    root = Path.cwd()
    try:
        check_format(root)
        refresh(root)
    except UserError as error:
        print(f"code: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
