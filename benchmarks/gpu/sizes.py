"""Sizes of every part: those of a GPU, and toys that go the same way on a CPU."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass

from vlfoundry.models.families import flavour
from vlfoundry.models.internvit.config import InternViTConfig, internvit
from vlfoundry.models.internvl.config import InternVLConfig
from vlfoundry.models.layers.config import DecoderConfig
from vlfoundry.models.qllama.config import QLlamaConfig

WIDE = internvit("6b")


@dataclass(frozen=True, kw_only=True)
class Clock:
    """How long a part may take."""

    end: float
    """of `time.monotonic`"""

    @property
    def over(self) -> bool:
        return time.monotonic() >= self.end


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measurement of an encoder's step."""

    depth: int
    """layers, of full width"""
    samples: int
    """micro-batch; of 257 tokens each, FP8 wants multiples of 16"""
    recompute: bool = False


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of all parts."""

    vision: InternViTConfig
    """whose depth the points replace"""
    points: tuple[Point, ...]
    """the most important first"""
    parity: Point
    """where specs and precisions are compared"""
    blockwise_samples: int
    """the same for the recipe that wants multiples of 128 tokens"""
    peer: Point
    """where others are measured"""
    gemm_side: int
    """of the square matrix product that everything is held against"""
    stages: InternVLConfig
    """of the steps of stages 1 to 3"""
    stage_samples: int
    """of one of their steps"""
    text_tokens: int
    """of their texts"""
    curve: InternVLConfig
    """of the loss curve: the embedded model"""
    curve_steps: int
    curve_samples: int
    repeats: int
    """timed steps of a point"""


FULL = Sizes(
    vision=WIDE,
    points=(
        Point(depth=24, samples=48),
        Point(depth=24, samples=32),
        Point(depth=48, samples=64, recompute=True),
        Point(depth=12, samples=64),
        Point(depth=12, samples=128),
        Point(depth=24, samples=16),
        Point(depth=48, samples=128, recompute=True),
        Point(depth=12, samples=32),
        Point(depth=12, samples=16),
    ),
    parity=Point(depth=6, samples=16),
    blockwise_samples=128,
    peer=Point(depth=12, samples=64),
    gemm_side=8192,
    stages=InternVLConfig(
        vision=dataclasses.replace(WIDE, depth=12),
        text=dataclasses.replace(flavour("chinese-alpaca-7b"), depth=8),
        queries=QLlamaConfig(num_queries=96),
        language=dataclasses.replace(flavour("vicuna-7b"), depth=8),
        embed_dim=768,
        pool_heads=16,
    ),
    stage_samples=64,
    text_tokens=80,
    curve=InternVLConfig(),
    curve_steps=300,
    curve_samples=256,
    repeats=10,
)
_SMALL = InternViTConfig(width=64, depth=3, heads=4, mlp_hidden=128, patch_px=8, image_px=32)
_TEXT = DecoderConfig(vocab_size=288, width=32, depth=2, heads=2, mlp_hidden=48, max_tokens=16)
TINY = Sizes(
    vision=_SMALL,
    points=(Point(depth=3, samples=16), Point(depth=4, samples=16, recompute=True)),
    parity=Point(depth=3, samples=16),
    blockwise_samples=16,
    peer=Point(depth=3, samples=16),
    gemm_side=128,
    stages=InternVLConfig(
        vision=_SMALL, text=_TEXT, language=_TEXT, queries=QLlamaConfig(num_queries=4)
    ),
    stage_samples=16,
    text_tokens=16,
    curve=InternVLConfig(vision=dataclasses.replace(_SMALL, image_px=64, patch_px=16), text=_TEXT),
    curve_steps=4,
    curve_samples=8,
    repeats=2,
)
