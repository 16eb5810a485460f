"""A small funnel and a tiny training project, each run once for all tests that look at parts."""

from pathlib import Path

import pytest

from vlfoundry.infra.core.config import build
from vlfoundry.infra.core.stage import Context

ROOT = Path(__file__).parents[2]
FUNNEL = ("ingest", "bootstrap", "filter", "dedup", "decontaminate", "shard")
FUNNEL_PARAMS = {
    "seed": 1,
    "languages": ["en", "zh", "it"],
    "box_grid": 16,
    "ingest": {
        "train_sources": ["noto", "fluent", "fluent_flat", "fxemoji"],
        "families": {"fluent_flat": "fluent"},
        "test_source": "twemoji",
        "classes": 40,
        "min_drawings": 4,
        "held_out": 0.15,
    },
    "bootstrap": {"steps": 120, "hidden": 128, "width": 64, "token_width": 96, "vocabulary": 800},
    "filter": {},
    "dedup": {},
    "decontaminate": {"planted": 20},
    "shard": {"samples_per_shard": 100},
}
TRAINING = (
    ("pretrain_text",),
    ("contrastive",),
    ("generative",),
    ("sft", "variant=simple"),
    ("sft", "variant=full"),
)
TRAINING_IMPORTS = (
    "fsspec.implementations.local",
    "vlfoundry.infra.backend.parallel",
    "vlfoundry.infra.train.session",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.distributed",
    "megatron.core.models.backends",
    "megatron.core.transformer.multi_token_prediction",
    "vlfoundry.models.internvl.predict",
    "vlfoundry.models.objectives.contrastive",
    "vlfoundry.models.objectives.generative",
    "vlfoundry.models.objectives.next_token",
    "vlfoundry.models.preprocess.normalize",
    "safetensors.torch",
    "tokenizers",
    "torch._dynamo",
    "torch.utils.flop_counter",
)


def run_stage(stage, root: Path, params: dict = FUNNEL_PARAMS) -> None:
    """Run one stage in this process, in the workspace `root`."""
    needed = {name: params[name] for name in stage.parameters}
    stage.run(build(stage.config, needed), Context(stage.bind(None), root, "test"))


@pytest.fixture(scope="session")
def run_one():
    return run_stage


@pytest.fixture(scope="session")
def funnel_params() -> dict:
    return FUNNEL_PARAMS


@pytest.fixture(scope="session")
def funnel(made_once) -> Path:
    """A workspace in which the funnel has run; tests read it and must not change it."""
    import importlib

    def make(root: Path) -> None:
        (root / "data").symlink_to(ROOT / "data")
        for name in FUNNEL:
            run_stage(importlib.import_module(f"vlfoundry.stages.{name}").STAGE, root)

    return made_once("funnel", make)


@pytest.fixture(scope="session")
def warm(run_ranks) -> None:
    """Import, in the process that forks stages, what their ranks would import one by one."""
    import importlib
    import warnings

    from PIL import Image

    Image.init()
    with warnings.catch_warnings(action="ignore"):  # Megatron tells of packages that it lacks
        for name in TRAINING_IMPORTS:
            importlib.import_module(name)


@pytest.fixture(scope="session")
def trained(warm, made_once) -> Path:
    """A tiny project in which all training stages have run; tests read it, and copy to change."""
    from tests.support.tiny_project import make_project, run_stage

    def make(root: Path) -> None:
        make_project(root)
        for stage, *arguments in TRAINING:
            run_stage(root, stage, *arguments)

    return made_once("trained", make)
