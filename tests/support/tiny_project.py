"""A project in a folder that trains in seconds: a dozen shipped drawings and a tiny model.

Its stages run as in the repository, of whose sources it has a copy: as processes of their own
(`start_process`), or forked from a test's warm process, without the seconds of importing torch
(`start_fork`); all else is the same.
"""

import dataclasses
import gc
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from vlfoundry.infra.core.config import canonical_json
from vlfoundry.infra.core.fingerprint import fingerprint
from vlfoundry.infra.data.shards.write import Sample, write_shards

ROOT = Path(__file__).parents[2]
SOURCES = ("vlfoundry", "flows", "infra", "models", "eval", "stages")
VENDORS = ("noto", "fxemoji", "emojitwo")
LANGUAGES = ("en", "zh", "ar", "it")
LIMIT_S = 120.0

_TRAIN = {"batch_samples": 8, "lr": 1.0e-3, "warmup_steps": 1, "log_every_steps": 4}
PARAMS: dict[str, Any] = {
    "seed": 3,
    "languages": list(LANGUAGES),
    "box_grid": 16,
    "model": {
        "vision": {
            "width": 32, "depth": 2, "heads": 2, "mlp_hidden": 64,
            "patch_px": 16, "image_px": 32, "layerscale_init": 1.0,
        },
        "text": {"vocab_size": 400, "width": 32, "depth": 2, "heads": 2, "mlp_hidden": 64},
        "queries": {"num_queries": 2},
        "embed_dim": 32,
        "pool_heads": 2,
    },
    "pretrain_text": {"conversation_share": 0.5, "train": {**_TRAIN, "steps": 4}},
    "contrastive": {
        "captions": 2, "masked_px": 48, "train": {**_TRAIN, "steps": 8, "save_every_steps": 2},
    },
    "generative": {"train": {**_TRAIN, "steps": 6, "save_every_steps": 2}},
    "sft": {
        "trainable": ["sft", "vision"],
        "train": {
            key: {**_TRAIN, "steps": 6, "save_every_steps": 2} for key in ("simple", "full")
        },
    },
}  # fmt: skip


def make_project(root: Path, params: dict[str, Any] = PARAMS, concepts: int = 4) -> Path:
    """Lay out a project: sources, params.yaml, and shards of `VENDORS`' drawings."""
    root.mkdir(parents=True, exist_ok=True)
    for name in SOURCES:
        # Not a link: a source that somebody edits between two runs would change the run key.
        shutil.copytree(ROOT / name, root / name, symlinks=True)
    (root / "data/chat").mkdir(parents=True)
    write_params(root, params)
    samples = drawings_with_captions(concepts)
    names = [sample for sample in samples if sample.meta["kind"] == "name"]
    write_shards(root / "artifacts/shard/stage1", samples, samples_per_shard=20)
    write_shards(root / "artifacts/shard/stage2", names, samples_per_shard=20)
    return root


def write_model(folder: Path, kind: str) -> None:
    """A model folder as commands look at it before they import PyTorch: all weights are zero."""
    import numpy as np
    from safetensors.numpy import save_file

    from vlfoundry.infra.core.config import build
    from vlfoundry.models.estimate.weights import weights
    from vlfoundry.models.internvl.config import InternVLConfig
    from vlfoundry.models.internvl.folder import write_config

    config = build(InternVLConfig, PARAMS["model"])
    write_config(folder, kind, config)
    held = {w.name: np.zeros(w.shape, np.float32) for w in weights(kind, config)}
    save_file(held, folder / "weights.safetensors")


def write_params(root: Path, params: dict[str, Any]) -> None:
    """Write params.yaml; JSON is YAML."""
    (root / "params.yaml").write_text(canonical_json(params) + "\n", encoding="utf-8")


