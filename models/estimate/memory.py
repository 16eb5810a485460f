"""Bytes that one rank holds, and how long a step takes.

Weights and optimizer as Megatron-Core's distributed optimizer keeps them (a test holds them against
its buffers): every parameter in the model's type; a trained one also as a gradient in fp32 (or, if
the run says so, bf16) in a buffer, where each begins at a multiple of 64 elements and the end at
one of 128 and of the data ranks; its fp32 master copy (bf16 only; in fp32 the parameter itself) and
Adam's two moments are cut over the data ranks. Under pipelining rank r of p keeps the activations
of as many micro-batches as 1F1B has in flight there (Narayanan et al. 2021, section 2.2).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from vlfoundry.infra.backend.layout import Layout
from vlfoundry.models.estimate.activations import (
    Kept,
    around_bytes,
    input_bytes,
    logits_bytes,
    pass_bytes,
)
from vlfoundry.models.estimate.compute import layer_flops, pass_flops, sample_flops
from vlfoundry.models.estimate.weights import LayerRef, Weight
from vlfoundry.models.estimate.workload import Pass, Workload, layer_states
from vlfoundry.models.internvl.pipeline_split import StageLayers, split_layers

GIB = 1 << 30
_ALIGN = 64
_BUCKET_ALIGN = 128


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.activations


def memory(work: Workload, layout: Layout, *, element: int) -> Memory:
    """Of the pipeline rank that needs most. `element`: 2 for bf16, 4 for fp32."""
    # All but the activations is the same for every micro-batch: a search asks for it many times.
    common = _ranks(work, dataclasses.replace(layout, micro_batch_samples=None), element)
    every = [(held.memory, _activations(work, layout, held)) for held in common]
    states, activations = max(every, key=lambda found: found[0].total + found[1])
    return dataclasses.replace(states, activations=activations)


def gradient_elements(sizes: Iterable[int], data: int) -> int:
    """Elements of Megatron's gradient buffer for trained parameters of these sizes."""
    return _bucket(sum(map(_aligned, sizes)), data)


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _bucket(aligned: int, data: int) -> int:
    step = math.lcm(data, _BUCKET_ALIGN)
    return -(-aligned // step) * step


def optimizer_bytes(elements: int, data: int, element: int, moments: str = "fp32") -> float:
    """Of one data rank: Adam's moments, and below fp32 the master copy (where moments are in bf16,
    the 16 bits of it that the weights lack)."""
    if moments == "bf16":
        return elements * 6 / data
    return elements * (8 if element == 4 else 12) / data


def step_flops(work: Workload, layout: Layout) -> float:
    """FLOPs of one sample that the machines really do: padding, recomputation and the two passes of
    the contrastive loss included."""
    return _real_flops(work, layout.tensor, layout.recompute, two_passes(work, layout))


@lru_cache(maxsize=256)
def _real_flops(work: Workload, tensor: int, recompute: bool, twice: bool) -> float:
    flops = sample_flops(work, tensor)
    extra = 0.0
    if recompute:
        again = [step for step in work.passes if any(s.graph for s in layer_states(work, step))]
        extra += sum(pass_flops(work, step, tensor).forward for step in again)
    if twice:
        only_once = [step for step in work.passes if not step.gradient]
        extra += flops.forward - sum(pass_flops(work, s, tensor).forward for s in only_once)
    return flops.total + extra


def step_seconds(work: Workload, layout: Layout, *, mfu: float, flops_per_s: float) -> float:
    """Of one optimizer step.

    Args:
        mfu: share of `flops_per_s` that a busy rank reaches, recomputation counted as work.
        flops_per_s: peak of one rank's device.
    """
    busy = step_flops(work, layout) * work.batch_samples / (layout.ranks * mfu * flops_per_s)
    chunks = micro_batches(work, layout) * (layout.virtual_pipeline or 1)
    return busy * (1 + (layout.pipeline - 1) / chunks) * imbalance(work, layout)


def imbalance(work: Workload, layout: Layout) -> float:
    """How much longer the busiest pipeline rank computes than the mean of them."""
    return _imbalance(work, layout.tensor, layout.stages, layout.pipeline)


@lru_cache(maxsize=256)
def _imbalance(work: Workload, tensor: int, stages: int, pipeline: int) -> float:
    costs = [
        [_rank_flops(work, step, tensor, held) for held in _layers(work, step, stages, pipeline)]
        for step in work.passes
    ]
    if work.objective != "contrastive":  # whose towers go through the pipeline one after the other
        costs = [[sum(ranks) for ranks in zip(*costs, strict=True)]]
    return pipeline * sum(map(max, costs)) / sum(map(sum, costs))


@lru_cache(maxsize=1024)
def _layers(work: Workload, step: Pass, stages: int, pipeline: int) -> list[tuple[int, ...]]:
    """A pass's layers on each pipeline rank."""
    shares = _shares(work, stages)
    return [_layers_of(shares[rank::pipeline], step.stack) for rank in range(pipeline)]


def _rank_flops(work: Workload, step: Pass, tensor: int, layers: tuple[int, ...]) -> float:
    every = layer_flops(work, step, tensor)
    return sum(every[layer].total for layer in layers if layer < len(every))


def micro_batches(work: Workload, layout: Layout) -> int:
    """Of one step on each data rank."""
    return layout.micro_batches(work.batch_samples // layout.data)


def two_passes(work: Workload, layout: Layout) -> bool:
    """Whether the samples of a coupled loss go forwards once without gradients, to know it."""
    return work.coupled and (micro_batches(work, layout) > 1 or layout.pipeline > 1)


@dataclass(frozen=True, kw_only=True)
class _Held:
    """What one pipeline rank holds, whatever the micro-batch."""

    rank: int
    memory: Memory
    """without activations"""
    paths: list[float]
    """bytes that one sample leaves in this rank's layers, by pass"""
    again: float
    """bytes that one sample takes in a layer that is computed again"""
    around: float
    """bytes of one sample outside of the layers"""


@lru_cache(maxsize=1024)
def _ranks(work: Workload, layout: Layout, element: int) -> list[_Held]:
    kept = Kept(element=element, tensor=layout.tensor, sequence_parallel=layout.sequence_parallel)
    # The logits and their gradient live for a moment beside what is kept of them.
    around = around_bytes(work, 1, kept) + 2 * logits_bytes(work, 1, kept)
    ranks = []
    for rank in range(layout.pipeline):
        paths = [_pass_bytes(work, step, layout, rank, kept) for step in work.passes]
        held = _Held(
            rank=rank,
            memory=_states(work, layout, rank, element),
            paths=[total for total, _ in paths],
            again=max(again for _, again in paths),
            around=around if rank == layout.pipeline - 1 else 0.0,
        )
        ranks.append(held)
    return ranks


def _states(work: Workload, layout: Layout, rank: int, element: int) -> Memory:
    layers = _layer_elements(work, layout.tensor)
    held = [layers[place] for place in _places(work, layout, rank)]
    every, trained, aligned = (sum(sizes) for sizes in zip(*held, strict=True))
    return Memory(
        parameters=element * every,
        gradients=(2 if work.gradients == "bf16" else 4) * _bucket(aligned, layout.data),
        optimizer=optimizer_bytes(trained, layout.data, element, work.moments),
        activations=0.0,
    )


@lru_cache(maxsize=64)
def _layer_elements(work: Workload, tensor: int) -> dict[LayerRef, tuple[int, int, int]]:
    """By tower and layer elements of all parameters, of the trained ones, and those aligned."""
    found: dict[LayerRef, tuple[int, int, int]] = {}
    for weight in work.weights(tensor):
        size, trained = weight.elements, weight.name in work.names
        place = (weight.tower, weight.layer)
        every, learnt, aligned = found.get(place, (0, 0, 0))
        found[place] = (
            every + size, learnt + size * trained, aligned + _aligned(size) * trained
        )  # fmt: skip
    return found


def _places(work: Workload, layout: Layout, rank: int) -> set[LayerRef]:
    """Tower and layer of all that a pipeline rank holds."""
    shares = _shares(work, layout.stages)[rank :: layout.pipeline]
    return {(tower, i) for share in shares for tower, layers in share.items() for i in layers}


def rank_weights(work: Workload, layout: Layout, rank: int) -> list[Weight]:
    """What pipeline rank `rank` holds: stages `rank`, `rank` + pipeline ..."""
    places = _places(work, layout, rank)
    return [w for w in work.weights(layout.tensor) if (w.tower, w.layer) in places]


@lru_cache(maxsize=256)
def _shares(work: Workload, stages: int) -> list[StageLayers]:
    return split_layers(work.kind, work.config, stages)


def _activations(work: Workload, layout: Layout, held: _Held) -> float:
    samples = layout.micro_batch_samples or work.batch_samples // layout.data
    # The towers of a contrastive loss learn one after the other where there are two passes.
    together = max if work.objective == "contrastive" and two_passes(work, layout) else sum
    found = together(held.paths) * _in_flight(work, layout, held.rank) + held.again + held.around
    # Both embeddings of the whole batch and their gradients, in fp32.
    whole = 16 * work.batch_samples * work.config.embed_dim
    return samples * found + (whole if work.objective == "contrastive" else 0)


def _layers_of(shares: list[StageLayers], tower: str) -> tuple[int, ...]:
    return tuple(layer for share in shares for layer in share.get(tower, ()))


def _in_flight(work: Workload, layout: Layout, rank: int) -> float:
    """Micro-batches whose activations a pipeline rank keeps at once."""
    count = micro_batches(work, layout)
    ahead, chunks = layout.pipeline - rank - 1, layout.virtual_pipeline or 1
    if chunks == 1:
        return min(count, ahead + 1)
    return min(count * chunks, 2 * ahead + (chunks - 1) * layout.pipeline + 1) / chunks


def _pass_bytes(
    work: Workload, step: Pass, layout: Layout, rank: int, kept: Kept
) -> tuple[float, float]:
    """Bytes of one sample in a rank's layers, and in the one that is being computed again."""
    every = _every_layer(work, step, kept)
    held = _layers(work, step, layout.stages, layout.pipeline)[rank]
    here = [every[layer] for layer in held if layer < len(every)]
    if not layout.recompute:
        return sum(here), 0.0
    inputs = input_bytes(step, work, 1, kept)
    return inputs * sum(1 for found in here if found), max(here, default=0.0)


@lru_cache(maxsize=256)
def _every_layer(work: Workload, step: Pass, kept: Kept) -> list[float]:
    return pass_bytes(work, step, 1, kept)
