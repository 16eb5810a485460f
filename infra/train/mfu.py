"""Model FLOPs utilisation of a CPU: how much of the measured matrix-product rate was used.

MFU(CPU) = model matmul FLOPs / (CPU-seconds x fp32 GEMM rate), both with the same thread count.
CPU-seconds, not wall time: a shared machine changes the latter and not the former.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

GEMM_SIDE = 1024


def transformer_flops(
    *,
    layers: int,
    width: int,
    tokens: int,
    mlp_ratio: float = 4.0,
    mlp_matrices: int = 2,
    key_value_ratio: float = 1.0,
) -> float:
    """Matmul FLOPs of one forward pass of one sequence through a transformer stack.

    With the defaults 24 width^2 a token and layer, plus 4 tokens x width of attention.

    Args:
        layers: transformer layers.
        width: hidden size.
        tokens: sequence length.
        mlp_ratio: hidden size of the MLP over `width`.
        mlp_matrices: 2, or 3 with a gate.
        key_value_ratio: key/value heads over heads.
    """
    projections = 2 * width * width * (2 + 2 * key_value_ratio)
    mlp = 2 * width * width * mlp_ratio * mlp_matrices
    return layers * tokens * (projections + mlp + 4 * tokens * width)


@dataclass(frozen=True, kw_only=True)
class Utilisation:
    """Both terms and their ratio; goes into the run record."""

    flops_per_cpu_s: float
    """model FLOPs done in a CPU-second"""
    gemm_flops_per_cpu_s: float
    """what torch.mm reaches in a CPU-second"""

    @property
    def mfu(self) -> float:
        return self.flops_per_cpu_s / self.gemm_flops_per_cpu_s


def utilisation(forward_flops: float, cpu_s: float, gemm_flops_per_cpu_s: float) -> Utilisation:
    """MFU(CPU) of training: backward counts twice the forward, recompute counts nothing.

    Args:
        forward_flops: matmul FLOPs of all forward passes.
        cpu_s: CPU-seconds they and their backward passes and updates took, over all ranks.
        gemm_flops_per_cpu_s: from `gemm_rate`, in the same run.
    """
    return Utilisation(
        flops_per_cpu_s=3 * forward_flops / cpu_s, gemm_flops_per_cpu_s=gemm_flops_per_cpu_s
    )


def gemm_rate(threads: int = 1, repeats: int = 5) -> float:
    """FLOPs that fp32 `torch.mm` of 1024^3 does in a CPU-second; the median of `repeats`.

    Must not be called with more than one thread in a process that will fork ranks.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    a, b = torch.ones(GEMM_SIDE, GEMM_SIDE), torch.ones(GEMM_SIDE, GEMM_SIDE)
    out = torch.mm(a, b)  # the first call sets up
    rates = []
    for _ in range(repeats):
        started = time.process_time()
        torch.mm(a, b, out=out)
        rates.append(2 * GEMM_SIDE**3 / (time.process_time() - started))
    torch.set_num_threads(before)
    return statistics.median(rates)


def counted_flops(model: Any, objective: Any, batch: Any) -> float:
    """Matmul FLOPs of one forward and backward pass, counted operator by operator.

    What is frozen has no backward pass and is not credited with one. Leaves no gradient behind.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    state = torch.get_rng_state()
    with FlopCounterMode(display=False) as counter:
        loss, _ = objective(model, batch)
        loss.backward()
    torch.set_rng_state(state)
    for parameter in model.parameters():
        parameter.grad = None
    return float(counter.get_total_flops())
