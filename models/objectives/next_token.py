"""Next-token cross-entropy on labelled tokens (text pre-training, ITG, stage 3).

Letters: B batch, T tokens, N labelled tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from vlfoundry.infra.core.errors import ModelError
from vlfoundry.models.layers.packing import sample_of_token, split_packs
from vlfoundry.models.layers.parallel import data_group
from vlfoundry.models.layers.precision import wide
from vlfoundry.models.objectives.common import (
    Batch,
    Metrics,
    MicroBatches,
    Objective,
    Runner,
    images_of,
    split_rows,
    sum_over_ranks,
)
from vlfoundry.models.objectives.options import Averaging, NextTokenConfig
from vlfoundry.models.tokenizer import IMG_CONTEXT_ID

IGNORE = -100


class NextToken(Objective):
    """What text alone and chat share. The batch holds `ids` and `labels` [B, T], -100 where
    nothing is learnt, and may hold `weights` [B, T] instead of those of the config.

    Or packed samples: `ids` and `labels` [1, T], `cu_seqlens` [P+1], and what
    `models.layers.packing.split_packs` needs to cut micro-batches: one pack each.
    """

    coupled = False
    tower: str
    """the model's part that has the head"""

    def __init__(self, config: NextTokenConfig | None = None):
        self.config = config or NextTokenConfig()

    def prepare(self, run: Runner, batch: Batch) -> Batch:
        if "cu_seqlens" in batch:
            batch = {**batch, **self._of_packed(batch["labels"], batch["cu_seqlens"])}
        return {**batch, **totals(batch["labels"], self.config, batch.get("weights"))}

    def _of_packed(self, labels: Tensor, cu_seqlens: Tensor) -> Metrics:
        """Labels without each sample's first token, which the sample before would foretell, and
        weights by the number of a sample's own tokens."""
        labels = labels.index_fill(1, cu_seqlens[:-1].long(), IGNORE)
        weights = token_weights(labels != IGNORE, self.config.averaging, cu_seqlens)
        return {"labels": labels, "weights": weights}

    def micro_batches(self, path: str, batch: Batch, parts: int) -> MicroBatches:
        if "cu_seqlens" in batch:
            return MicroBatches(batches=list(split_packs(batch)))
        return super().micro_batches(path, batch, parts)

    def samples(self, batch: Batch) -> int:
        return len(batch["cu_seqlens"]) - 1 if "cu_seqlens" in batch else super().samples(batch)

    def finish(self, path: str, model: Any, state: dict[str, Tensor], batch: Batch) -> Metrics:
        head = getattr(model, self.tower).logits
        labels, weights = batch["labels"], batch.get("weights")
        return sums(state["hidden"], labels, head, self.config, weights)

    def loss(self, model: Any, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Metrics]:
        loss, accuracy = mean_of(outputs, batch)
        return loss, {"loss": loss.detach(), "token_accuracy": accuracy}


class TextObjective(NextToken):
    """Language modelling on texts: the batch holds `ids`, `mask` and maybe `labels` [B, T]. Packed
    texts have no `mask`."""

    paths = ("lm",)
    tower = "text"

    def prepare(self, run: Runner, batch: Batch) -> Batch:
        if "labels" not in batch:
            ids, is_packed = batch["ids"], "cu_seqlens" in batch
            labels = ids if is_packed else ids.masked_fill(batch["mask"] == 0, IGNORE)
            batch = {**batch, "labels": labels}
        return super().prepare(run, batch)


