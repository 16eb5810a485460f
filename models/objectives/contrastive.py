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
from models.objectives.common import Batch, Metrics, MicroBatches, Objective, gather_rows, images_of
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


class Contrastive(Objective):
    """Stage 1: images against their captions.

    The batch holds `pixels` [B, 3, H, W], `ids` and `mask` [M*B, T] (prefixed; M captions a
    picture: all first ones, then all second ones, ...), and may hold `kept` [B, K] (FLIP) and
    `group` [B] (samples of one group are each other's positives). The loss is the mean over the M
    pairings, each of which is the usual one.
    """

    paths = ("image", "text")
    coupled = True

    def __init__(self, config: ContrastiveConfig | None = None):
        self.config = config or ContrastiveConfig()

    def samples(self, batch: Batch) -> int:
        return len(batch["pixels"])

    def micro_batches(self, path: str, batch: Batch, parts: int) -> MicroBatches:
        if path == "text":
            return distinct_texts(batch["ids"], batch["mask"], parts)
        return super().micro_batches(path, images_of(batch), parts)

    def loss(self, model, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Metrics]:
        images = outputs["image"]
        pairings = [
            info_nce(images, text, model.logit_scale, self.config, group=batch.get("group"))
            for text in outputs["text"].split(len(images))
        ]
        loss, accuracy = (torch.stack(terms).mean() for terms in zip(*pairings, strict=True))
        scale = model.logit_scale.detach().exp()
        return loss, {"loss": loss.detach(), "accuracy": accuracy, "logit_scale": scale}


def distinct_texts(ids: Tensor, mask: Tensor, parts: int = 1) -> MicroBatches:
    """Right-padded texts [N, T] in a multiple of `parts` batches; a text that occurs twice is in
    them once.

    Captions of similar length go through the tower together, cut to the longest of them: most are
    a few tokens long, and padding to the longest of all would cost more than the pictures.
    """
    distinct, inverse = torch.unique(ids, dim=0, return_inverse=True)
    lengths = (distinct != PAD_ID).sum(1)
    order = lengths.argsort(stable=True)
    groups = parts * math.ceil(LENGTH_GROUPS / parts)
    if parts == 1:
        groups = min(groups, len(order))
    elif len(order) < groups:  # a pipeline needs as many as it was promised
        order = torch.cat([order, order[-1:].expand(groups - len(order))])
    batches = []
    for rows in order.tensor_split(groups):
        longest = int(lengths[rows].max())
        real = torch.arange(longest, device=ids.device) < lengths[rows, None]
        batches.append({"ids": distinct[rows, :longest], "mask": real.to(mask.dtype)})
    place = torch.empty_like(lengths)
    place[order] = torch.arange(len(order), device=ids.device)
    return MicroBatches(batches=batches, order=place[inverse])


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
