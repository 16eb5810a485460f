"""Greedy decoding with a key/value cache.

Letters: B batch, T prompt tokens (left-padded), N new tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlfoundry.models.decoder.decode import Continuation
from vlfoundry.models.decoder.model import Decoder
from vlfoundry.models.layers.attention import key_value_cache


@torch.no_grad()
def greedy(
    decoder: Decoder,
    embeddings: Tensor,
    mask: Tensor,
    *,
    prefix_mask: Tensor | None = None,
    context: Tensor | None = None,
    max_new_tokens: int,
    eos_id: int,
) -> Tensor:
    """The most likely token, step by step.

    Args:
        decoder: with a head.
        embeddings: of the prompt [B, T, D], padding not counted as positions,
            the last token real.
        mask: [B, T], 1 where the prompt is real.
        prefix_mask: boolean [B, 1, T, T] (True: blocked) for the prompt; None: causal and padding.
        context: vision tokens for cross-attention, used for the prompt only.
        max_new_tokens: at most this many.
        eos_id: a row that has emitted it goes on with it.

    Returns:
        [B, N] new token ids; rows that ended are filled with `eos_id`.
    """
    batch, length, _ = embeddings.shape
    if prefix_mask is None:
        unseen = ~mask.bool()[:, None, None, :]
        prefix_mask = causal_blocked(length, embeddings.device) | unseen
    positions = (mask.long().cumsum(1) - 1).clamp_min(0)
    tokens: list[Tensor] = []
    done = torch.zeros(batch, dtype=torch.bool, device=embeddings.device)
    with key_value_cache(decoder, length + max_new_tokens):
        hidden = decoder(embeddings, prefix_mask, positions=positions, context=context)[:, -1]
        feed = Continuation(decoder, mask, max_new_tokens)
        for step in range(max_new_tokens):
            best = torch.where(done, eos_id, decoder.logits(hidden).argmax(-1))
            tokens.append(best)
            done |= best == eos_id
            if step + 1 == max_new_tokens or bool(done.all()):
                break
            hidden = feed(best)
    return torch.stack(tokens, 1)


def causal_blocked(length: int, device: torch.device | None = None) -> Tensor:
    """Boolean [T, T], True above the diagonal."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
