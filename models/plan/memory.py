"""Bytes that one rank holds, and how long a step takes.

Weights and optimizer as Megatron-Core's distributed optimizer keeps them (a test holds them against
its buffers): every parameter in the model's type; a trained one also as a gradient in fp32 in a
buffer, where each begins at a multiple of 64 elements and the end at one of 128 and of the data
ranks; its fp32 master copy (bf16 only; in fp32 the parameter itself) and Adam's two moments are cut
over the data ranks. Under pipelining rank r of p keeps the activations of as many micro-batches as
1F1B has in flight there (Narayanan et al. 2021, section 2.2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from infra.backend.layout import Layout
from models.internvl.cut import cut
from models.plan.activations import Kept, around_bytes, input_bytes, logits_bytes, pass_bytes
from models.plan.compute import pass_flops, sample_flops
from models.plan.weights import Weight, is_held
from models.plan.workload import Workload, layer_states

GIB = 1 << 30
_ALIGN = 64
_BUCKET_ALIGN = 128


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A way to run a workload."""

    layout: Layout
    """sizes of the parallel axes"""
    recompute: bool
    """every layer's activations are computed again in the backward pass; only its input is kept"""
    micro_batch: int
    """samples that a rank computes at once"""

    def micro_batches(self, work: Workload) -> int:
        """Micro-batches of one step on each data rank."""
        return work.batch_samples // (self.layout.data * self.micro_batch)


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


def memory(work: Workload, candidate: Candidate, *, element: int) -> Memory:
    """Of the pipeline rank that needs most. `element`: 2 for bf16, 4 for fp32."""
    ranks = range(candidate.layout.pipeline)
    every = [_rank_memory(work, candidate, rank, element) for rank in ranks]
    return max(every, key=lambda found: found.total)


def gradient_elements(sizes: list[int], data: int) -> int:
    """Elements of Megatron's gradient buffer for trained parameters of these sizes."""
    aligned = sum(-(-size // _ALIGN) * _ALIGN for size in sizes)
    step = math.lcm(data, _BUCKET_ALIGN)
    return -(-aligned // step) * step


def optimizer_bytes(elements: int, data: int, element: int) -> float:
    """Of one data rank: Adam's moments, and below fp32 the master copy."""
    return elements * (8 if element == 4 else 12) / data


def step_flops(work: Workload, candidate: Candidate) -> float:
    """FLOPs of one sample that the machines really do: padding, recomputation and the two passes of
    the contrastive loss included."""
    return _real_flops(
        work, candidate.layout.tensor, candidate.recompute, two_passes(work, candidate)
    )


@lru_cache(maxsize=256)
def _real_flops(work: Workload, tensor: int, recompute: bool, twice: bool) -> float:
    flops = sample_flops(work, tensor)
    extra = 0.0
    if recompute:
        again = [step for step in work.passes if any(s.graph for s in layer_states(work, step))]
        extra += sum(pass_flops(work, step, tensor).forward for step in again)
    if twice:
        extra += flops.forward
    return flops.total + extra


def step_seconds(work: Workload, candidate: Candidate, *, mfu: float, flops_per_s: float) -> float:
    """Of one optimizer step.

    Args:
        mfu: share of `flops_per_s` that a busy rank reaches, recomputation counted as work.
        flops_per_s: peak of one rank's device.
    """
    layout = candidate.layout
    busy = step_flops(work, candidate) * work.batch_samples / (layout.ranks * mfu * flops_per_s)
    chunks = candidate.micro_batches(work) * (layout.virtual_pipeline or 1)
    return busy * (1 + (layout.pipeline - 1) / chunks)


def two_passes(work: Workload, candidate: Candidate) -> bool:
    """Whether embeddings of all micro-batches are made first, without gradients."""
    return work.objective == "contrastive" and candidate.micro_batches(work) > 1


def _rank_memory(work: Workload, candidate: Candidate, rank: int, element: int) -> Memory:
    layout = candidate.layout
    every, trained, buffer = _rank_elements(work, layout, rank)
    return Memory(
        parameters=element * every,
        gradients=4 * buffer,
        optimizer=optimizer_bytes(trained, layout.data, element),
        activations=_activations(work, candidate, rank, element),
    )


@lru_cache(maxsize=4096)
def _rank_elements(work: Workload, layout: Layout, rank: int) -> tuple[int, int, int]:
    """Elements of all parameters, of the trained ones, and of their gradient buffer."""
    own = rank_weights(work, layout, rank)
    trained = [weight.elements for weight in own if weight.name in work.names]
    every = sum(weight.elements for weight in own)
    return every, sum(trained), gradient_elements(trained, layout.data)


@lru_cache(maxsize=64)
def _weights(work: Workload, tensor: int) -> list[Weight]:
    return work.weights(tensor)


def rank_weights(work: Workload, layout: Layout, rank: int) -> list[Weight]:
    """What pipeline rank `rank` holds."""
    every = _weights(work, layout.tensor)
    if layout.pipeline == 1:
        return every
    shares = cut(work.kind, work.config, layout.stages)[rank :: layout.pipeline]
    return [w for w in every if any(is_held(w.name, share, work.config) for share in shares)]


def _activations(work: Workload, candidate: Candidate, rank: int, element: int) -> float:
    layout = candidate.layout
    kept = Kept(element=element, tensor=layout.tensor, sequence_parallel=layout.sequence_parallel)
    layers, live = _layers_bytes(work, candidate.micro_batch, candidate.recompute, kept)
    found = layers / layout.pipeline * _in_flight(work, candidate, rank) + live
    if rank == layout.pipeline - 1:
        # The logits and their gradient live for a moment beside what is kept of them.
        found += around_bytes(work, candidate.micro_batch, kept)
        found += 2 * logits_bytes(work, candidate.micro_batch, kept)
    if work.objective == "contrastive":
        # Both embeddings of the whole batch and their gradients, in fp32.
        found += 16 * work.batch_samples * work.config.embed_dim
    return found


def _in_flight(work: Workload, candidate: Candidate, rank: int) -> float:
    """Micro-batches whose activations a pipeline rank keeps at once."""
    layout, count = candidate.layout, candidate.micro_batches(work)
    ahead, chunks = layout.pipeline - rank - 1, layout.virtual_pipeline or 1
    if chunks == 1:
        return min(count, ahead + 1)
    return min(count * chunks, 2 * ahead + (chunks - 1) * layout.pipeline + 1) / chunks


@lru_cache(maxsize=1024)
def _layers_bytes(work: Workload, samples: int, recompute: bool, kept: Kept) -> tuple[float, float]:
    """Bytes of one micro-batch in all layers, and of the layer that is being computed again."""
    total, live = 0.0, 0.0
    for step in work.passes:
        layers = pass_bytes(work, step, samples, kept)
        if recompute:
            inputs = input_bytes(step, work, samples, kept)
            total += sum(inputs for found in layers if found)
            live = max(live, *layers, 0.0)
        else:
            total += sum(layers)
    return total, live
