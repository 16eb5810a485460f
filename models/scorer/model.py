"""A small image-text scorer: fixed picture features and a bag of tokens, each under an MLP.

It is trained before anything else, on the raw records, and says how well a caption fits its
picture. Letters: B batch, F picture features, D shared width.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import nn


@dataclass(frozen=True, kw_only=True)
class ScorerConfig:
    """Size of the scorer."""

    token_width: int = 192
    """Width of a token embedding."""
    hidden: int = 512
    """Width of the middle layer of each tower."""
    width: int = 192
    """Width of the space in which pictures and captions meet."""
    dropout: float = 0.4
    """Share of picture features and hidden units left out in training."""


class Scorer(nn.Module):
    """Two towers and a learned temperature, as in CLIP (Radford et al. 2021)."""

    def __init__(self, config: ScorerConfig, features: int, tokens: int) -> None:
        super().__init__()
        self.image = nn.Sequential(
            nn.Dropout(config.dropout),
            nn.Linear(features, config.hidden),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden, config.width),
        )
        # Std 1: at 0.02 InfoNCE stays at ln(batch) for hundreds of steps.
        self.tokens = nn.EmbeddingBag(tokens, config.token_width, mode="mean")
        self.text = nn.Sequential(
            nn.LayerNorm(config.token_width),
            nn.Linear(config.token_width, config.hidden),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden, config.width),
        )
        self.logit_scale = nn.Parameter(torch.tensor(0.0))

    def embed_images(self, features: torch.Tensor) -> torch.Tensor:
        """[B, F] of unit length -> [B, D] of unit length."""
        scaled = features * math.sqrt(features.shape[-1])
        return functional.normalize(self.image(scaled), dim=-1)

    def embed_texts(self, tokens: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Token ids of all captions in a row and where each begins -> [B, D] of unit length."""
        return functional.normalize(self.text(self.tokens(tokens, offsets)), dim=-1)

    def loss(self, images: torch.Tensor, texts: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
        """InfoNCE in both directions; `same` [B, B] marks pairs that are no negatives."""
        scale = self.logit_scale.exp().clamp(max=100.0)
        logits = (scale * images @ texts.T).masked_fill(same, -math.inf)
        targets = torch.arange(len(logits))
        rows = functional.cross_entropy(logits, targets)
        return 0.5 * (rows + functional.cross_entropy(logits.T, targets))
