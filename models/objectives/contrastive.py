"""Symmetric contrastive loss over the true global batch (stage 1, and stage 2's ITC).

Letters: B samples of this rank, U distinct captions, R ranks, E embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vecdot

from vlfoundry.infra.backend.parallel import text_peers
from vlfoundry.models.layers.parallel import data_group
from vlfoundry.models.layers.precision import wide
from vlfoundry.models.objectives.common import (
    Batch,
    Metrics,
    MicroBatches,
    Objective,
    gather_rows,
    images_of,
    scatter_rows,
)
from vlfoundry.models.objectives.options import ContrastiveConfig
from vlfoundry.models.objectives.tiled import TwoWay, softplus_sum, two_way_logsumexp

LENGTH_GROUPS = 4
"""text batches that the captions of one step are split into, by length"""


class Contrastive(Objective):
    """Stage 1: images against their captions.

    The batch holds `pixels` [B, 3, H, W], `ids` and `mask` [M*B, T] (prefixed; M captions a
    picture: all first ones, then all second ones, ...), and may hold `kept` [B, K] (FLIP) and
    `group` [B] (samples of one group are each other's positives). The loss is the mean over the M
    pairings, each of which is the usual one. For the sigmoid loss the model has a `logit_bias`.
    """

    paths = ("image", "text")
    coupled = True

    def __init__(self, config: ContrastiveConfig | None = None):
        self.config = config or ContrastiveConfig()

    def samples(self, batch: Batch) -> int:
        return len(batch["pixels"])

    def micro_batches(self, path: str, batch: Batch, parts: int) -> MicroBatches:
        if path == "text":
            return distinct_texts(batch["ids"], batch["mask"], parts, text_peers())
        return super().micro_batches(path, images_of(batch), parts)

    def loss(self, model: Any, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Metrics]:
        images, group = outputs["image"], batch.get("group")
        pairings = [
            self._pairing(model, images, texts, group)
            for texts in outputs["text"].split(len(images))
        ]
        loss, accuracy = (torch.stack(terms).mean() for terms in zip(*pairings, strict=True))
        metrics = {"loss": loss.detach(), "accuracy": accuracy}
        metrics["logit_scale"] = wide(model.logit_scale.detach()).exp()
        if self.config.loss == "sigmoid":
            metrics["logit_bias"] = model.logit_bias.detach().clone()
        return loss, metrics

    def _pairing(
        self, model: Any, images: Tensor, texts: Tensor, group: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if self.config.loss == "softmax":
            return info_nce(images, texts, model.logit_scale, self.config, group=group)
        loss = sigmoid_loss(images, texts, model.logit_scale, model.logit_bias, group=group)
        return loss, share_right(images, texts, group=group)


def distinct_texts(ids: Tensor, mask: Tensor, parts: int = 1, peers: Any = None) -> MicroBatches:
    """Right-padded texts [N, T] in a multiple of `parts` batches; a text that occurs twice is in
    them once. `peers` are ranks with the same texts, of which each encodes its share.

    Captions of similar length go through the tower together, cut to the longest of them: most are
    a few tokens long, and padding to the longest of all would cost more than the pictures.
    """
    distinct, inverse = torch.unique(ids, dim=0, return_inverse=True)
    lengths = inverse.new_empty(len(distinct)).scatter_(0, inverse, mask.sum(1))
    order = lengths.argsort(stable=True)
    ranks, rank = (peers.size(), peers.rank()) if peers else (1, 0)
    groups = parts * math.ceil(LENGTH_GROUPS / parts)
    each = math.ceil(len(order) / ranks)
    if parts == 1:
        groups = min(groups, each)
    each = max(each, groups)  # a pipeline needs as many batches as it was promised
    ours = torch.cat([order, order[-1:].expand(each * ranks - len(order))])[rank::ranks]
    batches: list[Mapping[str, Any]] = []
    for rows in ours.tensor_split(groups):
        longest = int(lengths[rows].max())
        real = torch.arange(longest, device=ids.device) < lengths[rows, None]
        batches.append({"ids": distinct[rows, :longest], "mask": real.to(mask.dtype)})
    number, place = torch.arange(len(order), device=ids.device), torch.empty_like(order)
    place[order] = number % ranks * each + number // ranks
    return MicroBatches(batches=batches, order=place[inverse], group=peers if ranks > 1 else None)


def info_nce(
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    config: ContrastiveConfig,
    *,
    group: Tensor | None = None,
    valid: Tensor | None = None,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean of both directions, our rows against the columns of all ranks.

    The mean over ranks of its gradient (what data parallelism makes) is the gradient of the loss
    of the whole batch. Memory is linear in the batch: only texts are gathered, and each rank makes
    its images' rows of the logits, tile by tile.

    Args:
        images, texts: unit embeddings [B, E].
        logit_scale: logarithm of the inverse temperature.
        group: [B] ids; rows of one group share the target evenly. None: each row its own.
        valid: [B] boolean; rows that count. None: all.
        total: mean over the ranks of how many count; None: this rank's own.

    Returns:
        The loss, and the share of our rows whose best column is right, both ways averaged.
    """
    scale = wide(logit_scale).exp()
    if config.max_logit_scale is not None:
        scale = scale.clamp(max=config.max_logit_scale)
    rows, texts = scale * wide(images), wide(texts)
    # Before the kernel, so that its buffers are gone when the gradients of these are made.
    row_target, text_target = _target_logits(rows, texts, group, config.label_smoothing)
    both = two_way_logsumexp(rows, gather_rows(texts))
    row_loss = both.row_lse - row_target
    text_loss = scatter_rows(both.column_lse).logsumexp(0) - text_target
    hits = _hits(both, group)
    weight = torch.ones_like(row_loss) if valid is None else valid.to(row_loss.dtype)
    count = weight.sum().clamp_min(1) if total is None else total
    loss = ((row_loss + text_loss) * weight).sum() / (2 * count)
    return loss, (hits * weight).sum() / (2 * count)


def sigmoid_loss(
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    group: Tensor | None = None,
) -> Tensor:
    """Each pair of an image and a text is a match or not (SigLIP, arXiv 2303.15343, algorithm 1).

    Per image, our images against the texts of all ranks; gradients and memory as in `info_nce`.

    Args:
        images, texts: unit embeddings [B, E].
        logit_scale: logarithm of the inverse temperature; SigLIP starts at ln 10.
        logit_bias: of every logit; SigLIP starts at -10.
        group: [B] ids; all pairs within a group match. None: each row with its own.
    """
    rows, texts = wide(logit_scale).exp() * wide(images), wide(texts)
    bias = logit_bias.to(rows.dtype)
    mean, count = means_of_groups(texts, group)
    matches = (count * (vecdot(rows, mean) + bias)).sum()
    return (softplus_sum(rows, gather_rows(texts), bias) - matches) / len(rows)


@torch.no_grad()
def share_right(images: Tensor, texts: Tensor, *, group: Tensor | None = None) -> Tensor:
    """As the second result of `info_nce`, for a loss that ranks nothing itself."""
    both = two_way_logsumexp(wide(images), gather_rows(wide(texts)))
    return _hits(both, group).mean() / 2


def means_of_groups(others: Tensor, group: Tensor | None) -> tuple[Tensor, Tensor]:
    """For each of our rows the mean [B, E] of `others` of all ranks in its group, and of how many
    it is [B]."""
    if group is None:
        return others, others.new_ones(len(others))
    _, place, counts = torch.unique(gather_rows(group), return_inverse=True, return_counts=True)
    counts = counts.to(others.dtype)
    sums = others.new_zeros(len(counts), others.shape[1])
    sums = sums.index_add(0, place, gather_rows(others))
    ours = place[own_places(len(group), group.device)]
    return (sums / counts[:, None])[ours], counts[ours]


def own_places(size: int, device: torch.device) -> Tensor:
    """Where our rows stand among those of all ranks [B]."""
    return torch.arange(size, device=device) + data_group().rank() * size


def _target_logits(
    rows: Tensor, texts: Tensor, group: Tensor | None, smoothing: float
) -> tuple[Tensor, Tensor]:
    """The mean of the target logits of each of our rows, and of each of our texts [B].

    It is the logit of the mean of the targets, so no logits need to be at hand.
    """
    if group is None and not smoothing:
        own = vecdot(rows, texts)
        return own, own
    means = []
    for ours, others in ((rows, texts), (texts, rows)):
        target, _ = means_of_groups(others, group)
        everything = gather_rows(others.mean(0, keepdim=True)).mean(0)
        means.append(vecdot(ours, torch.lerp(target, everything, smoothing)))
    return means[0], means[1]


def _hits(both: TwoWay, group: Tensor | None) -> Tensor:
    """In how many of the two directions each of our rows finds what it should [B]."""
    return _is_right(both.row_best, group) + _is_right(_best_over_ranks(both), group)


def _best_over_ranks(both: TwoWay) -> Tensor:
    """The image of all ranks that each of our texts is most similar to [B]."""
    first_row = data_group().rank() * len(both.row_lse)
    rank = scatter_rows(both.column_max).argmax(0, keepdim=True)
    return scatter_rows(both.column_best + first_row).gather(0, rank)[0]


def _is_right(best: Tensor, group: Tensor | None) -> Tensor:
    if group is None:
        return (best == own_places(len(best), best.device)).float()
    return (gather_rows(group)[best] == group).float()
