"""Random numbers that depend on the sample and on nothing else: the same in every layout."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def uniforms(samples: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uniform fp32 numbers in [0, 1), `shape` of them for each of the integers [B]: [B, *shape].

    A counter put through the finaliser of SplitMix64 (Steele et al., 2014), twice.
    """
    counters = torch.arange(math.prod(shape), device=samples.device)
    mixed = _mix(_mix(samples[:, None] + 1) + counters)
    return ((mixed >> 40) & 0xFFFFFF).to(torch.float32).mul_(2.0**-24).view(-1, *shape)


def _mix(x: Tensor) -> Tensor:
    """64-bit integers to 64-bit integers, with every bit of the result hanging on all bits."""
    x = x * _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right: PyTorch's own fills with the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64)
