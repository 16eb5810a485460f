"""What one step of the pipeline is, and the small command line that all steps share.

    python -m vlfoundry.stages.NAME [--help] [--dry-run] [variant=V] [key=value ...]

A stage declares its parameters, inputs and outputs once, and `dvc.yaml` is rendered from that
(`vlfoundry graph --write`). Everything that must outlive a kill lies in a folder of one run key
(`infra/core/workfolder.py`): when parameters, inputs or code change, the stage starts clean in
another.
"""

import contextlib
import dataclasses
import fcntl
import importlib
import importlib.metadata
import json
import os
import platform
import posixpath
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vlfoundry.infra.core import workfolder
from vlfoundry.infra.core.code import PACKAGE_FOLDER, Code, read_code, write_stamp
from vlfoundry.infra.core.config import apply_overrides, build, canonical_json, load_params, to_dict
from vlfoundry.infra.core.errors import ConfigError, DataError, KilledError, UserError
from vlfoundry.infra.core.files import write_atomic
from vlfoundry.infra.core.fingerprint import fingerprint
from vlfoundry.infra.core.interrupts import EXIT_INTERRUPTED, heed_interrupts
from vlfoundry.infra.core.runkey import run_key
from vlfoundry.infra.core.space import no_space

EXIT_FAILED = 1
EXIT_USER_ERROR = 2
COPY_PATIENCE_S = 60.0
LINEAGE_FORMAT = "vlfoundry.lineage.v2"
CODE_FILE = "code.json"
"""in a work folder: the code that last went on with it"""
START_FOLDER = "data/start"
ORIGIN_FILE = "origin.json"
"""in a model folder: which model it is a copy of, or what it was imported from"""
RECORDED_PACKAGES = ("torch", "megatron-core", "numpy", "pillow", "dvc", "prefect")


