"""Stage 2: matching (ITM), contrast (ITC) and captioning (ITG) through QLLaMA, equal weights.

Letters: B samples of this rank, T tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from vlfoundry.infra.core.errors import ConfigError
from vlfoundry.models.layers.parallel import data_group
from vlfoundry.models.layers.precision import wide
from vlfoundry.models.objectives.common import (
    Batch,
    Metrics,
    Objective,
    Runner,
    gather_rows,
    images_of,
    max_over_ranks,
    sum_over_ranks,
)
from vlfoundry.models.objectives.contrastive import info_nce, own_places
from vlfoundry.models.objectives.next_token import IGNORE, mean_of, sums, totals
from vlfoundry.models.objectives.options import GenerativeConfig

EMPTY_TEXT_TOKENS = 2
"""begin and end: a matching text of this many tokens is empty"""


class Generative(Objective):
    """The batch holds `pixels` and, each [B, T] and right-padded, `positive_ids`/`_mask` (caption
    alone), `summary_ids`/`_mask` ("summarize:" and caption), `caption_ids`/`_mask`/`_labels`
    (prompt and caption), `negative_ids`/`_mask` for given negatives, `draws` [B] (uniform, from 0
    to 1) for random ones, and may hold `group` [B]: samples of one group are no negatives for each
    other in matching.

    Random and hard negatives are looked for among the captions of all ranks, and matching and
    contrast are means over all of them. With given ones it is as in the official code: each rank's
    own.
    """

    paths = ("tasks",)
    coupled = True

    def __init__(self, config: GenerativeConfig | None = None):
        self.config = config or GenerativeConfig()

    def samples(self, batch: Batch) -> int:
        return len(batch["pixels"])

    def prepare(self, run: Runner, batch: Batch) -> Batch:
        (ids, mask), is_match, counts = self.matching(run, batch)
        tasks = {"match": (ids, mask)}
        tasks |= {n: (batch[f"{n}_ids"], batch[f"{n}_mask"]) for n in ("summary", "caption")}
        length = max(ids.shape[1] for ids, _ in tasks.values())
        prepared = images_of(batch) | {"is_match": is_match, "counts": counts}
        for name, task in tasks.items():
            prepared[f"{name}_ids"], prepared[f"{name}_mask"] = _widen(task, length)
        labels = batch["caption_labels"]
        prepared["labels"] = pad(labels, (0, length - labels.shape[1]), value=IGNORE)
        prepared["summarised"] = prepared["summary_mask"].sum(1) != self.config.empty_summary_tokens
        known = totals(prepared["labels"], self.config.next_token)
        for name, rows in (("matched", counts), ("summarised", prepared["summarised"])):
            total, ranks = rows.sum().float(), 1
            if self.config.negatives != "given":
                ranks = data_group().size()
                total = sum_over_ranks(total) / ranks
            known[f"total_{name}"] = total.clamp_min(1 / ranks)
        return prepared | known

    def finish(self, path: str, model: Any, state: dict[str, Tensor], batch: Batch) -> Metrics:
        if path != "tasks":
            return state
        hidden = state.pop("hidden")
        head = model.text.logits
        return state | sums(hidden, batch["labels"], head, self.config.next_token)

    def loss(self, model: Any, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Metrics]:
        is_match, counts = batch["is_match"], batch["counts"]
        losses = cross_entropy(wide(outputs["match"]), is_match, reduction="none")
        match = (losses * counts).sum() / batch["total_matched"]
        contrast, contrast_accuracy = self._contrast(model, outputs, batch)
        caption, caption_accuracy = mean_of(outputs, batch)
        weight = self.config.weights
        loss = weight["itm"] * match + weight["itc"] * contrast + weight["itg"] * caption
        hits = ((outputs["match"].argmax(1) == is_match) & counts).sum() / batch["total_matched"]
        return loss, {
            "loss": loss.detach(),
            "itm": match.detach(),
            "itc": contrast.detach(),
            "itg": caption.detach(),
            "itm_accuracy": hits,
            "itc_accuracy": contrast_accuracy,
            "itg_accuracy": caption_accuracy,
        }

    def _contrast(
        self, model: Any, outputs: dict[str, Tensor], batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """The mean over the heads, and the accuracy of the first."""
        heads = ("image",) if self.config.heads == "queries" else ("image", "backbone")
        found = [
            info_nce(
                outputs[head],
                outputs["text"],
                model.logit_scale,
                self.config.contrastive,
                valid=batch["summarised"],
                total=batch["total_summarised"],
            )
            for head in heads
        ]
        return torch.stack([loss for loss, _ in found]).mean(), found[0][1]

    def matching(self, run: Runner, batch: Batch) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
        """ITM's texts, whether each matches its image, and whether it counts.

        The first half of the samples (the larger, if odd) meets a wrong caption, the rest its own.
        """
        positive = (batch["positive_ids"], batch["positive_mask"])
        size, device = len(batch["pixels"]), positive[0].device
        counts = torch.ones(size, dtype=torch.bool, device=device)
        place = torch.arange(size, device=device)
        if self.config.negatives == "given":
            if "negative_ids" not in batch:
                raise ConfigError('negatives "given" needs negative_ids in the batch; use "hard"')
            is_match = place >= size - size // 2
            negative = (batch["negative_ids"], batch["negative_mask"])
            length = max(positive[0].shape[1], negative[0].shape[1])
            positive, negative = _widen(positive, length), _widen(negative, length)
        else:
            group = data_group()
            whole = size * group.size()
            is_match = place + size * group.rank() >= whole - whole // 2
            if self.config.negatives == "random":
                if "draws" not in batch:
                    raise ConfigError('negatives "random" needs draws in the batch')
                negative, found = random_negatives(batch)
            else:
                negative, found = hard_negatives(run, batch, ~is_match)
            counts[~is_match] = found[~is_match]
            positive = _widen(positive, negative[0].shape[1])
        ids, mask = (
            torch.where(is_match[:, None], right, wrong)
            for right, wrong in zip(positive, negative, strict=True)
        )
        return (ids, mask), is_match.long(), counts & (mask.sum(1) != EMPTY_TEXT_TOKENS)


def random_negatives(batch: Batch) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """For each sample one of the wrong captions of the whole batch, by its `draws`; as
    `hard_negatives`."""
    (ids, mask), same = _candidates(batch)
    wrong = (~same).long()
    count = wrong.sum(1)
    place = (batch["draws"] * count).long()  # among the wrong ones
    chosen = (wrong.cumsum(1) > place[:, None]).long().argmax(1)
    return (ids[chosen], mask[chosen]), count > 0


def hard_negatives(
    run: Runner, batch: Batch, asked: Tensor
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """For each sample the most similar wrong caption of the whole batch, by the stage-1 towers.

    A caption with the same words, or of the same `group`, is not wrong.

    Args:
        asked: whether a sample's is wanted [B]; the images of others are not looked at.

    Returns:
        The captions' ids and mask [B, T] (anything where not asked), and whether there is any [B].
    """
    (ids, mask), same = _candidates(batch)
    texts = run.collect("text", {"ids": batch["summary_ids"], "mask": batch["summary_mask"]})
    everything = gather_rows(texts["text"])
    similarity = everything.new_zeros(same.shape)
    if bool(asked.any()):
        images = run.collect("backbone", {n: v[asked] for n, v in images_of(batch).items()})
        similarity[asked] = images["image"] @ everything.T
    best = similarity.masked_fill(same, -torch.inf).argmax(1)
    return (ids[best], mask[best]), ~same.all(1)


def _candidates(batch: Batch) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Ids and mask of the right captions of all ranks [R*B, T], and which of them are not wrong
    for each of our samples [B, R*B]."""
    task = (batch["positive_ids"], batch["positive_mask"])
    ours = _widen(task, max_over_ranks(task[0].shape[1]))
    ids, mask = (gather_rows(rows) for rows in ours)
    distinct, words = torch.unique(ids, dim=0, return_inverse=True)
    same = words[own_places(len(ours[0]), words.device), None] == words
    if "group" in batch:
        same |= batch["group"][:, None] == gather_rows(batch["group"])
        # Nor are the words of one's group wrong where another group has them.
        said = torch.zeros(len(same), len(distinct), device=words.device)
        same = said.index_add_(1, words, same.float())[:, words] > 0
    return (ids, mask), same


def _widen(task: tuple[Tensor, Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Pad ids (with 0) and mask on the right to `length`."""
    more = length - task[0].shape[1]
    return (pad(task[0], (0, more)), pad(task[1], (0, more))) if more else task
