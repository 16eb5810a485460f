"""Model FLOPs utilisation of a CPU: how much of the measured matrix-product rate was used.

MFU(CPU) = model matmul FLOPs / (CPU-seconds x fp32 GEMM rate), both with the same thread count.
CPU-seconds, not wall time: a shared machine changes the latter and not the former.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

GEMM_SIDE = 1024
DENSE_BF16_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
"""of the SXM boards, without sparsity"""


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

    state = torch.get_rng_state()
    with FlopCounter() as counter:
        loss, _ = objective(model, batch)
        loss.backward()
    torch.set_rng_state(state)
    for parameter in model.parameters():
        parameter.grad = None
    return float(counter.get_total_flops())


class _NoModules:
    """Stands for PyTorch's tracker of which module is running."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_error: Any) -> None:
        pass


class FlopCounter:
    """PyTorch's counter of the FLOPs of matrix products, which also knows a CPU's attention, and is
    told (`note_flops`) of those that a library does out of its sight.
    """

    def __init__(self) -> None:
        from torch.utils.flop_counter import FlopCounterMode

        self._seen = FlopCounterMode(display=False, custom_mapping=_attention_on_cpu())
        # Its hooks on modules fail where a pipeline stage runs without gradients; only the sum
        # counts.
        self._seen.mod_tracker = _NoModules()  # pyrefly: ignore[bad-assignment]
        self.unseen = 0

    def __enter__(self) -> FlopCounter:
        global _counter
        self._seen.__enter__()
        _counter = self
        return self

    def __exit__(self, *error: Any) -> None:
        global _counter
        _counter = None
        self._seen.__exit__(*error)

    def get_total_flops(self) -> int:
        """So far."""
        return self._seen.get_total_flops() + self.unseen


_counter: FlopCounter | None = None


def note_flops(flops: Callable[[], int]) -> None:
    """Add products that PyTorch does not see; asked for only where somebody counts."""
    if _counter is not None:
        _counter.unseen += flops()


def peak_flops_per_s() -> tuple[float, str]:
    """What this rank's device could do, and where that is from."""
    from vlfoundry.infra.backend import install

    if install().kind == "cpu":
        return gemm_rate(), "fp32 torch.mm of 1024^3 in this run, one thread"
    import torch

    name = torch.cuda.get_device_name()
    for known, tflops in DENSE_BF16_TFLOPS.items():
        if known in name:
            return tflops * 1e12, f"data sheet of {known}, dense bf16"
    return float("nan"), f"unknown for {name}"


def _attention_on_cpu() -> dict[Any, Any]:
    """What PyTorch's counter does not know: the fused attention of a CPU, both ways."""
    import torch
    from torch.utils.flop_counter import sdpa_flop_count

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(_grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return 2 * sdpa_flop_count(query, key, value)

    ops = torch.ops.aten
    return {
        ops._scaled_dot_product_flash_attention_for_cpu: forward,
        ops._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
