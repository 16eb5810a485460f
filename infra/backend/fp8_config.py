"""FP8 as a run asks for it: which recipe, and what stays in higher precision.

A parameter of a stage, unlike the layout: it changes the numbers. On a GPU Transformer Engine
computes it, on a CPU `models.fp8.products` emulates it with the same formulas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlfoundry.infra.core.errors import ConfigError

Recipe = Literal["tensorwise", "delayed", "blockwise"]

MULTIPLE: dict[Recipe, int] = {"tensorwise": 16, "delayed": 16, "blockwise": 128}
"""what the tokens of a matrix product must be a multiple of (weight gradients sum over them)"""
FEATURES = 16
"""what its input and output features must be a multiple of, in what each tensor rank holds"""


@dataclass(frozen=True, kw_only=True)
class Fp8Config:
    """Options of FP8 training."""

    recipe: Recipe = "tensorwise"
    """tensorwise: one scale a tensor, from its own maximum; delayed: from the maxima of earlier
    steps; blockwise: one for 128 values (128 x 128 of a weight)"""
    first_layers: int = 1
    """layers at the start of each stack that stay in higher precision"""
    last_layers: int = 1
    """the same at the end"""
    amax_history: int = 1024
    """steps that `delayed` takes the largest maximum of"""

    def __post_init__(self) -> None:
        for name in ("first_layers", "last_layers"):
            if getattr(self, name) < 0:
                raise ConfigError(f"train.fp8.{name} is {getattr(self, name)}; expected 0 or more")
        if self.amax_history < 1:
            raise ConfigError(f"train.fp8.amax_history is {self.amax_history}; expected at least 1")

    def covers(self, layer: int, depth: int) -> bool:
        """Whether the layer of this number (from 0) of a stack of `depth` computes in FP8."""
        return self.first_layers <= layer < depth - self.last_layers
