"""Frequencies of rotary positions, plain or stretched."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vlfoundry.models.layers.config import DecoderConfig, RopeScaling


def rope_frequencies(config: DecoderConfig, positions: Tensor) -> Tensor:
    """Radians a position, of each pair of a head's channels [head size / 2].

    Args:
        config: the decoder's.
        positions: of the tokens at hand; dynamic scaling looks at the furthest. With a cache, keys
            of earlier steps keep the rotation they were given, as in the official decoders.
    """
    size, scaling = config.head_size, config.rope_scaling
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device=positions.device) / size
    base: float | Tensor = config.rope_base
    if scaling is not None and scaling.kind == "dynamic":
        reach = (positions.max() + 1).clamp_min(config.max_tokens) / config.max_tokens
        base = base * (scaling.factor * reach - (scaling.factor - 1)) ** (size / (size - 2))
    frequencies = 1.0 / base**exponents
    if scaling is not None and scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling is not None and scaling.kind == "llama3":
        return _llama3(frequencies, scaling)
    return frequencies


def _llama3(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Low frequencies divided, high ones kept, those between blended (LLaMA 3.1)."""
    waves = scaling.original_max_tokens * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((waves - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)