class ChatObjective(NextToken):
    """Conversations about images: the batch holds `pixels` [N, 3, H, W] or none, `ids` and
    `labels` [B, T]; `labels` is -100 outside the answers. With `cu_seqlens` the one row of `ids`
    holds several conversations, and `pixels` their tiles in the same order."""

    paths = ("chat",)
    tower = "language"

    def micro_batches(self, path: str, batch: Batch, parts: int) -> MicroBatches:
        if "cu_seqlens" in batch:
            return super().micro_batches(path, batch, parts)
        images = images_of(batch)
        rest = {name: value for name, value in batch.items() if name not in images}
        batches = split_rows(rest, parts)
        pixels = images.get("pixels")
        if pixels is None or not len(pixels):
            return MicroBatches(batches=batches)
        places = [
            int((part["ids"] == part.get("context_id", IMG_CONTEXT_ID)).sum()) for part in batches
        ]
        # All images take as many places.
        counts = [len(pixels) * count // max(1, sum(places)) for count in places]
        if sum(counts) != len(pixels):
            raise ModelError(
                f"the prompts have {sum(places)} image places, which {len(pixels)} images do not "
                "share evenly; a prompt was cut, or made for another model"
            )
        cut = {name: values.split(counts) for name, values in images.items()}
        return MicroBatches(
            batches=[
                {**part, **{name: parts[i] for name, parts in cut.items()}}
                for i, part in enumerate(batches)
            ]
        )


def next_token(
    hidden: Tensor,
    labels: Tensor,
    head: Any,
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
    known = totals(labels, config, weights)
    loss, accuracy = mean_of(sums(hidden, labels, head, config, weights), known)
    return loss, {"loss": loss.detach(), "token_accuracy": accuracy}


def totals(labels: Tensor, config: NextTokenConfig, weights: Tensor | None = None) -> Metrics:
    """What the sums of all micro-batches are divided by: `total_weight` and `total_tokens`.

    Data parallelism averages gradients, so these are means over the ranks.
    """
    learnt, weight = _learnt(labels, config, weights)
    own = torch.stack([(weight * learnt).sum(), learnt.sum().to(weight.dtype)])
    if config.global_mean:
        own = sum_over_ranks(own) / data_group().size()
    return {"total_weight": own[0], "total_tokens": own[1]}


def sums(
    hidden: Tensor,
    labels: Tensor,
    head: Any,
    config: NextTokenConfig,
    weights: Tensor | None = None,
) -> Metrics:
    """Per row [B]: `weighted` cross-entropies added up, and `hits`, tokens that were right."""
    learnt, weight = _learnt(labels, config, weights)
    wanted = labels[:, 1:][learnt]
    logits = wide(head(hidden[:, :-1][learnt]))
    losses = cross_entropy(logits, wanted, reduction="none") * weight[learnt].to(logits.dtype)
    right = (logits.detach().argmax(-1) == wanted).to(losses.dtype)
    row = learnt.nonzero()[:, 0]
    empty = losses.new_zeros(len(labels))
    return {
        "weighted": empty.index_add(0, row, losses),
        "hits": empty.index_add(0, row, right),
    }


def mean_of(found: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Loss and share of right tokens from `sums` and `totals`."""
    loss = found["weighted"].sum() / _positive(known["total_weight"])
    return loss, found["hits"].detach().sum() / _positive(known["total_tokens"])


def _positive(total: Tensor) -> Tensor:
    return total.clamp_min(torch.finfo(total.dtype).tiny)


def _learnt(
    labels: Tensor, config: NextTokenConfig, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Whether each token but the first is learnt, and its weight; both [B, T-1]."""
    learnt = labels[:, 1:] != IGNORE
    if weights is None:
        return learnt, token_weights(learnt, config.averaging)
    return learnt, weights[:, 1:]


def token_weights(learnt: Tensor, averaging: Averaging, cu_seqlens: Tensor | None = None) -> Tensor:
    """[B, T] boolean -> weight of each token, by the number of learnt ones in its row or, with
    `cu_seqlens`, in its packed sample."""
    if cu_seqlens is None:
        count = learnt.sum(1, keepdim=True)
    else:
        sample = sample_of_token(cu_seqlens)
        each = learnt.new_zeros(len(cu_seqlens) - 1, dtype=torch.long)
        count = each.index_add(0, sample, learnt[0].long())[sample][None]
    power = {"token": 0.0, "sample": -1.0, "square": -0.5}[averaging]
    return count.clamp_min(1).float().pow(power).expand(learnt.shape)
