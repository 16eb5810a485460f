"""Whether training in FP8 stays with bf16: stage 1 of the embedded model, twice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.gpu.data import LANGUAGES, embedded
from benchmarks.gpu.sizes import Clock, Sizes
from vlfoundry.infra.backend import Layout, device_literals, install
from vlfoundry.infra.backend.fp8_config import Fp8Config
from vlfoundry.infra.backend.parallel import parallel
from vlfoundry.infra.backend.placement import to_device
from vlfoundry.infra.train.config import TrainConfig
from vlfoundry.infra.train.optim import build_optimizer, gradient_norm, set_step, update
from vlfoundry.infra.train.step import Engine
from vlfoundry.infra.train.trainer import wrap
from vlfoundry.models.preprocess.normalize import normalize_uint8

if TYPE_CHECKING:
    from torch import Tensor

LAST = 0.1
"""share of the steps that the final loss is the mean of"""


def run(sizes: Sizes, clock: Clock) -> Iterator[dict[str, Any]]:
    """Both loss curves, and how far their ends are from each other."""
    pictures, tokens = embedded()
    ends = {}
    for precision, fp8 in (("bf16", None), ("fp8", Fp8Config())):
        losses, by = train(sizes, fp8, pictures, tokens)
        ends[precision] = float(np.mean(losses[-max(1, round(LAST * len(losses))) :]))
        yield {"case": precision, "losses": losses, "final": ends[precision], "computed_by": by}
    gap = ends["fp8"] / ends["bf16"] - 1
    yield {"case": "FP8 against bf16", "gap": gap, "within_1_percent": abs(gap) <= 0.01}


def train(
    sizes: Sizes, fp8: Fp8Config | None, pictures: np.ndarray, tokens: np.ndarray
) -> tuple[list[float], str]:
    """Losses of every step; batches depend on the step alone."""
    from benchmarks.gpu.towers import computed_by
    from vlfoundry.models.internvl.model import build
    from vlfoundry.models.objectives.contrastive import Contrastive

    config = TrainConfig(
        steps=sizes.curve_steps, batch_samples=sizes.curve_samples, lr=1e-3,
        warmup_steps=max(1, sizes.curve_steps // 10),
    )  # fmt: skip
    losses = []
    with parallel(Layout(), fp8=fp8), device_literals():
        model = to_device(build("internvl_c", sizes.curve, seed=0)).train()
        wrapped = wrap(model)
        engine = Engine(model, [wrapped], Contrastive(), Layout())
        optimizer = build_optimizer([wrapped], config)
        for step in range(config.steps):
            wrapped.zero_grad_buffer()
            optimizer.zero_grad()
            terms = engine.gradients(_batch(sizes, step, pictures, tokens))
            engine.finalise()
            set_step(optimizer, step, config)
            update(optimizer, gradient_norm(optimizer), config.clip_grad)
            losses.append(terms["loss"])
        return losses, computed_by(model.vision, fp8)


def _batch(sizes: Sizes, step: int, pictures: np.ndarray, tokens: np.ndarray) -> dict[str, Tensor]:
    """Drawings of different concepts, each with its name in one language."""
    import torch

    rng = np.random.default_rng(step)
    rows = rng.permutation(len(pictures))[: sizes.curve_samples]
    words = tokens[rows, rng.integers(len(LANGUAGES), size=len(rows))]
    words = words[:, : min(words.shape[1], sizes.curve.text.max_tokens)]
    ids = torch.from_numpy(words)
    images = normalize_uint8(pictures[rows])
    if install().precision == "bf16":
        images = images.bfloat16()
    return to_device({"pixels": images, "ids": ids, "mask": (ids != 0).long()})
