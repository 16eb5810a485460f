"""Fine-tuning InternVL-G for retrieval: matching, and contrast through both heads, equal weights.

Letters: B samples of this rank, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from models.objectives.common import Batch, Metrics, unwrap
from models.objectives.contrastive import ContrastiveConfig, info_nce
from models.qllama.masks import contrastive_blocked, matching_blocked


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """Options of the losses."""

    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    """of both heads"""


class Retrieval:
    """The batch holds `pixels` and, each [B, T] and of one T, `negative_ids`/`_mask`,
    `positive_ids`/`_mask` and `summary_ids`/`_mask`, and may hold `group` [B]: captions of one
    group (an image's) are each other's positives.

    Unlike stage 2, matching meets every wrong and every right caption, and nothing is captioned.
    """

    def __init__(self, config: RetrievalConfig | None = None):
        self.config = config or RetrievalConfig()

    def __call__(self, model, batch: Batch) -> tuple[Tensor, Metrics]:
        model = unwrap(model)
        out = embed_and_match(model, batch)
        is_match = torch.arange(len(out["match"]), device=out["match"].device) >= len(out["image"])
        match = cross_entropy(out["match"], is_match.long())
        heads = [
            info_nce(
                images, out["text"], model.logit_scale, self.config.contrastive,
                group=batch.get("group"),
            )
            for images in (out["image"], out["backbone"])
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


def embed_and_match(model, batch: Batch) -> dict[str, Tensor]:
    """One pass of QLLaMA over [wrong; right; contrastive] rows.

    Returns:
        "match" logits [2B, 2] (1: match), and unit embeddings [B, E]: "image" through the
        queries, "backbone" without them, "text".
    """
    size, queries = len(batch["pixels"]), model.text.num_queries
    tasks = [(batch[f"{n}_ids"], batch[f"{n}_mask"]) for n in ("negative", "positive", "summary")]
    masks = (matching_blocked, matching_blocked, contrastive_blocked)
    blocked = [mask(queries, task[1]) for mask, task in zip(masks, tasks, strict=True)]
    vision = model.vision(batch["pixels"])
    ids = torch.cat([task[0] for task in tasks])
    query_states, text_states = model.text.encode_pairs(ids, torch.cat(blocked), vision)
    last = tasks[2][1].long().sum(1) - 1
    ends = text_states[2 * size :][torch.arange(size, device=last.device), last]
    return {
        "match": model.itm_head(query_states[: 2 * size]).mean(1),
        "image": normalize(model.clip_projector2(query_states[2 * size :]), dim=-1),
        "backbone": normalize(model.clip_projector(vision), dim=-1),
        "text": normalize(ends @ model.text_projection, dim=-1),
    }
