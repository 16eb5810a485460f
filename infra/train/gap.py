"""How far FP8 leads training away: beside a twin in higher precision, on the same batches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlfoundry.infra.backend import Layout, device_literals
from vlfoundry.infra.train.config import TrainConfig
from vlfoundry.infra.train.fp8 import Fp8Run

SMOOTHED_SHARE = 0.1
"""last share of the steps, whose mean loss counts"""
Make = Callable[[], tuple[Any, Any, Callable[[int], Any]]]
"""a freshly initialised model, its objective, and this rank's batch of a step"""


@dataclass(frozen=True, kw_only=True)
class Gap:
    """What was found; equal on all ranks but for `cosines`, which rank 0 alone has."""

    losses: list[float]
    """of each step in FP8"""
    twin_losses: list[float]
    """of each step of the twin"""
    cosines: dict[str, float]
    """of the angle between both gradients of the first batch, by layer (and by what is in none)"""

    @property
    def relative(self) -> float:
        """By how much the smoothed loss lies above the twin's, as a share of it."""
        return smoothed(self.losses) / smoothed(self.twin_losses) - 1


def smoothed(losses: Sequence[float]) -> float:
    """Mean of the last tenth, at least of one."""
    last = losses[-max(1, round(len(losses) * SMOOTHED_SHARE)) :]
    return math.fsum(last) / len(last)


def measure_gap(make: Make, config: TrainConfig, *, layout: Layout, work: Path) -> Gap:
    """Train with `config.fp8` and without; every rank calls this outside of `parallel`.

    Args:
        make: called once for each of the runs and once for the gradients.
        config: of both runs.
        layout: of both runs.
        work: folder, in which each run gets its own.
    """
    from vlfoundry.infra.backend.parallel import parallel
    from vlfoundry.infra.train.loop import fit

    def run(train: TrainConfig, name: str) -> list[float]:
        with parallel(layout, seed=train.seed, fp8=train.fp8):
            model, objective, batch_at = make()
            result = fit(
                model, objective, batch_at, train,
                work=work / name, run_key=name, layout=layout, label=name,
            )  # fmt: skip
        return [row["loss"] for row in result.history]

    with parallel(layout, seed=config.seed, fp8=config.fp8), device_literals():
        cosines = gradient_cosines(*make(), layout=layout)
    twin = dataclasses.replace(config, fp8=None, on_bad_step="stop")
    return Gap(losses=run(config, "fp8"), twin_losses=run(twin, "twin"), cosines=cosines)


def gradient_cosines(
    model: Any, objective: Any, batch_at: Callable[[int], Any], *, layout: Layout
) -> dict[str, float]:
    """Cosine between the gradients of the first batch in FP8 and without it, by layer (rank 0).

    Delayed scales have seen that batch once. The model has left FP8 afterwards.
    """
    from vlfoundry.infra.backend.placement import to_device
    from vlfoundry.infra.train.step import Engine
    from vlfoundry.infra.train.trainer import wrap

    model, batch = to_device(model), to_device(batch_at(0))
    wrapped = [wrap(chunk) for chunk in getattr(model, "chunks", [model])]
    engine, fp8 = Engine(model, wrapped, objective, layout), Fp8Run(model)

    def gradients() -> dict[str, Any]:
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        fp8.begin_step(watched=False)
        engine.gradients(batch)
        fp8.end_step()
        engine.finalise(everywhere=True)
        return _gathered_gradients(model)

    gradients()
    found = gradients()
    fp8.leave()
    expected = gradients()
    return {name: _cosine(found[name], expected[name]) for name in expected}


def _gathered_gradients(model: Any) -> dict[str, Any]:
    """One vector for each layer and for each part outside of layers; on rank 0."""
    import torch

    from vlfoundry.infra.train.weights import gather_weights

    weights = {parameter: parameter.data for parameter in model.parameters()}
    for parameter in weights:
        gradient = getattr(parameter, "main_grad", None)
        parameter.data = torch.zeros_like(parameter) if gradient is None else gradient
    whole = gather_weights(model) or {}
    for parameter, data in weights.items():
        parameter.data = data
    parts: dict[str, list[Any]] = {}
    for name, gradient in whole.items():
        before, layers, after = name.partition("layers.")
        part = f"{before}{layers}{after.partition('.')[0]}" if layers else name.partition(".")[0]
        parts.setdefault(part, []).append(gradient.flatten())
    return {part: torch.cat(tensors).double() for part, tensors in parts.items()}


def _cosine(a: Any, b: Any) -> float:
    """1 where both are zero, as those of frozen parts."""
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size else 1.0
