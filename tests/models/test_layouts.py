"""The parity matrix: gradients and losses in every layout equal those of one rank."""

import dataclasses

import numpy as np
import pytest
import torch

from infra.backend import Layout, device_literals
from infra.backend.parallel import parallel
from infra.backend.ranks import run_ranks
from infra.errors import LayoutError
from infra.train.config import TrainConfig
from infra.train.loop import fit
from infra.train.step import Engine, pack, unpack
from infra.train.weights import gather_weights, pieces
from models.common.parallel import data_group
from models.internvl.config import InternVLConfig
from models.internvl.cut import cut
from models.internvl.freeze import freeze
from models.internvl.model import build
from models.objectives.contrastive import Contrastive
from models.objectives.generative import Generative
from models.objectives.next_token import ChatObjective, NextTokenConfig, TextObjective
from tests.models_helpers import chat_batch, pixels, stage2_batch, texts, tiny_config

SAMPLES = 8
LAYOUTS = {
    "TP1": Layout(),
    "micro-batches": Layout(micro_batch_samples=2),
    "recompute": Layout(recompute=True),
    "TP2": Layout(tensor=2),
    "TP2+SP": Layout(tensor=2, sequence_parallel=True),
    "TP2+SP+recompute": Layout(tensor=2, sequence_parallel=True, recompute=True),
    "PP2": Layout(pipeline=2, micro_batch_samples=2),
    "PP2+recompute": Layout(pipeline=2, micro_batch_samples=2, recompute=True),
    "PP2 interleaved": Layout(pipeline=2, virtual_pipeline=2, micro_batch_samples=2),
    "DP2": Layout(data=2),
    "DP2+micro-batches": Layout(data=2, micro_batch_samples=2),
    "TP2xPP2": Layout(tensor=2, pipeline=2, micro_batch_samples=2),
    "TP2xPP2+SP": Layout(tensor=2, pipeline=2, sequence_parallel=True, micro_batch_samples=2),
}


def model_config() -> InternVLConfig:
    """Four layers a tower, so that each can be cut into four stages; five heads, as ever."""
    config = tiny_config()
    return dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, depth=4, drop_path=0.3),
        text=dataclasses.replace(config.text, depth=4),
    )


def batch_of(stage: str, config: InternVLConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """The whole batch of a step."""
    numbers = {"samples": torch.arange(SAMPLES) + SAMPLES * seed}
    if stage == "contrastive":
        ids, mask = texts(SAMPLES, seed=seed)
        ids[3], mask[3] = ids[0], mask[0]  # one caption of two images
        return {"pixels": pixels(SAMPLES, seed=seed), "ids": ids, "mask": mask, **numbers}
    if stage == "generative":
        return stage2_batch(SAMPLES, seed=seed) | numbers
    if stage == "text":
        ids, mask = texts(SAMPLES, seed=seed)
        return {"ids": ids, "mask": mask}
    batch = chat_batch(config, f"chat_{stage}", SAMPLES)
    batch["labels"][1, -2:] = -100  # micro-batches of unlike weight
    return batch | numbers


STAGES = {
    "text": ("text", TextObjective),
    "contrastive": ("internvl_c", Contrastive),
    "generative": ("internvl_g", Generative),
    "simple": ("chat_simple", lambda: ChatObjective(NextTokenConfig(averaging="square"))),
    "full": ("chat_full", ChatObjective),
}


def share(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """This data-parallel rank's."""
    size = SAMPLES // data_group().size()
    start = data_group().rank() * size
    return {name: value[start : start + size] for name, value in batch.items()}


def gradients(stage: str, layout: Layout):
    """Terms and whole gradients of one step; on rank 0."""
    from infra.train.loop import _wrap

    kind, objective = STAGES[stage]
    with parallel(layout), device_literals():
        config = model_config()
        model = build(kind, config, seed=3)
        if stage == "generative":
            freeze(model, ["stage2", "text"])
        wrapped = [_wrap(chunk) for chunk in getattr(model, "chunks", [model])]
        engine = Engine(model, wrapped, objective(), layout)
        model.train()
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        terms = engine.gradients(share(batch_of(stage, config)))
        engine.finalise(everywhere=True)
        dummies = dummy_heads(model)
        for parameter in model.parameters():
            parameter.data = getattr(parameter, "main_grad", torch.zeros_like(parameter))
        whole = gather_weights(model)
    if whole is None:
        return None
    return terms, {name: tensor.numpy() for name, tensor in whole.items()}, dummies


def dummy_heads(model) -> float:
    """The largest gradient of heads that are only there to divide by the tensor ranks."""
    largest = 0.0
    for piece in pieces(model):
        parameter = piece.data
    return largest


_alone: dict = {}


def alone(stage: str, layout: Layout):
    """One rank's, with the same micro-batches: what the layout has to equal."""
    same = Layout(micro_batch_samples=layout.micro_batch_samples)
    if (stage, same) not in _alone:
        _alone[stage, same] = run_ranks(gradients, stage, same, ranks=1)[0]
    return _alone[stage, same]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_are_those_of_one_rank(stage, layout):
    chosen = LAYOUTS[layout]
    terms, expected, _ = alone(stage, chosen)
    got_terms, got, _ = run_ranks(gradients, stage, chosen, ranks=chosen.ranks)[0]
    assert got_terms == pytest.approx(terms, rel=1e-5, abs=1e-6)
    limit = 1e-5
    largest = max(np.abs(gradient).max() for gradient in expected.values())
    for name, gradient in expected.items():
        # A bias on keys shifts all scores of a query alike: zero but for rounding.
        scale = max(np.abs(gradient).max(), 1e-2 * largest)
        assert np.abs(gradient - got[name]).max() <= limit * scale, name
