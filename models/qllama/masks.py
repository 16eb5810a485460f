"""Who sees whom in [queries | text], by objective (True: blocked).

Letters: B batch, Q queries, T text tokens, S = Q + T.
"""

from __future__ import annotations

import torch
from torch import Tensor


def matching_blocked(queries: int, text_mask: Tensor) -> Tensor:
    """ITM: everyone sees everyone; padding is seen by no one. -> [B, 1, S, S]"""
    return _with_padding(_nothing(queries, text_mask), queries, text_mask)


def contrastive_blocked(queries: int, text_mask: Tensor) -> Tensor:
    """ITC: queries see queries, text sees text causally, each is blind to the other."""
    blocked = _causal_text(queries, text_mask)
    blocked[:queries, queries:] = True
    blocked[queries:, :queries] = True
    return _with_padding(blocked, queries, text_mask)


def generative_blocked(queries: int, text_mask: Tensor) -> Tensor:
    """ITG: queries see queries, text sees all queries and earlier text."""
    blocked = _causal_text(queries, text_mask)
    blocked[:queries, queries:] = True
    return _with_padding(blocked, queries, text_mask)


def _nothing(queries: int, text_mask: Tensor) -> Tensor:
    side = queries + text_mask.shape[1]
    return torch.zeros(side, side, dtype=torch.bool, device=text_mask.device)


def _causal_text(queries: int, text_mask: Tensor) -> Tensor:
    blocked = _nothing(queries, text_mask)
    blocked[queries:, queries:] = torch.ones_like(blocked[queries:, queries:]).triu(1)
    return blocked


def _with_padding(blocked: Tensor, queries: int, text_mask: Tensor) -> Tensor:
    batch = text_mask.shape[0]
    padding = torch.zeros(batch, blocked.shape[0], dtype=torch.bool, device=blocked.device)
    padding[:, queries:] = ~text_mask.bool()
    return blocked[None, None] | padding[:, None, None, :]
