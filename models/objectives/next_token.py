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
    """Language modelling on texts: the batch holds `ids`, `mask` and maybe `labels` [B, T]."""

    def __init__(self, config: NextTokenConfig | None = None):
        self.config = config or NextTokenConfig()

    def __call__(self, model, batch: Batch) -> tuple[Tensor, Metrics]:
        model = unwrap(model)
        ids, mask = batch["ids"], batch["mask"]
        labels = batch.get("labels")
        if labels is None:
            labels = ids.masked_fill(mask == 0, IGNORE)
        hidden = model.text.encode(ids, mask)
        return next_token(hidden, labels, model.text.logits, self.config)


class ChatObjective:
    """Conversations about images: the batch holds `pixels` [N, 3, H, W] or none, `ids` and
    `labels` [B, T]; `labels` is -100 outside the answers."""

    def __init__(self, config: NextTokenConfig | None = None):
        self.config = config or NextTokenConfig()

    def __call__(self, model, batch: Batch) -> tuple[Tensor, Metrics]:
        model = unwrap(model)
        hidden = model.chat_hidden(batch["ids"], batch.get("pixels"))
        return next_token(hidden, batch["labels"], model.language.logits, self.config)


def next_token(
    hidden: Tensor, labels: Tensor, head, config: NextTokenConfig, weights: Tensor | None = None
) -> tuple[Tensor, Metrics]:
    """Weighted mean cross-entropy of each labelled token given those before it.

    Args:
        hidden: states [B, T, D].
        labels: [B, T], -100 where nothing is learnt.
        head: states [N, D] -> logits [N, V]; called on labelled places only.
        config: how tokens are weighted.
        weights: [B, T] instead of those of `config.averaging`.
    """
    targets = labels[:, 1:]
    learnt = targets != IGNORE
    if weights is None:
        weights = token_weights(learnt, config.averaging)
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


def token_weights(learnt: Tensor, averaging: Averaging) -> Tensor:
    """[B, T] boolean -> weight of each token, by the number of learnt ones in its row."""
    count = learnt.sum(1, keepdim=True).clamp_min(1).float()
    power = {"token": 0.0, "sample": -1.0, "square": -0.5}[averaging]
    return count.pow(power).expand(learnt.shape)


def _mean_over_ranks(total: Tensor) -> Tensor:
    """Data parallelism averages gradients, so the mean of the ranks' weights divides them."""
    group = data_group()
    if group.size() == 1:
        return total
    total = total.detach().clone()
    dist.all_reduce(total, group=group)
    return total / group.size()
