"""Whole steps of the three stages, optimizer included, and their memory against the plan's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.sizes import Clock, Sizes
from benchmarks.gpu.towers import fill, free, timed
from vlfoundry.infra.backend import Layout, device_literals, install
from vlfoundry.infra.backend.fp8_config import Fp8Config
from vlfoundry.infra.backend.parallel import parallel
from vlfoundry.infra.backend.placement import to_device
from vlfoundry.infra.train.config import TrainConfig
from vlfoundry.infra.train.optim import build_optimizer, gradient_norm, set_step, update
from vlfoundry.infra.train.step import Engine
from vlfoundry.infra.train.trainer import wrap
from vlfoundry.models.estimate.workload import Objective, Workload

if TYPE_CHECKING:
    from torch import Tensor

PRECISIONS: tuple[tuple[str, Fp8Config | None], ...] = (("bf16", None), ("fp8", Fp8Config()))
FIRST_WORD = 12
"""token id behind all special ones"""


class Trainer:
    """A model, its objective and its optimizer; `step` is what a step of a run computes."""

    def __init__(self, kind: str, model_config: Any, objective: Any, trained: tuple[str, ...]):
        from vlfoundry.models.internvl.freeze import freeze
        from vlfoundry.models.internvl.model import InternVL

        narrow = "bf16" if install().layer_spec == "te" else "fp32"
        self.config = TrainConfig(
            steps=1000, batch_samples=1, lr=1e-4, moments=narrow, gradients=narrow
        )
        self.model = to_device(InternVL(kind, model_config, install().layer_spec))
        fill(self.model, 0)
        freeze(self.model, trained)
        self.wrapped = wrap(self.model, self.config.gradients)
        self.engine = Engine(self.model, [self.wrapped], objective, Layout())
        self.optimizer = build_optimizer([self.wrapped], self.config)
        self.model.train()
        self.done = 0
        self.terms: dict[str, float] = {}
        """of the last step"""

    def step(self, batch: dict[str, Tensor]) -> None:
        """Gradients and update."""
        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.terms = self.engine.gradients(batch)
        self.engine.finalise()
        set_step(self.optimizer, self.done, self.config)
        update(self.optimizer, gradient_norm(self.optimizer), self.config.clip_grad)
        self.done += 1


def contrastive(sizes: Sizes, clock: Clock) -> Iterator[dict[str, Any]]:
    """Stage 1 with both towers, and what its loss alone takes of the step."""
    from vlfoundry.models.objectives.contrastive import Contrastive, info_nce

    batch = pairs(sizes)
    rows = _steps(
        sizes,
        clock,
        "internvl_c",
        Contrastive,
        ("all",),
        batch,
        "contrastive",
        images=1,
        captions=1,
    )
    yield from rows
    loss = _loss_alone(sizes, info_nce)
    yield {"case": "the loss alone", **loss}


def generative(sizes: Sizes, clock: Clock) -> Iterator[dict[str, Any]]:
    """Stage 2: three tasks through QLLaMA, towers frozen, any wrong captions."""
    import torch

    from vlfoundry.models.objectives.generative import Generative

    batch = pairs(sizes)
    texts = {"ids": batch.pop("ids"), "mask": batch.pop("mask")}
    for task in ("positive", "negative", "summary", "caption"):
        batch |= {f"{task}_{name}": tensor for name, tensor in texts.items()}
    batch["draws"] = to_device(torch.linspace(0, 0.99, sizes.stage_samples))
    batch["caption_labels"] = texts["ids"].masked_fill(texts["mask"] == 0, -100)
    yield from _steps(
        sizes, clock, "internvl_g", Generative, ("stage2",), batch, "generative", images=1
    )


def chat(sizes: Sizes, clock: Clock) -> Iterator[dict[str, Any]]:
    """Stage 3: the language model and its connector learn."""
    import torch

    from vlfoundry.models.objectives.next_token import ChatObjective
    from vlfoundry.models.tokenizer import IMG_CONTEXT_ID

    batch = pairs(sizes)
    places = sizes.stages.visual_tokens("chat_simple")
    visual = torch.full_like(batch["ids"][:, :1], IMG_CONTEXT_ID).expand(-1, places)
    ids = torch.cat([visual, batch["ids"]], 1)
    labels = torch.cat([visual.new_full(visual.shape, -100), batch["ids"]], 1)
    chosen = {"pixels": batch["pixels"], "ids": ids, "labels": labels}
    yield from _steps(
        sizes, clock, "chat_simple", ChatObjective, ("sft",), chosen, "chat", images=1
    )


def pairs(sizes: Sizes) -> dict[str, Tensor]:
    """Pictures of noise, and texts of random words of full length."""
    import torch

    config, samples = sizes.stages, sizes.stage_samples
    generator = torch.Generator().manual_seed(0)
    side = config.vision.image_px
    shape = samples, sizes.text_tokens
    ids = torch.randint(FIRST_WORD, config.text.vocab_size, shape, generator=generator)
    ids[:, 0], ids[:, -1] = 1, 2
    images = torch.randn(samples, 3, side, side, generator=generator)
    return to_device({"pixels": images, "ids": ids, "mask": torch.ones_like(ids)})


def _steps(
    sizes: Sizes, clock: Clock, kind: str, objective: Callable[[], Any], trained: tuple[str, ...],
    batch: dict[str, Tensor], stage: Objective, **work: Any,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    for precision, fp8 in PRECISIONS:
        about = {"case": precision, "samples": sizes.stage_samples}
        if clock.over:
            yield about | {"left_out": "the time was over"}
            continue
        with parallel(Layout(), fp8=fp8), device_literals():
            trainer = Trainer(kind, sizes.stages, objective(), trained)
            found = timed(partial(trainer.step, batch), sizes.repeats)
            about |= found | trainer.terms
            about |= _planned(sizes, kind, stage, trained, trainer.config, found, **work)
            del trainer
        free()
        yield about


def _planned(
    sizes: Sizes, kind: str, stage: Objective, trained: tuple[str, ...], config: TrainConfig,
    found: dict[str, float], **work: Any,
) -> dict[str, Any]:  # fmt: skip
    """Memory and FLOPs of a step by `models.estimate`, beside what was measured."""
    from vlfoundry.models.estimate.compute import sample_flops
    from vlfoundry.models.estimate.memory import GIB, memory

    tokens = sizes.text_tokens
    if stage == "chat":
        tokens += sizes.stages.visual_tokens(kind)
    load = Workload(
        kind=kind, config=sizes.stages, objective=stage, batch_samples=sizes.stage_samples,
        steps=1, text_tokens=tokens, trained=trained, moments=config.moments,
        gradients=config.gradients, **work,
    )  # fmt: skip
    needed = memory(load, Layout(), element=2 if install().precision == "bf16" else 4)
    flops = sample_flops(load).total * sizes.stage_samples
    row = {
        "planned_gib": needed.total / GIB,
        "planned_states_gib": (needed.total - needed.activations) / GIB,
        "tflops": flops / found["seconds"] / 1e12,
    }
    if "peak_gib" in found:
        row["peak_over_planned"] = found["peak_gib"] / row["planned_gib"]
    return row


def _loss_alone(sizes: Sizes, info_nce: Callable[..., Any]) -> dict[str, float]:
    """Seconds of the contrastive loss of a step's embeddings, both ways."""
    import torch

    from vlfoundry.models.objectives.contrastive import ContrastiveConfig

    kind = install().kind
    shape = sizes.stage_samples, sizes.stages.embed_dim
    images, texts = (
        torch.nn.functional.normalize(torch.randn(shape, device=kind), dim=1).requires_grad_()
        for _ in range(2)
    )
    scale = torch.zeros((), device=kind, requires_grad=True)
    with parallel(Layout()):

        def step() -> None:
            info_nce(images, texts, scale, ContrastiveConfig())[0].backward()

        return timed(step, sizes.repeats)
