"""Stage 2: matching (ITM), contrast (ITC) and captioning (ITG) through QLLaMA, equal weights.

Letters: B samples of this rank, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from infra.errors import ConfigError
from models.objectives.common import Batch, Metrics, unwrap
from models.objectives.contrastive import ContrastiveConfig, info_nce
from models.objectives.next_token import IGNORE, NextTokenConfig, next_token

EMPTY_TEXT_TOKENS = 2
"""begin and end: a matching text of this many tokens is empty"""


@dataclass(frozen=True, kw_only=True)
class GenerativeConfig:
    """Options of the three losses."""

    negatives: Literal["given", "hard"] = "hard"
    """ITM's wrong captions: the batch's own, or the most similar wrong caption of this rank's
    samples by the frozen towers"""
    empty_summary_tokens: int = 5
    """an ITC text of this many tokens is empty: begin, the prefix, end"""
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    """of ITC"""
    next_token: NextTokenConfig = field(default_factory=NextTokenConfig)
    """of ITG"""


class Generative:
    """The batch holds `pixels` and, each [B, T] and right-padded, `positive_ids`/`_mask` (caption
    alone), `summary_ids`/`_mask` ("summarize:" and caption), `caption_ids`/`_mask`/`_labels`
    (prompt and caption), `negative_ids`/`_mask` for given negatives, and may hold `group` [B]:
    samples of one group are no negatives for each other.
    """

    def __init__(self, config: GenerativeConfig | None = None):
        self.config = config or GenerativeConfig()

    def __call__(self, model, batch: Batch) -> tuple[Tensor, Metrics]:
        model = unwrap(model)
        matching, is_match, counts = self.matching(model, batch)
        summary = (batch["summary_ids"], batch["summary_mask"])
        caption = (batch["caption_ids"], batch["caption_mask"])
        length = max(ids.shape[1] for ids, _ in (matching, summary, caption))
        out = model.three_tasks(
            batch["pixels"], *(_widen(task, length) for task in (matching, summary, caption))
        )
        match = _match_loss(out["match"], is_match, counts)
        contrast, contrast_accuracy = info_nce(
            out["image"],
            out["text"],
            model.logit_scale,
            self.config.contrastive,
            valid=summary[1].sum(1) != self.config.empty_summary_tokens,
        )
        labels = pad(batch["caption_labels"], (0, length - caption[0].shape[1]), value=IGNORE)
        caption_loss, caption_metrics = next_token(
            out["hidden"], labels, model.text.logits, self.config.next_token
        )
        loss = match + contrast + caption_loss
        hits = ((out["match"].argmax(1) == is_match) & counts).sum() / counts.sum().clamp_min(1)
        return loss, {
            "loss": loss.detach(),
            "itm": match.detach(),
            "itc": contrast.detach(),
            "itg": caption_loss.detach(),
            "itm_accuracy": hits,
            "itc_accuracy": contrast_accuracy,
            "itg_accuracy": caption_metrics["token_accuracy"],
        }

    def matching(self, model, batch: Batch) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
        """ITM's texts, whether each matches its image, and whether it counts.

        The first half of the samples (the larger, if odd) meets a wrong caption, the rest its own.
        """
        size = len(batch["pixels"])
        wrong = size - size // 2
        positive = (batch["positive_ids"], batch["positive_mask"])
        counts = torch.ones(size, dtype=torch.bool, device=positive[0].device)
        if self.config.negatives == "given":
            if "negative_ids" not in batch:
                raise ConfigError('negatives "given" needs negative_ids in the batch; use "hard"')
            negative = (batch["negative_ids"], batch["negative_mask"])
        else:
            index, counts[:wrong] = hard_negatives(model, batch, wrong)
            negative = tuple(part[index] for part in positive)
        length = max(positive[0].shape[1], negative[0].shape[1])
        positive, negative = _widen(positive, length), _widen(negative, length)
        ids, mask = (
            torch.cat([n[:wrong], p[wrong:]]) for n, p in zip(negative, positive, strict=True)
        )
        is_match = (torch.arange(size, device=ids.device) >= wrong).long()
        return (ids, mask), is_match, counts & (mask.sum(1) != EMPTY_TEXT_TOKENS)


@torch.no_grad()
def hard_negatives(model, batch: Batch, rows: int) -> tuple[Tensor, Tensor]:
    """For the first `rows` samples the most similar wrong caption by the stage-1 towers.

    A caption with the same words, or of the same `group`, is not wrong.

    Returns:
        Index of the caption [rows], and whether there is any [rows].
    """
    similarity = model.stage1_similarity(
        batch["pixels"][:rows], batch["summary_ids"], batch["summary_mask"]
    )
    ids = batch["positive_ids"]
    same = (ids[:rows, None] == ids[None]).all(-1)
    if "group" in batch:
        group = batch["group"]
        same |= group[:rows, None] == group[None]
    similarity = similarity.masked_fill(same, -torch.inf)
    return similarity.argmax(1), ~same.all(1)


def _match_loss(logits: Tensor, is_match: Tensor, counts: Tensor) -> Tensor:
    losses = cross_entropy(logits, is_match, reduction="none")
    return (losses * counts).sum() / counts.sum().clamp_min(1)


def _widen(task: tuple[Tensor, Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Pad ids (with 0) and mask on the right to `length`."""
    more = length - task[0].shape[1]
    return (pad(task[0], (0, more)), pad(task[1], (0, more))) if more else task
