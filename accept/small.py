"""A small project in a fresh clone, whose whole `make run` takes about two minutes."""

import os
import re
import subprocess
from pathlib import Path

from accept.clone import ROOT

CLASSES = 40
STEPS = 20


def small_project(place: Path) -> Path:
    """Clone HEAD to `place`, its runs made short; the environment is that of this checkout."""
    subprocess.run(["git", "clone", "--quiet", "--no-tags", str(ROOT), str(place)], check=True)
    path = place / "params.yaml"
    path.write_text(shortened(path.read_text("utf-8")), "utf-8")
    author = ("-c", "user.name=Small", "-c", "user.email=small@localhost")
    subprocess.run(["git", *author, "commit", "--quiet", "-am", "small"], cwd=place, check=True)
    (place / ".venv").symlink_to(ROOT / ".venv")
    return place


def shortened(params: str) -> str:
    """The default parameters with few classes, steps and questions, and a gate that lets pass."""
    short = re.sub(r"\bclasses: \d+", f"classes: {CLASSES}", params)
    short = re.sub(r"\bsteps: (\d+)", f"steps: {STEPS}", short)
    short = re.sub(r"\bwarmup_steps: \d+", "warmup_steps: 2", short)
    short = re.sub(r"\bscenes: \d+", "scenes: 20", short)
    rules = [
        "    - {variant: internvl_c, score: zero_shot/top1/ensemble, at_least: 0.0}",
        "    - {variant: internvl_g, score: retrieval/image_to_text_r10/en, at_least: 0.0}",
        "    - {variant: chat_simple, score: colour/accuracy, at_least: 0.0}",
        "    - {variant: chat_full, score: colour/accuracy, at_least: 0.0}",
    ]
    head, _, tail = short.partition("  rules:\n")
    after = tail[tail.index("\nreport:") :]
    return f"{head}  rules:\n" + "\n".join(rules) + "\n" + after


def environment(place: Path, **more: str) -> dict[str, str]:
    """Of a process in the project: its sources first, whatever checkout the environment is of."""
    path = f"{ROOT / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(place), "DVC_NO_ANALYTICS": "1", **more}


def vlfoundry(place: Path, *arguments: str | Path) -> list[str]:
    """The argv of a command in the project."""
    return [
        str(ROOT / ".venv" / "bin" / "python"),
        "-m",
        "vlfoundry.flows.cli",
        *map(str, arguments),
    ]
