"""Fused kernels for GPUs, in Triton.

Each computes what its caller computes in plain PyTorch where there is no GPU, in fewer passes over
memory: in fp32 inside, rounded where the caller rounds. Sums over rows are made in parts that do
not depend on the GPU and added up afterwards, never by atomic additions, so a step that is done
again gives the same bits.

Modules here import Triton; import them only where `use_kernels` says so.
"""

from __future__ import annotations

import functools
import importlib.util

from torch import Tensor


def use_kernels(tensor: Tensor) -> bool:
    """Whether what is computed of `tensor` goes through the kernels."""
    return tensor.is_cuda and _has_triton()


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
