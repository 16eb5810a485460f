"""What kernels that go row by row share: how rows are dealt to programs, and types."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

PROGRAMS = 512
"""at most so many share the rows of a backward pass: a few for each processor of any GPU, and the
same number on all of them, since it decides in which order sums over rows are rounded"""
COLUMNS_OF_A_WARP = 512
"""of a row; 16 for each thread"""


def deal(rows: int) -> tuple[int, int]:
    """How many programs share `rows`, and how many consecutive ones each takes."""
    each = parts_of(rows, PROGRAMS)
    return parts_of(rows, each), each


def parts_of(count: int, size: int) -> int:
    """How many parts of `size` hold `count`."""
    return -(-count // size)


def block_of(width: int) -> dict[str, int]:
    """Launch options of a program that holds a row of `width` columns."""
    block = 1 << (width - 1).bit_length()
    return {"BLOCK": block, "num_warps": min(32, max(1, block // COLUMNS_OF_A_WARP))}


def inner_type(tensor: Tensor) -> tl.dtype:
    """In what a kernel computes: fp32, or fp64 if that is what it is given."""
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def inner_dtype(tensor: Tensor) -> torch.dtype:
    """`inner_type` for tensors that a kernel writes."""
    return torch.promote_types(tensor.dtype, torch.float32)
