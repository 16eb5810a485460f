"""How vision tokens reach the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlfoundry.models.layers.config import check_numbers


@dataclass(frozen=True, kw_only=True)
class ConnectorConfig:
    """Which vision tokens, and what is done to them."""

    kind: Literal["pixel_shuffle", "mlp2x"] = "pixel_shuffle"
    """merge neighbours, LayerNorm, two linears (Chat 1.1 and later), or two linears alone"""
    ps_version: Literal["v1", "v2"] = "v2"
    """order of merged tokens: v1 (old checkpoints) leaves rows and columns swapped"""
    select_layer: int = -1
    """hidden state of the vision tower to take; -4 for the 48-layer 6B"""
    shuffle_side: int = 2
    """side of the square of patches that the pixel shuffle merges"""
    init_std: float | None = None
    """of the initial matrices; None: 1 / sqrt(width) of what each takes in"""

    def __post_init__(self) -> None:
        check_numbers(self, sizes=("shuffle_side",), from_zero=("init_std",))

    @property
    def merge(self) -> int:
        """Side of the square of patches that become one token."""
        return self.shuffle_side if self.kind == "pixel_shuffle" else 1
