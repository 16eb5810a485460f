"""How far FP8 leads stage 1 away from higher precision: twins on the stage's own batches.

    python -m benchmarks.fp8_gap [--steps 100] [--fp8 '{recipe: tensorwise}']

Reads params.yaml and what the stages before `contrastive` have made. Prints one JSON line: the
smoothed losses (mean of the last tenth of the steps), by how much that of FP8 lies above, and the
cosine between the gradients of the first batch for each layer. One rank.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import commit, machine
from infra.backend import Layout
from infra.backend.ranks import run_ranks
from infra.config import build, load_params, parse_value
from infra.fp8 import Fp8Config
from infra.stage import Context, parameters_of
from infra.train.config import TrainConfig
from infra.train.gap import Gap, measure_gap, smoothed
from infra.train.session import Place
from models.internvl.cut import check_layout
from stages.contrastive import STAGE, Config, job


def gap(config: Config, root: Path, work: Path) -> Gap:
    """Of stage 1 in the workspace `root`. Raises ConfigError for widths that FP8 cannot take."""
    train = config.contrastive.train
    check_layout("internvl_c", config.model, Layout(), fp8=train.fp8)
    context = Context(STAGE.bind(None), root, "gap")

    def make() -> tuple[Any, Any, Any]:
        made = job(config, context, Place(rank=0, ranks=1))
        return made.model, made.objective, lambda step: made.finish(made.batch_at(step))

    return run_ranks(
        lambda: measure_gap(make, train, layout=Layout(), work=work), ranks=1
    )[0]  # fmt: skip


def shortened(config: Config, steps: int, fp8: Fp8Config) -> Config:
    """The stage in FP8, with fewer steps and a warm-up that is shorter in proportion."""
    train: TrainConfig = config.contrastive.train
    changed = dataclasses.replace(
        train,
        steps=steps,
        warmup_steps=train.warmup_steps * steps // train.steps,
        save_every_steps=steps,
        fp8=fp8,
    )
    return dataclasses.replace(
        config, contrastive=dataclasses.replace(config.contrastive, train=changed)
    )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fp8_gap")
    parser.add_argument("--steps", type=int, default=100, help="of each run")
    parser.add_argument("--fp8", default="{}", help="train.fp8, as in params.yaml")
    arguments = parser.parse_args()
    fp8 = build(Fp8Config, parse_value(arguments.fp8), "--fp8")
    config = shortened(parameters_of(STAGE, load_params()), arguments.steps, fp8)
    with tempfile.TemporaryDirectory() as work:
        found = gap(config, Path.cwd(), Path(work))
    line = {
        "fp8": dataclasses.asdict(fp8),
        "steps": arguments.steps,
        "smoothed_loss": smoothed(found.losses),
        "smoothed_loss_of_twin": smoothed(found.twin_losses),
        "relative_gap": found.relative,
        "gradient_cosines": found.cosines,
        **commit(),
        "machine": machine(),
    }
    print(json.dumps(line, sort_keys=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
