"""Next-token cross-entropy on labelled tokens (text pre-training, ITG, stage 3).

Letters: B batch, T tokens, N labelled tokens, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy

from models.common.packing import sample_of_token
from models.common.parallel import data_group
from models.objectives.common import Batch, Metrics, unwrap

IGNORE = -100
Averaging = Literal["token", "sample", "square"]


@dataclass(frozen=True, kw_only=True)
class NextTokenConfig:
    """Options of the next-token loss."""

    averaging: Averaging = "token"
    """weight of a token in a row of x labelled ones: 1, 1/x or 1/sqrt(x)"""
    global_mean: bool = True
    """divide by the weights of all ranks, so that the number of ranks changes nothing"""


class TextObjective:
    """Language modelling on texts: the batch holds `ids`, `mask` and maybe `labels` [B, T].

    Or packed texts: `ids` and `labels` [1, T] and `cu_seqlens`.
    """

    def __init__(self, config: NextTokenConfig | None = None):
        self.config = config or NextTokenConfig()

    def __call__(self, model, batch: Batch) -> tuple[Tensor, Metrics]:
        model = unwrap(model)
        ids, labels, cu_seqlens = batch["ids"], batch.get("labels"), batch.get("cu_seqlens")
        mask = batch["mask"] if cu_seqlens is None else cu_seqlens
        if labels is None:
            labels = ids if cu_seqlens is not None else ids.masked_fill(mask == 0, IGNORE)
        hidden = model.text.encode(ids, mask)
        return next_token(hidden, labels, model.text.logits, self.config, cu_seqlens=cu_seqlens)


class ChatObjective:
    """Conversations about images: the batch holds `pixels` [N, 3, H, W] or none, `ids` and
    `labels` [B, T]; `labels` is -100 outside the answers. With `cu_seqlens` the one row of `ids`
    holds several conversations, and `pixels` their tiles in the same order."""

    def __init__(self, config: NextTokenConfig | None = None):
        self.config = config or NextTokenConfig()

    def __call__(self, model, batch: Batch) -> tuple[Tensor, Metrics]:
        model = unwrap(model)
        cu_seqlens = batch.get("cu_seqlens")
        hidden = model.chat_hidden(batch["ids"], batch.get("pixels"), cu_seqlens=cu_seqlens)
        return next_token(
            hidden, batch["labels"], model.language.logits, self.config, cu_seqlens=cu_seqlens
        )


def next_token(
    hidden: Tensor,
    labels: Tensor,
    head,
    config: NextTokenConfig,
    weights: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Weighted mean cross-entropy of each labelled token given those before it.

    Args:
        hidden: states [B, T, D].
        labels: [B, T], -100 where nothing is learnt.
        head: states [N, D] -> logits [N, V]; called on labelled places only.
        config: how tokens are weighted.
        weights: [B, T] instead of those of `config.averaging`.
        cu_seqlens: where each sample begins, if the one row holds several.
    """
    if cu_seqlens is not None:  # what another sample's last token would have to foresee
        labels = labels.index_fill(1, cu_seqlens[:-1].long(), IGNORE)
    targets = labels[:, 1:]
    learnt = targets != IGNORE
    if weights is None:
        weights = token_weights(learnt, config.averaging, cu_seqlens)
    else:
        weights = weights[:, 1:]
    logits = head(hidden[:, :-1][learnt])
    wanted, weight = targets[learnt], weights[learnt].to(logits.dtype)
    losses = cross_entropy(logits, wanted, reduction="none")
    total = weight.sum()
    if config.global_mean:
        total = _mean_over_ranks(total)
    loss = (losses * weight).sum() / total.clamp_min(torch.finfo(total.dtype).tiny)
    right = (logits.detach().argmax(-1) == wanted).float()
    accuracy = right.mean() if len(right) else right.sum()
    return loss, {"loss": loss.detach(), "token_accuracy": accuracy}


def token_weights(learnt: Tensor, averaging: Averaging, cu_seqlens: Tensor | None = None) -> Tensor:
    """[B, T] boolean -> weight of each token, by the number of learnt ones in its row.

    With `cu_seqlens` of a row of T+1 tokens, by the number of learnt ones in its sample.
    """
    if cu_seqlens is None:
        count = learnt.sum(1, keepdim=True)
    else:
        sample = sample_of_token(cu_seqlens)[1:]
        each = learnt.new_zeros(len(cu_seqlens) - 1, dtype=torch.long)
        count = each.index_add(0, sample, learnt[0].long())[sample][None]
    power = {"token": 0.0, "sample": -1.0, "square": -0.5}[averaging]
    return count.clamp_min(1).float().pow(power).expand(learnt.shape)


def _mean_over_ranks(total: Tensor) -> Tensor:
    """Data parallelism averages gradients, so the mean of the ranks' weights divides them."""
    group = data_group()
    if group.size() == 1:
        return total
    total = total.detach().clone()
    dist.all_reduce(total, group=group)
    return total / group.size()
