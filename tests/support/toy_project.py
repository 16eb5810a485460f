"""A toy checkout: a pipeline of four quick stages whose behaviour a test can steer."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

DVC_YAML = """\
stages:
  prepare:
    cmd: exec python work.py prepare
    deps: [source.txt, work.py]
    params: [seed]
    outs: [artifacts/prepare]
    meta: {cpu: 1, timeout_s: 60}
  train:
    matrix:
      kind: [a, b]
    cmd: exec python work.py train ${item.kind}
    deps: [artifacts/prepare]
    params: [train]
    outs: ["artifacts/train/${item.kind}"]
    meta: {timeout_s: 60}
  score:
    cmd: exec python work.py score
    deps: [artifacts/train/a, artifacts/train/b]
    outs: [artifacts/score]
"""
PARAMS_YAML = "seed: 1\nstart: scratch\ntrain:\n  lr: 0.001\n"
# A stage of the toy. `work/steer-<stage>` holds further code for it; DVC never hashes that.
WORK_PY = """\
import json, os, pathlib, sys, time
name = "-".join(sys.argv[1:])
out = pathlib.Path("artifacts", *sys.argv[1:])
out.mkdir(parents=True, exist_ok=True)
(out / "config.json").write_text(json.dumps({"kind": name.replace("train-", "toy_")}))
(out / "weights").write_text(name + pathlib.Path("params.yaml").read_text())
print("hello from " + name)
steer = pathlib.Path("work", "steer-" + name)
if steer.is_file():
    exec(steer.read_text())
"""
FILES = {
    "dvc.yaml": DVC_YAML,
    "params.yaml": PARAMS_YAML,
    "work.py": WORK_PY,
    "source.txt": "rows\n",
    ".gitignore": "/work/\n/artifacts/\n",
    ".dvcignore": "/work\n",
    "profiles/base.yaml": "train:\n  lr: 0.1\n",
    ".dvc/config": "[core]\n    analytics = false\n    autostage = false\n",
    ".dvc/.gitignore": "/config.local\n/tmp\n/cache\n",
}


def make_toy(root: Path) -> Path:
    """Write the toy checkout with one commit into the new folder `root`."""
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    sh(root, "git", "init", "--quiet")
    commit_all(root)
    return root


def reproduce(root: Path) -> None:
    """Train both toy models."""
    environment = {**os.environ, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "dvc", "repro", "--quiet", "train@a", "train@b"]
    subprocess.run(command, cwd=root, env=environment, check=True, timeout=120)


def commit_all(root: Path) -> None:
    """Commit everything, with an identity of its own."""
    sh(root, "git", "add", "--all")
    author = ("-c", "user.name=Toy", "-c", "user.email=toy@localhost")
    sh(root, "git", *author, "commit", "--quiet", "--allow-empty", "-m", "toy")


def sh(root: Path, *command: str) -> str:
    """Run a command in `root`; what it printed."""
    return subprocess.run(
        command, cwd=root, check=True, capture_output=True, text=True, timeout=120
    ).stdout


def steer(root: Path, stage: str, code: str) -> None:
    """Let the toy stage run `code` whenever it runs."""
    (root / "work").mkdir(exist_ok=True)
    (root / "work" / f"steer-{stage}").write_text(code)


def wait_until(condition: Callable[[], object], what: str, limit_s: float = 120.0) -> None:
    """Poll until `condition()` is true; fails the test after `limit_s`."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {limit_s:.0f} s"
        time.sleep(0.1)


def comes_to(look: Callable[[], object], wanted: object, limit_s: float = 30.0) -> None:
    """Poll until `look()` is `wanted`: Prefect's server records tasks after it was told of them."""
    deadline = time.monotonic() + limit_s
    while look() != wanted and time.monotonic() < deadline:
        time.sleep(0.1)
    assert look() == wanted


def processes_marked(mark: str) -> list[str]:
    """Command lines of all living processes that have `mark` in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if mark.encode() in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it ended while we looked, or is not ours
    return found


def wait_for_the_end(mark: str, limit_s: float) -> None:
    """Poll until no process with `mark` lives; fails the test with those that do."""
    deadline = time.monotonic() + limit_s
    while (left := processes_marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == [], left
