"""Kills a training stage again and again at random moments, and lets it go on each time."""

import dataclasses
import json
import os
import random
import shutil
import time
from pathlib import Path

from tests.support.tiny_project import (
    ROOT,
    Running,
    Start,
    artifacts,
    make_project,
    run_stage,
    start_process,
)
from vlfoundry.infra.core.config import load_params
from vlfoundry.infra.core.workfolder import folders, home

STAGE = "contrastive"
STEPS = 24
CHECKPOINT_STEPS = 3
CONCEPTS = 60
KILLS = int(os.environ.get("ACCEPT_KILLS", "10"))
SEED = int(os.environ.get("ACCEPT_SEED", "0"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A stage that is killed, and where it keeps what it makes."""

    root: Path
    """The project."""
    stage: str = STAGE
    variant: str = ""
    start: Start = start_process
    """How it is started."""

    @property
    def made(self) -> str:
        return f"{self.stage}/{self.variant}".rstrip("/")

    @property
    def home(self) -> Path:
        """Where the folders of its run keys lie."""
        return home(self.root, f"{self.stage}@{self.variant}".rstrip("@"))

    @property
    def work(self) -> Path:
        """The folder of its one run key; one that does not exist before it is claimed."""
        return next(iter(folders(self.home)), self.home / "none")

    def run(self) -> Running:
        """Start it."""
        return self.start(
            self.root, self.stage, *([f"variant={self.variant}"] if self.variant else [])
        )

    def clear(self) -> None:
        """Forget all that it has made."""
        shutil.rmtree(self.home)
        shutil.rmtree(self.root / "artifacts" / self.made)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kill:
    """One kill -9, and what lay there afterwards."""

    after_s: float
    """Seconds after the stage had claimed its work folder."""
    checkpoint: int
    """Step of the newest complete checkpoint; 0: none."""
    torn: bool
    """Whether it struck while a checkpoint was being written."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Siege:
    """All kills of one check."""

    whole_s: float
    """Seconds that the stage takes when nobody kills it, imports not counted."""
    kills: list[Kill]
    resumed_from: list[int]
    """For each run that came to its end: the step from which its last part began."""
    same: bool
    """Whether all of these made the bytes of the run that was never killed."""


def make_place(root: Path) -> None:
    """A project with the default profile's model and batch on a few drawings."""
    params = load_params(ROOT / "params.yaml")
    params["pretrain_text"]["train"] |= {"steps": 10, "warmup_steps": 1}
    params[STAGE]["train"] |= {
        "steps": STEPS, "warmup_steps": 10,
        "save_every_steps": CHECKPOINT_STEPS, "log_every_steps": CHECKPOINT_STEPS,
    }  # fmt: skip
    make_project(root, params, CONCEPTS)
    run_stage(root, "pretrain_text", start=start_process)


def besiege(target: Target, kills: int = KILLS, seed: int = SEED) -> Siege:
    """Kill the stage `kills` times; whenever it ends before its kill, compare and begin again."""
    running, began = _begun(target)
    assert running.wait() == 0, running.output
    whole_s = time.monotonic() - began
    expected = artifacts(target.root, target.made)
    target.clear()
    moments, done = random.Random(seed), list[Kill]()
    resumed_from, same = list[int](), True
    while True:
        after_s = moments.uniform(0, whole_s)
        running, began = _begun(target)
        last = len(done) == kills
        while running.collect() is None and (last or time.monotonic() < began + after_s):
            time.sleep(0.002)
        may_be_killed = running.collect() is None and ": done in" not in running.output
        if may_be_killed and running.killed_9():
            done.append(_traces(target, after_s))
            continue
        assert running.wait() == 0, running.output
        resumed_from.append(_resumed_from(target))
        same = same and artifacts(target.root, target.made) == expected
        if last:
            return Siege(
                whole_s=round(whole_s, 1), kills=done, resumed_from=resumed_from, same=same
            )
        target.clear()


def _begun(target: Target) -> tuple[Running, float]:
    """Started, and the time at which it had said its run key: imports are not worth a kill."""
    running = target.run()
    while "run key" not in running.output and running.collect() is None:
        time.sleep(0.005)
    return running, time.monotonic()


def _traces(target: Target, after_s: float) -> Kill:
    checkpoints = target.work / "checkpoints"
    steps = [int(path.name.partition("-")[2]) for path in checkpoints.glob("step-*")]
    torn = bool(list(checkpoints.glob(".step-*.part")))
    return Kill(after_s=round(after_s, 2), checkpoint=max(steps, default=0), torn=torn)


def _resumed_from(target: Target) -> int:
    return json.loads((target.work / "record.json").read_text("utf-8"))["resumed_from"]
