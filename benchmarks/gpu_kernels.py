"""Each fused kernel, forwards and backwards, beside plain PyTorch, as it is and compiled.

`bytes` are those that have to be moved at the least: inputs read once, results written once. What
is far below the memory's rate does more than that, or waits. (The loss is bound by arithmetic.)
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

WARM_UP = 3
EPS = 1e-6
MERGE = 2


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the kernels are given; by default as InternViT-6B has it."""

    batch: int = 64
    """images"""
    tokens: int = 257
    """of an image, with the class token"""
    heads: int = 25
    """of queries, and of keys"""
    head_size: int = 128
    """channels of a head"""
    pairs: int = 8192
    """images, and texts, of the contrastive loss"""
    embed_dim: int = 768
    """channels of their embeddings"""
    dtype: str = "bfloat16"
    """of all but the loss, which is in fp32"""


@dataclass(frozen=True, kw_only=True)
class Work:
    """One thing to compute in several ways."""

    name: str
    """what it is"""
    ways: dict[str, Callable[..., Any]]
    """"kernel" and "plain": functions of the inputs to one or several tensors"""
    inputs: tuple[Any, ...]
    """tensors, all with gradients, and None"""
    passes: float
    """bytes to move, forwards and backwards, in units of the first input's"""


def measure(
    device: str, sizes: Sizes | None = None, *, repetitions: int = 20, with_compile: bool = True
) -> list[dict[str, Any]]:
    """One row for each kernel and way: seconds of a forward and backward pass, and GB/s.

    Args:
        device: "cuda"; "cpu" only under Triton's interpreter, with small sizes.
        sizes: None: InternViT-6B's.
        repetitions: calls that are timed, of which the median counts.
        with_compile: whether torch.compile is among the ways.
    """
    import torch

    rows: list[dict[str, Any]] = []
    for work in works(device, sizes or Sizes()):
        ways = dict(work.ways)
        if with_compile:
            ways["compile"] = torch.compile(work.ways["plain"])
        moved = work.passes * work.inputs[0].nbytes
        for way, function in ways.items():
            call = functools.partial(_step, function, work.inputs)
            seconds = _median_s(call, device, repetitions)
            rows.append(
                {
                    "kernel": work.name,
                    "way": way,
                    "median_s": seconds,
                    "bytes": moved,
                    "gb_per_s": moved / seconds / 1e9,
                }
            )
    return rows


def works(device: str, sizes: Sizes) -> Iterator[Work]:
    """All kernels with inputs."""
    import torch

    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, sizes.dtype)

    def leaf(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        numbers = torch.randn(shape, generator=generator)
        return numbers.to(device, dtype).requires_grad_()

    width = sizes.heads * sizes.head_size
    yield from _residuals(leaf, sizes, width)
    yield _heads(leaf, sizes, width)
    yield _shuffle(leaf, sizes, width)
    embeddings = [
        leaf(sizes.pairs, sizes.embed_dim, dtype=torch.float32).detach().mul_(0.1).requires_grad_()
        for _ in range(2)
    ]
    yield _loss(embeddings)


def _residuals(leaf: Callable[..., Any], sizes: Sizes, width: int) -> Iterator[Work]:
    from vlfoundry.models.kernels.residual import scaled_residual

    shape = (sizes.tokens, sizes.batch, width)

    def plain(x, scale, residual):
        return residual + x * scale

    def plain_normed(x, scale, residual, weight):
        out = plain(x, scale, residual)
        return out, _plain_rms_norm(out, weight)

    def fused(x, scale, residual):
        return scaled_residual(x, None, scale, None, residual)[0]

    def fused_normed(x, scale, residual, weight):
        return scaled_residual(x, None, scale, None, residual, weight, EPS)

    inputs = leaf(*shape), leaf(width), leaf(*shape)
    yield Work(name="residual", ways={"kernel": fused, "plain": plain}, inputs=inputs, passes=3 + 3)
    yield Work(
        name="residual and norm",
        ways={"kernel": fused_normed, "plain": plain_normed},
        inputs=(*inputs, leaf(width)),
        passes=4 + 6,
    )


def _heads(leaf: Callable[..., Any], sizes: Sizes, width: int) -> Work:
    """Queries and keys as they lie in the projection."""
    from vlfoundry.models.kernels.norms import query_key_norm

    def cut(mixed):
        query, key, _ = mixed.split(sizes.head_size, 3)
        return query, key

    def plain(mixed, *weights):
        return tuple(
            _plain_rms_norm(heads.flatten(2), weight).view(heads.shape)
            for heads, weight in zip(cut(mixed), weights, strict=True)
        )

    def fused(mixed, query_weight, key_weight):
        query, key = cut(mixed)
        return query_key_norm(
            query, key, query_weight, key_weight, EPS, true_width=width, group=None
        )

    mixed = leaf(sizes.tokens, sizes.batch, sizes.heads, 3 * sizes.head_size)
    return Work(
        name="query and key norm",
        ways={"kernel": fused, "plain": plain},
        inputs=(mixed, leaf(width), leaf(width)),
        passes=(4 + 6) / 3,
    )


def _shuffle(leaf: Callable[..., Any], sizes: Sizes, width: int) -> Work:
    from torch.nn.functional import layer_norm

    from vlfoundry.models.connector.model import pixel_shuffle
    from vlfoundry.models.kernels.unshuffle import shuffled_norm

    side = math.isqrt(sizes.tokens - 1)

    def plain(tokens, weight, bias):
        square = tokens.view(len(tokens), side, side, -1)
        merged = pixel_shuffle(square, MERGE, "v2").flatten(1, 2)
        return layer_norm(merged, weight.shape, weight, bias, EPS)

    def fused(tokens, weight, bias):
        return shuffled_norm(tokens, (side, side), MERGE, weight, bias, EPS, swapped=False)

    whole = width * MERGE**2
    return Work(
        name="pixel shuffle and norm",
        ways={"kernel": fused, "plain": plain},
        inputs=(leaf(sizes.batch, side * side, width), leaf(whole), leaf(whole)),
        passes=2 + 3,
    )


def _loss(embeddings: list[Any]) -> Work:
    """What is plain here holds all logits."""
    from vlfoundry.models import kernels
    from vlfoundry.models.objectives.tiled import two_way_logsumexp

    def plain(rows, columns):
        logits = rows @ columns.T
        return logits.logsumexp(1), logits.logsumexp(0)

    def fused(rows, columns):
        assert kernels.use_kernels(rows), "the loss would be computed without kernels"
        return two_way_logsumexp(rows, columns)[:2]

    return Work(
        name="logsumexp of all pairs",
        ways={"kernel": fused, "plain": plain},
        inputs=tuple(embeddings),
        passes=2 + 4,
    )


def _plain_rms_norm(x: Any, weight: Any) -> Any:
    import torch

    wide = x.float()
    unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    return unit.to(x.dtype) * weight


def _step(function: Callable[..., Any], inputs: tuple[Any, ...]) -> None:
    """Forwards and backwards."""
    import torch

    outs = function(*inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    torch.autograd.grad(outs, inputs, outs)


def _median_s(call: Callable[[], None], device: str, repetitions: int) -> float:
    for _ in range(WARM_UP):
        call()
    return statistics.median(_seconds(call, device) for _ in range(repetitions))


def _seconds(call: Callable[[], None], device: str) -> float:
    import torch

    if device != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3
