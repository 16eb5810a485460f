"""Fine-tuning InternVL-G for retrieval: matching, and contrast through both heads, equal weights.

Letters: B samples of this rank, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from vlfoundry.models.layers.precision import wide
from vlfoundry.models.objectives.common import Batch, Metrics, Objective
from vlfoundry.models.objectives.contrastive import ContrastiveConfig, info_nce


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """Options of the losses."""

    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    """of both heads"""

    def __post_init__(self) -> None:
        self.contrastive.require_softmax("contrastive")


class Retrieval(Objective):
    """The batch holds `pixels` and, each [B, T] and of one T, `negative_ids`/`_mask`,
    `positive_ids`/`_mask` and `summary_ids`/`_mask`, and may hold `group` [B]: captions of one
    group (an image's) are each other's positives.

    Unlike stage 2, matching meets every wrong and every right caption, and nothing is captioned.
    """

    paths = ("retrieval",)
    coupled = True

    def __init__(self, config: RetrievalConfig | None = None):
        self.config = config or RetrievalConfig()

    def samples(self, batch: Batch) -> int:
        return len(batch["pixels"])

    def finish(self, path: str, model: Any, state: dict[str, Tensor], batch: Batch) -> Metrics:
        wrong, right = state.pop("match").chunk(2)
        return state | {"wrong": wrong, "right": right}

    def loss(self, model: Any, outputs: dict[str, Tensor], batch: Batch) -> tuple[Tensor, Metrics]:
        logits = torch.cat([outputs["wrong"], outputs["right"]])
        is_match = torch.arange(len(logits), device=logits.device) >= len(outputs["wrong"])
        match = cross_entropy(wide(logits), is_match.long())
        heads = [
            info_nce(
                images, outputs["text"], model.logit_scale, self.config.contrastive,
                group=batch.get("group"),
            )
            for images in (outputs["image"], outputs["backbone"])
        ]  # fmt: skip
        contrast = torch.stack([loss for loss, _ in heads]).sum()
        loss = match + contrast
        return loss, {
            "loss": loss.detach(),
            "itm": match.detach(),
            "itc": contrast.detach(),
            "itc_accuracy": heads[0][1],
            "backbone_accuracy": heads[1][1],
        }
