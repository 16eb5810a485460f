"""How far FP8 leads stage 1 away from higher precision: twins on the stage's own batches.

    python -m benchmarks.fp8_gap [--steps 100] [--fp8 '{recipe: tensorwise}'] [--start 0]

Reads params.yaml and what the stages before `contrastive` have made. Prints one JSON line: the
smoothed losses (mean of the last tenth of the steps), by how much that of FP8 lies above, the
cosine between the gradients of the first batch for each layer, and what was lost to zero. One rank.

Runs that begin a percent apart end about a percent apart, in fp32 too: one pair says little of
what FP8 costs. `--start` chooses other beginnings for a pair; the mean over several says more.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import commit, machine
from vlfoundry.infra.backend import Layout
from vlfoundry.infra.backend.fp8_config import Fp8Config
from vlfoundry.infra.core.config import build, load_params, parse_value
from vlfoundry.infra.core.stage import Context, parameters_of
from vlfoundry.infra.launch.launchers.fork import run_ranks
from vlfoundry.infra.train.config import TrainConfig
from vlfoundry.infra.train.gap import Gap, measure_gap, smoothed
from vlfoundry.infra.train.session import DataParallelSlice
from vlfoundry.models.internvl.pipeline_split import check_layout
from vlfoundry.stages.contrastive import STAGE, Config, job

MOVED = 0.01
"""standard deviation of what the weights of another start are multiplied with, around 1"""


def gap(config: Config, root: Path, work: Path, start: int = 0) -> Gap:
    """Of stage 1 in the workspace `root`, from one of its starts (`moved`).

    Raises ConfigError for widths that FP8 cannot take.
    """
    train = config.contrastive.train
    check_layout("internvl_c", config.model, Layout(), fp8=train.fp8)
    context = Context(STAGE.bind(None), root, "gap")

    def make() -> tuple[Any, Any, Any]:
        made = job(config, context, DataParallelSlice(rank=0, ranks=1))
        moved(made.model, start)
        return made.model, made.objective, lambda step: made.finish(made.batch_at(step))

    return run_ranks(
        lambda: measure_gap(make, train, layout=Layout(), work=work), ranks=1
    )[0]  # fmt: skip


def moved(model: Any, start: int) -> None:
    """Multiply each weight with a number near 1, drawn with the seed `start`; 0: leave all."""
    import torch

    if not start:
        return
    draws = torch.Generator().manual_seed(start)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1 + MOVED * torch.randn(weight.shape, generator=draws))


def lost(work: Path) -> dict[str, float]:
    """The largest magnitude and the largest share lost to zero that the run in FP8 has told of."""
    told = (work / "fp8" / "steps.jsonl").read_text("utf-8").splitlines()
    lines = [line for line in map(json.loads, told) if "fp8_lost" in line]
    return {name: max(line[name] for line in lines) for name in ("fp8_amax", "fp8_lost")}


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
    parser.add_argument("--start", type=int, default=0, help="0: the stage's own initial weights")
    arguments = parser.parse_args()
    fp8 = build(Fp8Config, parse_value(arguments.fp8), "--fp8")
    config = shortened(parameters_of(STAGE, load_params()), arguments.steps, fp8)
    with tempfile.TemporaryDirectory() as work:
        found = gap(config, Path.cwd(), Path(work), arguments.start)
        told = lost(Path(work))
    line = {
        "fp8": dataclasses.asdict(fp8),
        "steps": arguments.steps,
        "start": arguments.start,
        "smoothed_loss": smoothed(found.losses),
        "smoothed_loss_of_twin": smoothed(found.twin_losses),
        "relative_gap": found.relative,
        "gradient_cosines": found.cosines,
        **told,
        **commit(),
        "machine": machine(),
    }
    print(json.dumps(line, sort_keys=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
