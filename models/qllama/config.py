"""What QLLaMA adds to LLaMA's numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class QLlamaConfig:
    """Queries and cross-attention (the official code hard-codes 96 and 3200)."""

    num_queries: int = 8
    """learnable query tokens in front of the text"""
    cross_attention_frequency: int = 2
    """every so many layers, from the first, the queries look at the image"""
    init_std: float | None = None
    """of the initial queries and cross-attention matrices; None: as the base's matrices"""

    def __post_init__(self) -> None:
        if self.num_queries < 1 or self.cross_attention_frequency < 1:
            raise ValueError("num_queries and cross_attention_frequency must be at least 1")


PAPER = QLlamaConfig(num_queries=96)
