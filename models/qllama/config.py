"""What QLLaMA adds to LLaMA's numbers."""

from __future__ import annotations

from dataclasses import dataclass

from vlfoundry.models.layers.config import check_numbers


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
        check_numbers(
            self, sizes=("num_queries", "cross_attention_frequency"), from_zero=("init_std",)
        )


PAPER = QLlamaConfig(num_queries=96)
