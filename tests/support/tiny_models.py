"""Tiny models and batches for the tests of models/."""

from collections.abc import Callable

import torch

from vlfoundry.models.connector.config import ConnectorConfig
from vlfoundry.models.internvit.config import InternViTConfig
from vlfoundry.models.internvl.config import InternVLConfig
from vlfoundry.models.layers.config import DecoderConfig
from vlfoundry.models.qllama.config import QLlamaConfig

VOCAB = 61
TEXTS = [
    "a red apple on a table",
    "una mela rossa sul tavolo",
    "桌上的红苹果",
    "机の上の赤いりんご",
    "تفاحة حمراء على الطاولة",
]


def tiny_config(**changes) -> InternVLConfig:
    """Odd sizes on purpose: 5 vision heads and 61 tokens do not divide by two tensor ranks."""
    fields = {
        "vision": InternViTConfig(
            width=20,
            depth=2,
            heads=5,
            mlp_hidden=24,
            patch_px=4,
            image_px=16,
            init_std=0.3,
            layerscale_init=1.0,
        ),
        "text": DecoderConfig(
            vocab_size=VOCAB,
            width=16,
            depth=2,
            heads=4,
            key_value_heads=2,
            mlp_hidden=12,
            max_tokens=24,
            init_std=0.3,
        ),
        "queries": QLlamaConfig(num_queries=3, init_std=0.3),
        "connector": ConnectorConfig(init_std=0.3),
        "embed_dim": 8,
        "pool_heads": 2,
        "head_init_std": 0.3,
    }
    return InternVLConfig(**(fields | changes))


def on_meta[M: torch.nn.Module](make: Callable[[], M]) -> M:
    """What `make` builds, with shapes and no memory: a model of any size."""
    with torch.device("meta"):
        return make()


def count(module: torch.nn.Module, trained: bool = False) -> int:
    """Parameters, all or those that have a gradient."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def pixels(count: int, side: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def texts(count: int, length: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids [B, T] and mask: begin, tokens, end, padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(12, VOCAB, (count, length), generator=generator)
    sizes = torch.randint(4, length + 1, (count,), generator=generator)
    place = torch.arange(length)
    mask = (place < sizes[:, None]).long()
    ids[:, 0] = 1
    ids[place == sizes[:, None] - 1] = 2
    return ids * mask, mask


def stage2_batch(count: int, seed: int = 0) -> dict[str, torch.Tensor]:
    batch = {"pixels": pixels(count, seed=seed)}
    for offset, name in enumerate(("positive", "negative", "summary", "caption")):
        ids, mask = texts(count, seed=seed + 10 + offset)
        batch |= {f"{name}_ids": ids, f"{name}_mask": mask}
    batch["caption_labels"] = batch["caption_ids"].masked_fill(batch["caption_mask"] == 0, -100)
    batch["caption_labels"][:, :2] = -100
    batch["draws"] = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    return batch


def three_tasks(model, images, match, summary, caption) -> dict[str, torch.Tensor]:
    """Stage 2's pass of a whole InternVL-G over (ids, mask) of each task."""
    batch = {"pixels": images}
    for name, (ids, mask) in {"match": match, "summary": summary, "caption": caption}.items():
        batch |= {f"{name}_ids": ids, f"{name}_mask": mask}
    return model.run("tasks", batch)


def chat_batch(config: InternVLConfig, kind: str, count: int) -> dict[str, torch.Tensor]:
    """Begin, image places, four words; the last three are answers."""
    generator = torch.Generator().manual_seed(3)
    words = torch.randint(12, VOCAB, (count, 4), generator=generator)
    begin = torch.ones(count, 1, dtype=torch.long)
    places = torch.full((count, config.visual_tokens(kind)), 5)
    ids = torch.cat([begin, places, words], 1)
    labels = ids.clone()
    labels[:, :-3] = -100
    return {"pixels": pixels(count), "ids": ids, "labels": labels}
