"""Which layouts a workload fits in, and which of them is the best."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from vlfoundry.infra.backend.layout import Layout
from vlfoundry.infra.core.errors import LayoutError
from vlfoundry.models.estimate.memory import Memory, memory, step_seconds
from vlfoundry.models.estimate.workload import Workload

NODE_RANKS = 8
"""tensor parallelism stays within a machine of so many devices"""
PIPELINE_RANKS = 32
"""deeper pipelines are not tried"""
VIRTUAL = (None, 2, 4)
"""model chunks of a pipeline rank that are tried"""
SAME_TIME = 0.01
"""step times this close, relatively, count as equal"""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a workload is to run on."""

    ranks: int
    """devices, one rank on each"""
    memory_bytes: float
    """of each, without what is set aside for the context and fragmentation"""
    element: int
    """bytes of a parameter: 2 (bf16) or 4 (fp32)"""
    flops_per_s: float
    """peak of each"""
    mfu: float
    """share of the peak that is reached"""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A way to run that fits."""

    layout: Layout
    memory: Memory
    seconds: float
    """of one step"""


@dataclass(kw_only=True)
class Plan:
    """What fits, best first, and why the rest does not."""

    fits: list[Fit] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    """reason -> layouts"""

    @property
    def best(self) -> Fit | None:
        return self.fits[0] if self.fits else None


def search(work: Workload, machine: Machine) -> Plan:
    """Try every layout with and without recomputation, each at its largest micro-batch that fits.

    The order is by step time; of equal ones that with the model on fewer ranks, then with fewer
    tensor ranks, then plain before interleaved: what communicates less, which the step time leaves
    out.
    """
    plan = Plan()
    for layout in _layouts(machine.ranks):
        try:
            work.check(layout)
        except LayoutError as error:
            plan.refused[_short(str(error))] += 1
            continue
        if work.batch_samples % layout.data:
            plan.refused[f"batch {work.batch_samples} does not divide by data"] += 1
            continue
        for recompute in (False, True):
            fit = _largest(work, machine, dataclasses.replace(layout, recompute=recompute))
            if fit is None:
                plan.refused["memory"] += 1
            else:
                plan.fits.append(fit)
    if plan.fits:
        fastest = min(fit.seconds for fit in plan.fits)
        plan.fits.sort(key=lambda fit: _rank(fit, fastest))
    return plan


def _layouts(ranks: int) -> Iterator[Layout]:
    for tensor in _divisors(ranks):
        if tensor > NODE_RANKS:
            continue
        for pipeline in _divisors(ranks // tensor):
            if pipeline > PIPELINE_RANKS:
                continue
            for virtual in VIRTUAL if pipeline > 1 else (None,):
                for sequence_parallel in (False, True) if tensor > 1 else (False,):
                    yield Layout(
                        tensor=tensor,
                        pipeline=pipeline,
                        virtual_pipeline=virtual,
                        data=ranks // tensor // pipeline,
                        sequence_parallel=sequence_parallel,
                    )


def _largest(work: Workload, machine: Machine, layout: Layout) -> Fit | None:
    """The micro-batch, of those that divide the rank's share, with the shortest step."""
    best = None
    share = work.batch_samples // layout.data
    for samples in _divisors(share):
        one = dataclasses.replace(layout, micro_batch_samples=samples)
        if one.micro_batches(share) * samples != share:
            continue  # the interleaved schedule asks for whole groups of micro-batches
        needed = memory(work, one, element=machine.element)
        if needed.total > machine.memory_bytes:
            break
        seconds = step_seconds(work, one, mfu=machine.mfu, flops_per_s=machine.flops_per_s)
        if best is None or seconds <= best.seconds * (1 + SAME_TIME):
            best = Fit(layout=one, memory=needed, seconds=seconds)
    return best


def _rank(fit: Fit, fastest: float) -> tuple:
    layout = fit.layout
    steps = int((fit.seconds / fastest - 1) / SAME_TIME)
    return (
        steps, layout.tensor * layout.pipeline, layout.tensor, layout.virtual_pipeline or 1,
        not layout.sequence_parallel, fit.seconds,
    )  # fmt: skip


def _short(message: str) -> str:
    """A layout's refusal without the size it names, so that those of one cause count together."""
    short = re.sub(r" for \d+ pipeline", " for more pipeline", message.split(" (")[0])
    return re.sub(r" \d+$", "", short)


def _divisors(number: int) -> list[int]:
    small = [i for i in range(1, int(number**0.5) + 1) if number % i == 0]
    return sorted({*small, *(number // i for i in small)})
