"""What must not depend on how many ranks there are."""

import dataclasses

import numpy as np
import pytest
import torch

from tests.support.tiny_models import chat_batch, pixels, stage2_batch, texts, tiny_config
from vlfoundry.infra.backend import Layout
from vlfoundry.infra.backend.parallel import parallel
from vlfoundry.infra.launch.launchers.fork import run_ranks
from vlfoundry.infra.train.weights import gather_weights
from vlfoundry.models.internvl.config import PARTS
from vlfoundry.models.internvl.model import build
from vlfoundry.models.layers.config import RopeScaling
from vlfoundry.models.layers.parallel import data_group
from vlfoundry.models.objectives.contrastive import Contrastive
from vlfoundry.models.objectives.generative import Generative
from vlfoundry.models.objectives.next_token import ChatObjective, NextTokenConfig, TextObjective

pytestmark = pytest.mark.slow

# A bias on keys shifts all scores of a query alike, so its gradient is zero but for rounding.
ZERO_GRADIENT = ("norm_k.bias", "linear_k.bias")


def loss_of(kind: str, model, part: slice = slice(None)) -> torch.Tensor:
    config = model.model_config
    if kind == "text":
        ids, mask = texts(4)
        return TextObjective()(model, {"ids": ids[part], "mask": mask[part]})[0]
    if kind == "vision":
        return model.vision(pixels(4)[part]).square().mean()
    if kind == "internvl_c":
        ids, mask = texts(4)
        ids[3], mask[3] = ids[0], mask[0]  # one caption of two images
        batch = {"pixels": pixels(4), "ids": ids, "mask": mask}
        objective = Contrastive()
    elif kind == "internvl_g":
        batch, objective = stage2_batch(4), Generative()
    else:
        batch = chat_batch(config, kind, 4)
        objective = ChatObjective(NextTokenConfig(averaging="square"))
    return objective(model, {name: value[part] for name, value in batch.items()})[0]


def weights_and_gradients(kind: str, tensor: int, options: dict):
    """Rank 0: loss, whole weights, whole gradients; `options` of the text tower."""
    config = tiny_config()
    config = tiny_config(text=dataclasses.replace(config.text, **options))
    with parallel(Layout(tensor=tensor)):
        model = build(kind, config, seed=3)
        loss = loss_of(kind, model)
        loss.backward()
        weights = gather_weights(model)
        for parameter in model.parameters():
            gradient = parameter.grad
            parameter.data = torch.zeros_like(parameter) if gradient is None else gradient
        gradients = gather_weights(model)
    if weights is None:
        return None
    as_numpy = [{n: t.numpy() for n, t in part.items()} for part in (weights, gradients)]
    return loss.item(), *as_numpy


TIED = {"tied_head": True, "qkv_bias": True}
SCALED = {"rope_scaling": RopeScaling(kind="dynamic", factor=2.0), "max_tokens": 4}


@pytest.mark.parametrize(
    ("kind", "options"),
    [*((kind, {}) for kind in PARTS), ("text", TIED), ("chat_simple", TIED), ("text", SCALED)],
)
def test_two_tensor_ranks_equal_one(kind, options):
    one = run_ranks(weights_and_gradients, kind, 1, options, ranks=1)[0]
    two = run_ranks(weights_and_gradients, kind, 2, options, ranks=2)[0]
    assert ("text.head.weight" in one[1]) == (kind in ("text", "internvl_g") and options != TIED)

    assert abs(one[0] - two[0]) < 1e-5
    for name, weight in one[1].items():
        assert np.array_equal(weight, two[1][name]), name
    for name, gradient in one[2].items():
        if name.endswith(ZERO_GRADIENT):
            continue
        scale = np.abs(gradient).max()
        assert np.abs(gradient - two[2][name]).max() <= 1e-4 * scale + 1e-6, name


def mean_gradients(kind: str, ranks: int):
    """Loss and gradients averaged over data-parallel ranks, as Megatron does."""
    with parallel(Layout(data=ranks)):
        model = build(kind, tiny_config(), seed=3)
        size = 4 // ranks
        start = data_group().rank() * size
        loss = loss_of(kind, model, slice(start, start + size))
        loss.backward()
        values = [loss.detach()] + [p.grad for p in model.parameters() if p.grad is not None]
        for value in values:
            torch.distributed.all_reduce(value, group=data_group())
            value /= ranks
        return [value.numpy() for value in values]


@pytest.mark.parametrize("kind", ["text", "internvl_c", "chat_simple"])
def test_the_loss_is_that_of_the_whole_batch(kind):
    one = run_ranks(mean_gradients, kind, 1, ranks=1)[0]
    for rank in run_ranks(mean_gradients, kind, 2, ranks=2):
        assert len(one) == len(rank)
        for expected, got in zip(one, rank, strict=True):
            assert np.abs(expected - got).max() < 1e-5 * max(1.0, np.abs(expected).max())
