"""Random numbers that depend on the sample and on nothing else: the same in every layout."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vlfoundry.infra.core.splitmix import mix64, numbers_of
from vlfoundry.infra.core.streams import Stream, stream_seed


def drop_samples(seed: int, positions: Sequence[tuple[int, int]]) -> Tensor:
    """What drop path draws by: a number for each (epoch, index), whoever has it. int64 [N]."""
    numbers = numbers_of(stream_seed(seed, Stream.DROP_PATH), positions)
    return torch.from_numpy(numbers.view(np.int64))


def uniforms(samples: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uniform fp32 numbers in [0, 1), `shape` of them for each of the integers [B]: [B, *shape]."""
    counters = np.arange(math.prod(shape), dtype=np.uint64)
    words = mix64(mix64(samples.cpu().numpy().astype(np.uint64)[:, None]) + counters)
    numbers = (words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    return torch.from_numpy(numbers).view(-1, *shape).to(samples.device)