class Interrupted(Exception):
    """The run was asked to stop and has saved what it needs to go on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plot:
    """A diagram that `dvc plots` draws of an output: a JSON list of objects, one a point."""

    path: str
    """The output; may contain `{variant}`."""
    x: str
    """Key of the horizontal value."""
    y: str
    """Key of the vertical one."""
    title: str
    """Above the diagram; may contain `{variant}`."""
    template: str = "linear"
    """One that DVC brings along."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One arrow of the pipeline."""

    name: str
    """Name of the stage in dvc.yaml and of its module in `stages/`."""
    config: type
    """Frozen dataclass whose fields are the top-level keys of params.yaml that the stage reads."""
    inputs: tuple[str, ...]
    """Data files and folders read, relative to the root; may contain `{variant}`."""
    outputs: tuple[str, ...]
    """Files and folders made, byte-stable; may contain `{variant}`."""
    run: Callable[[Any, "Context"], None]
    """Does the work: `run(config, context)`."""
    timeout_s: int = 12 * 3600
    """Wall time after which the flow stops it."""
    cpu: int | None = None
    """CPU slots that it takes; None: the whole machine."""
    variants: tuple[str, ...] = ()
    """Names of a matrix stage, e.g. ("simple", "full")."""
    variant_inputs: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Further inputs that only some variants read."""
    starts: Callable[[Any, str | None], tuple[str, ...]] = lambda _config, _variant: ()
    """Further inputs, which the config names: model folders that the stage starts from or compares
    with."""
    start_parameters: Callable[[str | None], tuple[str, ...]] = lambda _variant: ()
    """The names of the parameters that `starts` reads, of a variant."""
    metrics: tuple[str, ...] = ()
    """Those of the outputs whose numbers `dvc metrics` and `dvc exp` show."""
    plots: tuple[Plot, ...] = ()
    """What `dvc plots` draws of others of the outputs."""

    @property
    def parameters(self) -> tuple[str, ...]:
        """Top-level keys of params.yaml that the stage depends on."""
        return tuple(field.name for field in dataclasses.fields(self.config))

    def bind(self, variant: str | None) -> "Bound":
        """This stage for one variant. Raises ConfigError if there is no such variant."""
        if (variant is None) == bool(self.variants) or (variant and variant not in self.variants):
            expected = f"variant=one of {list(self.variants)}" if self.variants else "no variant"
            raise ConfigError(f"stage {self.name}: got variant {variant!r}, expected {expected}")
        inputs = self.inputs + self.variant_inputs.get(variant or "", ())
        folder = f"artifacts/{self.name}/{variant}" if variant else f"artifacts/{self.name}"
        return Bound(
            stage=self,
            variant=variant,
            address=f"{self.name}@{variant}" if variant else self.name,
            fixed_inputs=tuple(path.format(variant=variant) for path in inputs),
            outputs=tuple(path.format(variant=variant) for path in self.outputs),
            metrics=tuple(path.format(variant=variant) for path in self.metrics),
            plots=tuple(
                dataclasses.replace(
                    plot,
                    path=plot.path.format(variant=variant),
                    title=plot.title.format(variant=variant),
                )
                for plot in self.plots
            ),
            lineage=f"{folder}/lineage.json",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bound:
    """A stage with its variant chosen: all paths are final."""

    stage: Stage
    variant: str | None
    address: str
    fixed_inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    metrics: tuple[str, ...]
    plots: tuple[Plot, ...]
    lineage: str

    def inputs(self, config: Any) -> tuple[str, ...]:
        """What a run with this config reads, each once. Raises ConfigError as `starts` does."""
        return tuple(dict.fromkeys((*self.fixed_inputs, *self.starts(config))))

    def starts(self, config: Any) -> tuple[str, ...]:
        """The model folders among them that the config names, each once.

        Raises ConfigError if one is what the stage itself makes: DVC removes that first.
        """
        folders = tuple(dict.fromkeys(self.stage.starts(config, self.variant)))
        for folder in folders:
            if any(_overlap(folder, output) for output in self.outputs):
                raise ConfigError(
                    f"stage {self.address} makes {folder} and cannot start from it; copy it with "
                    f"`vlfoundry import {folder} {START_FOLDER}/NAME` and start from there"
                )
        return folders


class Context:
    """What a running stage knows about its place: paths, run key, where to log and record."""

    def __init__(self, bound: Bound, root: Path, key: str) -> None:
        self.bound, self.root, self.run_key = bound, root, key
        self.variant = bound.variant
        self.work = workfolder.folder(root, bound.address, key)

    def path(self, relative: str | Path) -> Path:
        """An absolute path for `relative` to the root."""
        return self.root / relative

    def output(self, relative: str | Path) -> Path:
        """The path of an output, its parent folder made."""
        inside = any(Path(relative).is_relative_to(out) for out in self.bound.outputs)
        assert inside, f"{relative} is not an output of {self.bound.address}"
        path = self.root / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write_json(self, relative: str | Path, value: Any) -> None:
        """Write a byte-stable JSON output: sorted keys, two spaces, a newline at the end."""
        text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False) + "\n"
        self.output(relative).write_text(text, encoding="utf-8")

    def record(self, **facts: Any) -> None:
        """Add facts that must not be hashed (times, devices, rates) to `work/.../record.json`."""
        path = self.work / "record.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        write_atomic(path, json.dumps({**known, **facts}, indent=2, sort_keys=True) + "\n")

    def log(self, message: str) -> None:
        """Print one line at once."""
        print(message, flush=True)


def main(stage: Stage, arguments: Sequence[str] | None = None) -> int:
    """The command line of a stage module; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    _leave_with_parent()
    heed_interrupts(f"{stage.name}: stopped; run it again to go on")
    try:
        return _main(stage, arguments)
    except UserError as error:
        print(f"{stage.name}: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR
    except KilledError as error:
        print(f"{stage.name}: {error}; run it again", file=sys.stderr, flush=True)
        return EXIT_FAILED
    except (Interrupted, KeyboardInterrupt) as stop:
        print(f"{stage.name}: stopped; {str(stop) or 'run it again to go on'}", flush=True)
        return EXIT_INTERRUPTED
    except Exception as error:
        full = no_space(error, Path("work"), Path("artifacts"))
        if full is None:
            raise
        print(f"{stage.name}: {full}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR


def parameters_of(stage: Stage, params: dict[str, Any]) -> Any:
    """The stage's config, built from those top-level keys of `params` that it reads."""
    missing = [key for key in stage.parameters if key not in params]
    if missing:
        raise ConfigError(f"stage {stage.name}: params.yaml lacks {missing}")
    return build(stage.config, {key: params[key] for key in stage.parameters})


def check_folders(where: str, start: Any) -> None:
    """Raises ConfigError unless each field of a config is a folder as DVC and lineage spell it."""
    for field in dataclasses.fields(start):
        check_folder(f"{where}.{field.name}", getattr(start, field.name))


def check_folder(key: str, path: str) -> None:
    """Raises ConfigError, with the full name of the parameter, unless it is a folder as DVC and
    lineage spell it."""
    spelled = posixpath.normpath(path)
    outside = spelled in (".", "..") or spelled.startswith("../")
    if outside or path.startswith(("/", "~")) or "://" in path:
        raise ConfigError(
            f"{key} is {path!r}, expected a folder inside of the project, relative to its "
            f"root; `vlfoundry import SOURCE {START_FOLDER}/NAME` puts one there"
        )
    if spelled != path:
        raise ConfigError(f"{key} is {path!r}; write it as {spelled!r}")


def _main(stage: Stage, arguments: list[str]) -> int:
    if {"--help", "-h"} & set(arguments):
        # Not by an import statement: what it prints is no source of any result.
        print(
            "\n".join(importlib.import_module("vlfoundry.infra.core.stagehelp").help_lines(stage))
        )
        return 0
    dry_run = "--dry-run" in arguments
    assignments = [argument for argument in arguments if argument != "--dry-run"]
    variants = [a.partition("=")[2] for a in assignments if a.startswith("variant=")]
    bound = stage.bind(variants[-1] if variants else None)
    others = [a for a in assignments if not a.startswith("variant=")]
    if options := [a for a in others if a.startswith("-")]:
        raise ConfigError(f"got {options[0]!r}, expected --dry-run, --help or key=value")
    params = apply_overrides(load_params(), others)
    config = parameters_of(stage, params)
    if dry_run:
        print(_plan(bound, config))
        return 0
    root = Path.cwd()
    with _only_copy(root, bound.address):
        code = read_code([stage.name], root, params=params, package=PACKAGE_FOLDER)[stage.name]
        facts = _key_facts(bound, config, root)
        key = run_key(stage.name, facts["parameters"], facts["inputs"], code.stamp)
        context = Context(bound, root, key)
        workfolder.claim(root, bound.address, key, context.log)
        with _said_to_dvc(code, context):
            _run(bound, config, context, facts | code.facts)
    return 0


@contextlib.contextmanager
def _said_to_dvc(code: Code, context: Context) -> Iterator[None]:
    """What DVC records as the step's code is what the step has begun with, whoever patches it, or
    looks at it, meanwhile."""
    write_atomic(
        context.work / CODE_FILE,
        json.dumps({**code.facts, "counts_as": code.counts_as}, indent=2, sort_keys=True) + "\n",
    )
    write_stamp(context.root, code.step, code.stamp)
    yield
    write_stamp(context.root, code.step, code.stamp)


@contextlib.contextmanager
def _only_copy(root: Path, address: str) -> Iterator[None]:
    """Two copies of a stage would write the same files, and one that was killed may yet be saving.

    The lock lies with DVC's, in a checkout; whatever the stage forks inherits it. Raises DataError
    if another copy holds it for too long.
    """
    if not (root / ".dvc").is_dir():
        yield
        return
    path = workfolder.lock_file(root, address)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        deadline, waiting = time.monotonic() + COPY_PATIENCE_S, False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DataError(
                        f"another copy of {address} runs here; wait for it, or stop it"
                    ) from None
            if not waiting:
                print(f"{address}: waiting for another copy to end", flush=True)
                waiting = True
            time.sleep(0.1)
        yield


def _key_facts(bound: Bound, config: Any, root: Path) -> dict[str, Any]:
    inputs, starts = bound.inputs(config), bound.starts(config)
    for path in inputs:
        if not (root / path).exists():
            raise DataError(_missing(path, bound))
    return {
        "parameters": {
            **to_dict(config),
            **({"variant": bound.variant} if bound.variant else {}),
        },
        "inputs": {path: fingerprint(root / path) for path in inputs},
        **({"starts": {path: read_origin(root / path) for path in starts}} if starts else {}),
    }


def read_origin(folder: Path) -> dict[str, str] | None:
    """What a model folder says of where it came from; None: nothing."""
    path = folder / ORIGIN_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _missing(path: str, bound: Bound) -> str:
    if Path(path).is_relative_to(START_FOLDER):
        return f"{path} does not exist; `vlfoundry import SOURCE {path}` makes it of a model"
    return f"input {path} does not exist; `dvc repro {bound.address}` makes it"


def _run(bound: Bound, config: Any, context: Context, facts: dict[str, Any]) -> None:
    wall, cpu = time.perf_counter(), os.times()
    context.log(f"{bound.address}: run key {context.run_key[:12]}")
    bound.stage.run(config, context)
    for path in bound.outputs:
        assert context.path(path).exists(), f"{bound.address} did not make its output {path}"
    _write_lineage(bound, context, facts)
    now = os.times()
    cpu_s = sum(now[:4]) - sum(cpu[:4])
    wall_s = time.perf_counter() - wall
    context.record(
        stage=bound.address, run_key=context.run_key, wall_s=round(wall_s, 2),
        cpu_s=round(cpu_s, 2), versions=_versions(), machine=platform.machine(),
    )  # fmt: skip
    context.log(f"{bound.address}: done in {wall_s:.0f} s ({cpu_s:.0f} CPU-s)")


def _write_lineage(bound: Bound, context: Context, facts: dict[str, Any]) -> None:
    lineage = {
        "format": LINEAGE_FORMAT,
        "stage": bound.address,
        "run_key": context.run_key,
        **facts,
        "outputs": {path: fingerprint(context.path(path)) for path in bound.outputs},
    }
    path = context.path(bound.lineage)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(lineage, sort_keys=True, indent=2, ensure_ascii=False) + "\n")


def _plan(bound: Bound, config: Any) -> str:
    lines = [
        f"stage {bound.address}",
        f"  parameters {canonical_json(to_dict(config))}",
    ]
    for path in bound.inputs(config):
        lines.append(f"  reads  {path}{'' if Path(path).exists() else '  (does not exist yet)'}")
    lines += [f"  writes {path}" for path in (*bound.outputs, bound.lineage)]
    return "\n".join(lines)


def _overlap(one: str, other: str) -> bool:
    return Path(one).is_relative_to(other) or Path(other).is_relative_to(one)


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in RECORDED_PACKAGES}


def _leave_with_parent() -> None:
    from vlfoundry.infra.core.process import die_with_parent

    die_with_parent()
