"""Beam search with a key/value cache.

Letters: B batch, K beams, T prompt tokens (left-padded), N new tokens, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vlfoundry.models.decoder.decode import Continuation
from vlfoundry.models.decoder.model import Decoder
from vlfoundry.models.layers.attention import KeyValueCache, key_value_cache

_NEVER = -1e9
"""score of a beam that is a copy of another (all beams of a row start alike)"""


@dataclass
class _Row:
    """What one row of the batch has found."""

    beams: int
    ended: list[tuple[float, list[int]]] = field(default_factory=list)
    """mean log-probability and tokens, the best first, at most `beams`"""
    done: bool = False

    def add(self, total: float, tokens: list[int], length: int) -> None:
        self.ended.append((total / length, tokens))
        self.ended.sort(key=lambda found: -found[0])
        del self.ended[self.beams :]

    def is_done(self, best_total: float, length: int) -> bool:
        """Whether no running beam can still beat the worst that ended."""
        return len(self.ended) >= self.beams and self.ended[-1][0] >= best_total / length


@torch.no_grad()
def beam_search(
    decoder: Decoder,
    embeddings: Tensor,
    mask: Tensor,
    *,
    prefix_mask: Tensor,
    context: Tensor | None = None,
    max_new_tokens: int,
    eos_id: int,
    beams: int,
) -> list[list[int]]:
    """The most likely continuation by mean log-probability, of those that `beams` beams find.

    Args:
        decoder: with a head.
        embeddings: of the prompt [B, T, D], padding not counted as positions, the last token real.
        mask: [B, T], 1 where the prompt is real.
        prefix_mask: boolean [B, 1, T, T] (True: blocked) for the prompt.
        context: vision tokens for cross-attention, used for the prompt only.
        max_new_tokens: at most this many.
        eos_id: ends a beam.
        beams: K.

    Returns:
        Token ids of each row, without the end token.
    """
    batch, length, _ = embeddings.shape
    mask, positions = (
        x.repeat_interleave(beams, 0)
        for x in (mask.bool(), (mask.long().cumsum(1) - 1).clamp_min(0))
    )
    rows = [_Row(beams) for _ in range(batch)]
    tokens: list[list[int]] = [[] for _ in range(batch * beams)]
    scores = torch.tensor([0.0] + [_NEVER] * (beams - 1), device=embeddings.device).repeat(batch)
    with key_value_cache(decoder, length + max_new_tokens):
        hidden = decoder(
            embeddings.repeat_interleave(beams, 0),
            prefix_mask.repeat_interleave(beams, 0),
            positions=positions,
            context=None if context is None else context.repeat_interleave(beams, 0),
        )[:, -1]
        feed = Continuation(decoder, mask, max_new_tokens)
        for step in range(max_new_tokens):
            totals = decoder.logits(hidden).float().log_softmax(-1) + scores[:, None]
            best = totals.view(batch, -1).topk(2 * beams, dim=1)
            parents = best.indices // totals.shape[1] + torch.arange(batch)[:, None] * beams
            words = best.indices % totals.shape[1]
            flat: list[tuple[float, int, int]] = []
            for index, row in enumerate(rows):
                found = zip(
                    *(x[index].tolist() for x in (best.values, parents, words)), strict=True
                )
                flat += _advance(row, list(found), tokens, eos_id)
            tokens = [[*tokens[parent], token] for _, parent, token in flat]
            scores = scores.new_tensor([total for total, _, _ in flat])
            if all(row.done for row in rows) or step + 1 == max_new_tokens:
                break
            _reorder(decoder, torch.tensor([parent for _, parent, _ in flat]))
            hidden = feed(torch.tensor([token for _, _, token in flat], device=embeddings.device))
    for index, row in enumerate(rows):
        for beam in range(index * beams, (index + 1) * beams) if not row.done else ():
            row.add(scores[beam].item(), tokens[beam], len(tokens[beam]))
    return [row.ended[0][1] for row in rows]


def _advance(
    row: _Row, found: list[tuple[float, int, int]], tokens: list[list[int]], eos_id: int
) -> list[tuple[float, int, int]]:
    """The K beams of a row that go on.

    `found` are its 2K best continuations (total log-probability, parent among all beams, token),
    best first. Of the best K those that end are kept; the best K of the others go on.
    """
    going = [choice for choice in found if choice[2] != eos_id][: row.beams]
    if row.done:
        return going
    for total, parent, token in found[: row.beams]:
        if token == eos_id:
            row.add(total, tokens[parent], len(tokens[parent]) + 1)
    best_total, parent, _ = found[0]
    row.done = row.is_done(best_total, len(tokens[parent]) + 1)
    return going


def _reorder(decoder: Decoder, parents: Tensor) -> None:
    """Give each beam the remembered keys and values of the beam that it continues."""
    for module in decoder.modules():
        cache = getattr(module, "cache", None)
        if isinstance(cache, KeyValueCache):
            cache.reorder(parents)
