"""Symmetric contrastive loss over the true global batch (stage 1, and stage 2's ITC).

Letters: B samples of this rank, U distinct captions, R ranks, E embedding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from models.common.parallel import data_group
from models.objectives.common import Batch, Metrics, gather_rows, unwrap
from models.tokenizer import PAD_ID

LENGTH_GROUPS = 4
"""text batches that the captions of one step are split into, by length"""


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
    """Options of the contrastive loss."""

    label_smoothing: float = 0.0
    """share of the target spread over all columns"""
    max_logit_scale: float | None = 100.0
    """ceiling of the inverse temperature; None: none, as in the official code"""


class Contrastive:
    """Stage 1: images against their captions.

    The batch holds `pixels` [B, 3, H, W], `ids` and `mask` [M*B, T] (prefixed; M captions a
    picture: all first ones, then all second ones, ...), and may hold `kept` [B, K] (FLIP) and
    `group` [B] (samples of one group are each other's positives). The loss is the mean over the M
    pairings, each of which is the usual one.
    """

    def __init__(self, config: ContrastiveConfig | None = None):
        self.config = config or ContrastiveConfig()

    def __call__(self, model, batch: Batch) -> tuple[Tensor, Metrics]:
        model = unwrap(model)
        images = model.embed_images(batch["pixels"], batch.get("kept"))
        texts = embed_distinct(model, batch["ids"], batch["mask"]).split(len(images))
        pairings = [
            info_nce(images, text, model.logit_scale, self.config, group=batch.get("group"))
            for text in texts
        ]
        loss, accuracy = (torch.stack(terms).mean() for terms in zip(*pairings, strict=True))
        scale = model.logit_scale.detach().exp()
        return loss, {"loss": loss.detach(), "accuracy": accuracy, "logit_scale": scale}


def embed_distinct(model, ids: Tensor, mask: Tensor) -> Tensor:
    """Text embeddings [B, E] of right-padded rows; a caption that occurs twice is encoded once.

    Captions of similar length go through the tower together, cut to the longest of them: most are
    a few tokens long, and padding to the longest of all would cost more than the pictures.
    """
    distinct, inverse = torch.unique(ids, dim=0, return_inverse=True)
    lengths = (distinct != PAD_ID).sum(1)
    order = lengths.argsort(stable=True)
    parts = []
    for rows in order.split(math.ceil(len(order) / LENGTH_GROUPS)):
        longest = int(lengths[rows].max())
        real = torch.arange(longest, device=ids.device) < lengths[rows, None]
        parts.append(model.embed_texts(distinct[rows, :longest], real.to(mask.dtype)))
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=ids.device)
    return torch.cat(parts)[place[inverse]]


def info_nce(
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    config: ContrastiveConfig,
    *,
    group: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean of both directions, our rows against the columns of all ranks.

    The mean over ranks of its gradient (what data parallelism makes) is the gradient of the loss
    of the whole batch.

    Args:
        images, texts: unit embeddings [B, E].
        logit_scale: logarithm of the inverse temperature.
        group: [B] ids; rows of one group share the target evenly. None: each row its own.
        valid: [B] boolean; rows that count. None: all.

    Returns:
        The loss, and the share of our rows whose best column is right, both ways averaged.
    """
    scale = logit_scale.exp()
    if config.max_logit_scale is not None:
        scale = scale.clamp(max=config.max_logit_scale)
    target = targets(images, group, valid)
    losses, hits = [], []
    for rows, columns in ((images, texts), (texts, images)):
        logits = scale * rows @ gather_rows(columns).T  # [B, R*B]
        losses.append(cross_entropy(logits, target, label_smoothing=config.label_smoothing))
        hits.append(_hits(logits.detach(), target))
    return (losses[0] + losses[1]) / 2, (hits[0] + hits[1]) / 2


def targets(rows: Tensor, group: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
    """Column of each of our rows (-100: it does not count), or the even distribution over its
    group [B, R*B]."""
    if group is None:
        own = torch.arange(len(rows), device=rows.device) + data_group().rank() * len(rows)
        return own if valid is None else own.masked_fill(~valid, -100)
    same = (group[:, None] == gather_rows(group)[None, :]).to(rows.dtype)
    return same / same.sum(1, keepdim=True)


def _hits(logits: Tensor, target: Tensor) -> Tensor:
    best = logits.argmax(1)
    if target.dtype == torch.long:
        return (best == target).float().mean()
    return (target.gather(1, best[:, None]) > 0).float().mean()