def drawings_with_captions(concepts: int) -> list[Sample]:
    """What all `VENDORS` drew of `concepts` concepts: name and keywords in every language."""
    from vlfoundry.infra.data.sources.concept_set import (
        keyword_caption,
        read_artwork,
        read_concepts,
    )

    known = read_concepts(ROOT / "data")
    drawn = {
        vendor: {a.concept: a.image_bytes for a in read_artwork(ROOT / f"data/{vendor}.parquet")}
        for vendor in VENDORS
    }
    shared = [c for c in known if all(c in drawn[vendor] for vendor in VENDORS)][:concepts]
    facts = [
        (drawn[vendor][concept], {"concept": concept, "source": vendor, "lang": lang} | text)
        for concept in shared
        for vendor in VENDORS
        for lang in LANGUAGES
        for text in (
            {"kind": "name", "caption": known[concept].names[lang]},
            {"kind": "keywords", "caption": keyword_caption(known[concept], lang)},
        )
        if text["caption"]
    ]
    return [
        Sample(key=f"{row:08d}", image_bytes=picture, meta={**meta, "row": row, "similarity": 0.5})
        for row, (picture, meta) in enumerate(facts)
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Running:
    """A stage that was started, whichever way."""

    pid: int
    log: Path
    """What it prints."""
    collect: Callable[[], int | None]
    """Its exit code, as `subprocess` gives it; None while it runs."""

    def wait(self) -> int:
        """Until it ends; after `LIMIT_S` seconds it is killed, which the exit code shows."""
        deadline = time.monotonic() + LIMIT_S
        while (code := self.collect()) is None:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.01)
        return code

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def kill_9(self) -> None:
        """Kill the parent alone; the kernel must take its ranks with it."""
        assert self.killed_9(), "it ended before it could be killed"

    def killed_9(self) -> bool:
        """As `kill_9`; False if it was at its good end already."""
        ranks = psutil.Process(self.pid).children(recursive=True)
        os.kill(self.pid, signal.SIGKILL)
        code = self.wait()
        _, alive = psutil.wait_procs(ranks, timeout=5)
        assert not alive, f"ranks that outlived their parent: {alive}"
        assert code in (0, -signal.SIGKILL), self.output
        return code != 0

    def ranks(self) -> list[psutil.Process]:
        """The processes that it has forked."""
        return psutil.Process(self.pid).children(recursive=True)


Start = Callable[..., Running]


def start_process(root: Path, stage: str, *arguments: str) -> Running:
    """`python -m vlfoundry.stages.<stage>` in the project."""
    log = _log(root, stage)
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", f"vlfoundry.stages.{stage}", *arguments],
            cwd=root, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    return Running(pid=process.pid, log=log, collect=process.poll)


def start_fork(root: Path, stage: str, *arguments: str) -> Running:
    """The same stage in the project, forked from this process, whose imports it has."""
    log = _log(root, stage)
    log.touch()  # it is read before the fork has opened it
    definition = importlib.import_module(f"vlfoundry.stages.{stage}").STAGE
    sys.stdout.flush()
    sys.stderr.flush()
    gc.freeze()  # its collector would touch, and so copy, every page that has an object
    pid = os.fork()
    if pid == 0:
        _be_stage(root, definition, arguments, log)
    gc.unfreeze()
    ended: list[int] = []

    def collect() -> int | None:
        if not ended:
            found, status = os.waitpid(pid, os.WNOHANG)
            ended.extend([os.waitstatus_to_exitcode(status)] if found else [])
        return ended[0] if ended else None

    return Running(pid=pid, log=log, collect=collect)


def run_stage(root: Path, stage: str, *arguments: str, start: Start = start_fork) -> str:
    """Run a stage to its good end and return what it printed."""
    running = start(root, stage, *arguments)
    code = running.wait()
    assert code == 0, f"{stage} {arguments} ended with {code}:\n{running.output}"
    return running.output


def artifacts(root: Path, stage: str) -> dict[str, str]:
    """Fingerprint of every file that a stage made."""
    folder = root / "artifacts" / stage
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): fingerprint(path) for path in files}


def _log(root: Path, stage: str) -> Path:
    return root / f"{stage}-{len(list(root.glob('*.log')))}.log"


def _be_stage(root: Path, definition: Any, arguments: tuple[str, ...], log: Path) -> None:
    """The whole life of a forked stage. Never returns."""
    from vlfoundry.infra.core.stage import main

    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(root)
        stream = log.open("w", encoding="utf-8", buffering=1)
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        sys.stdout = sys.stderr = stream
        code = main(definition, arguments)
    except BaseException:  # noqa: BLE001 - as the interpreter would
        traceback.print_exc()
    finally:
        os._exit(code)
