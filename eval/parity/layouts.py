"""The recorded values once more: by two tensor ranks, and forward through two pipeline stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlfoundry.eval.parity.check import Check
from vlfoundry.eval.parity.recorded import listen_decoder
from vlfoundry.infra.backend import Layout
from vlfoundry.infra.backend.parallel import current_layout, parallel
from vlfoundry.infra.core.errors import LayoutError
from vlfoundry.infra.launch.launchers.fork import run_ranks
from vlfoundry.infra.train.step import Engine
from vlfoundry.models.internvl.config import InternVLConfig
from vlfoundry.models.internvl.pipeline_split import check_layout
from vlfoundry.models.objectives.common import Batch, Metrics, MicroBatches, Objective

Finish = Callable[[Any, dict[str, Tensor], Batch], Metrics]
"""(model, what came out of a path, batch) -> what is compared; called at the last stage"""
LAYOUTS = {"tensor 2": Layout(tensor=2), "pipeline 2": Layout(pipeline=2)}


def check_layouts(
    folder: Path,
    whole: Callable[[Path], list[Check]],
    staged: Callable[[Path], list[Check]],
    built: Callable[[Path], tuple[str, InternVLConfig]],
) -> list[Check]:
    """The folder's checks on two ranks; a layout that its sizes do not allow is told with why.

    Args:
        folder: of recorded results.
        whole: compares everything, by models that are whole but for tensor parallelism.
        staged: compares what goes forward through a pipeline.
        built: kind and config of the largest model that these build.
    """
    checks: list[Check] = []
    for name, check in (("tensor 2", whole), ("pipeline 2", staged)):
        try:
            check_layout(*built(folder), LAYOUTS[name])
            found = run_ranks(_on_a_rank, LAYOUTS[name], check, folder, ranks=2)[0]
        except LayoutError as error:
            note = f"does not apply: {error}"
            checks.append(Check(name=name, passed=True, note=note, applies=False))
            continue
        checks += [dataclasses.replace(check, name=f"{name}/{check.name}") for check in found]
    return checks


def _on_a_rank(layout: Layout, check: Callable[[Path], list[Check]], folder: Path) -> list[Check]:
    with parallel(layout):
        return check(folder)


class _Through(Objective):
    """No loss: what comes out of a path."""

    paths = ()
    coupled = True

    def __init__(self, finish: Finish):
        self._finish = finish

    def samples(self, batch: Batch) -> int:
        return 1

    def micro_batches(self, path: str, batch: Batch, parts: int) -> MicroBatches:
        return MicroBatches(batches=[batch])

    def finish(self, path: str, model: Any, state: dict[str, Tensor], batch: Batch) -> Metrics:
        return self._finish(model, state, batch)


@torch.no_grad()
def through_stages(
    model: Any, path: str, batch: Batch, finish: Finish = lambda model, state, batch: state
) -> Metrics:
    """What a batch comes to at the end of a path through the pipeline; on every rank."""
    model.eval()
    return Engine(model, [model], _Through(finish), current_layout()).collect(path, batch)


@contextmanager
def listen_stages(part: str, model: Any) -> Iterator[dict[str, Tensor]]:
    """`listen_decoder` for a tower of which each stage holds some layers; complete afterwards."""
    heard: dict[str, Tensor] = {}
    tower = getattr(model, part)
    if tower is None:
        yield heard
    else:
        with listen_decoder(tower) as own:
            yield heard
        heard |= own
        for name, here in (("layer_in", tower.starts), ("after_norm", tower.ends)):
            if not here:
                heard.pop(name, None)
    heard |= _from_all_stages(heard)


def _from_all_stages(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    from megatron.core import parallel_state

    group = parallel_state.get_pipeline_model_parallel_group()
    every: list[dict[str, Tensor]] = [{}] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(every, dict(own), group=group)
    return {name: tensor for stage in every for name, tensor in stage.items()}
