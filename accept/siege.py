"""A small project whose whole `make run` is killed, one process or several at once, and goes on."""

import contextlib
import dataclasses
import os
import random
import re
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil

from accept.clone import fresh_clone
from vlfoundry.flows.launch import EXIT_REJECTED
from vlfoundry.infra.core.config import canonical_json, load_params
from vlfoundry.infra.core.fingerprint import fingerprint

RUN_LIMIT_S = 20 * 60.0
LEAVE_LIMIT_S = 20.0
"""What the guard gives a stage, 12.5 s, and a moment to kill it."""
MARK = "VLFOUNDRY_ACCEPT_MARK"
MADE = ("artifacts", "work", ".dvc/cache", ".dvc/tmp")
Kind = Callable[[psutil.Process, str], bool]


def _is_guard(line: str) -> bool:
    return "guard.py" in line


def _forked(process: psutil.Process, line: str) -> bool:
    parent = process.parent()
    return parent is not None and " ".join(parent.cmdline()) == line


KINDS: dict[str, Kind] = {
    "make": lambda _, line: line.startswith("make "),
    "flow": lambda _, line: "vlfoundry run" in line and not _is_guard(line),
    "guard of the stage": lambda _, line: _is_guard(line) and " dvc " in line,
    "guard of the server": lambda _, line: _is_guard(line) and "create_app" in line,
    "server": lambda _, line: not _is_guard(line) and "create_app" in line,
    "dvc": lambda _, line: not _is_guard(line) and " dvc " in line,
    "stage": lambda process, line: " -m vlfoundry.stages." in line and not _forked(process, line),
    "rank or worker": lambda process, line: (
        " -m vlfoundry.stages." in line and _forked(process, line)
    ),
}
TOGETHER = (
    ("flow", "guard of the stage"), ("flow", "make"), ("stage", "dvc"), ("flow", "server"),
    ("flow", "make", "guard of the stage", "guard of the server"), tuple(KINDS),
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kill:
    """One kill -9 and what came of it."""

    stage: str
    """The stage that ran."""
    victims: tuple[str, ...]
    """Kinds of the processes that were killed at once."""
    after_s: float
    """Seconds since the stage had begun."""
    ended_s: float
    """Seconds until nothing of the run was left."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """All kills of one siege."""

    kills: list[Kill]
    runs: int
    """How many times the whole pipeline came to its end."""
    different: int
    """How many of those made other bytes than the undisturbed run."""
    hung: list[str]
    """Runs that neither ended nor went on."""
    left: list[str]
    """Processes that outlived their run."""


@dataclasses.dataclass(kw_only=True)
class Project:
    """A fresh clone with small parameters."""

    root: Path
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    """How long each stage took when nobody disturbed it."""
    expected: dict[str, str] = dataclasses.field(default_factory=dict)
    mark: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)

    def start(self) -> subprocess.Popen:
        """`make run`; what it prints goes to work.log."""
        with (self.root.parent / "work.log").open("wb") as log:
            return subprocess.Popen(
                ["make", "run"], cwd=self.root, stdout=log, stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment, MARK: self.mark}, start_new_session=True,
            )  # fmt: skip

    def ended_well(self, process: subprocess.Popen) -> bool:
        """Whether all stages stand; so small a model need not pass the gate. `make` says 2 then."""
        return process.poll() == 0 or f"] Error {EXIT_REJECTED}\n" in self.output

    @property
    def output(self) -> str:
        """What the last run has printed."""
        return (self.root.parent / "work.log").read_text("utf-8", "replace")

    def processes(self) -> list[psutil.Process]:
        """Every living process of a run of this project."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                alive = process.status() != psutil.STATUS_ZOMBIE
                if alive and process.environ().get(MARK) == self.mark:
                    found.append(process)
        return found

    def of_kind(self, kind: str) -> list[psutil.Process]:
        """The processes of one kind."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if KINDS[kind](process, " ".join(process.cmdline())):
                    found.append(process)
        return found

    def made(self) -> dict[str, str]:
        """Checksums of dvc.lock and of every artifact."""
        files = [p for p in (self.root / "artifacts").rglob("*") if p.is_file()]
        known = {str(p.relative_to(self.root)): fingerprint(p) for p in files}
        return known | {"dvc.lock": fingerprint(self.root / "dvc.lock")}

    def clear(self) -> None:
        """Forget everything that runs have made."""
        for name in MADE:
            shutil.rmtree(self.root / name, ignore_errors=True)
        (self.root / "dvc.lock").unlink(missing_ok=True)

    def whole(self) -> None:
        """An undisturbed run: what each stage takes, and what all others must make."""
        process = self.start()
        process.wait(RUN_LIMIT_S)
        assert self.ended_well(process), self.output[-3000:]
        times = re.findall(r"^  (\S+)\s+ran\s+([0-9.]+) s$", self.output, re.MULTILINE)
        self.seconds = {name: float(seconds) for name, seconds in times}
        self.expected = self.made()


def make_project(place: Path) -> Project:
    """The shipped drawings of 40 classes, and 20 to 60 steps of each training stage."""
    root = fresh_clone(place)
    params = load_params(root / "params.yaml")
    params["ingest"]["classes"] = 40
    params["bootstrap"]["steps"], params["bootstrap"]["warmup_steps"] = 60, 6
    params["decontaminate"]["planted"] = 21
    params["evaluate"]["scenes"] = 22
    for steps, train in (
        (20, params["pretrain_text"]["train"]),
        (60, params["contrastive"]["train"]),
        (24, params["generative"]["train"]),
        (40, params["sft"]["train"]["simple"]),
        (23, params["sft"]["train"]["full"]),
    ):
        train |= {"steps": steps, "warmup_steps": 3, "save_every_steps": 7}
    (root / "params.yaml").write_text(canonical_json(params) + "\n", encoding="utf-8")
    return Project(root=root)


def besiege(project: Project, kills: int, seed: int) -> Outcome:
    """Kill `kills` times, go on each time, and compare whenever a run has come to its end."""
    chance, done = random.Random(seed), list[Kill]()
    runs, different, hung, left = 0, 0, list[str](), list[str]()
    project.clear()
    while True:
        process = project.start()
        kill = _strike(project, process, chance) if len(done) < kills else None
        began = time.monotonic()
        if not kill:  # nobody disturbs it, and its flow has perhaps not begun
            process.wait(RUN_LIMIT_S)
        survivors = _settle(project, process, at_once=kill is not None and chance.random() < 0.5)
        left += [f"{kill}: {line}" for line in survivors]
        if process.poll() is None:
            hung.append(f"{kill}: {project.output[-500:]}")
            _end(project)
        if kill:
            done.append(dataclasses.replace(kill, ended_s=round(time.monotonic() - began, 1)))
        if not project.ended_well(process):
            assert kill, project.output[-3000:]
            continue
        runs, different = runs + 1, different + (project.made() != project.expected)
        if len(done) >= kills:
            return Outcome(kills=done, runs=runs, different=different, hung=hung, left=left)
        project.clear()


def _strike(project: Project, process: subprocess.Popen, chance: random.Random) -> Kill | None:
    """Wait for a stage drawn by lot, then for a moment of it, then kill; None: it came too late."""
    running: set[str] = set()
    waiting = [name for name in project.seconds if not _stands(project, name)]
    stage = chance.choice(waiting or list(project.seconds))
    victims = chance.choice([*((kind,) for kind in KINDS), *TOGETHER])
    while stage not in running:
        running = set(re.findall(r"^▶ (\S+)$", project.output, re.MULTILINE))
        if process.poll() is not None:
            return None
        time.sleep(0.02)
    after_s = chance.uniform(0, project.seconds[stage])
    time.sleep(after_s)
    hit = [(kind, found) for kind in victims for found in project.of_kind(kind)]
    if "rank or worker" in victims and len(victims) == 1:  # one of them, not all
        hit = hit[: chance.randint(1, 2)]
    for _, found in hit:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.kill()
    if not hit:
        return None
    kinds = tuple(dict.fromkeys(kind for kind, _ in hit))
    return Kill(stage=stage, victims=kinds, after_s=round(after_s, 2), ended_s=0.0)


def _stands(project: Project, stage: str) -> bool:
    path = project.root / "dvc.lock"
    return path.is_file() and f"\n  {stage}:\n" in path.read_text("utf-8")


def _settle(project: Project, process: subprocess.Popen, *, at_once: bool) -> list[str]:
    """Wait for the flow to end, by itself or as it was killed; what is left of it for too long.

    at_once: do not wait for the rest: the next run has to.
    """
    deadline = time.monotonic() + RUN_LIMIT_S
    while project.of_kind("flow") and time.monotonic() < deadline:
        time.sleep(0.1)
    if time.monotonic() >= deadline:
        return []
    if at_once:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        return []
    deadline = time.monotonic() + LEAVE_LIMIT_S
    while (alive := project.processes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    lines = [" ".join(found.cmdline()) for found in alive if found.is_running()]
    _end(project)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)
    return lines


def _end(project: Project) -> None:
    for found in project.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            found.kill()
