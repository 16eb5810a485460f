"""Mixed bf16, as on a GPU: weights and activations in bf16, losses, sums and main weights fp32."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest
import torch

import vlfoundry.infra.backend
from tests.models import test_layouts
from tests.models.test_layouts import LAYOUTS, alone, curve, gradients
from vlfoundry.infra.backend import Layout
from vlfoundry.infra.launch.launchers.fork import run_ranks

pytestmark = pytest.mark.slow


def in_bf16(fn, *args):
    """A rank that was given a device whose precision is bf16."""
    vlfoundry.infra.backend._installed = dataclasses.replace(
        vlfoundry.infra.backend.install(), precision="bf16"
    )
    return fn(*args)


def with_rounded_weights(fn, *args):
    """Weights that were rounded to bf16, and nothing else."""
    made = test_layouts.build

    def build(*given, **named):
        model = made(*given, **named)
        for parameter in model.parameters():
            parameter.data.copy_(parameter.data.bfloat16())
        return model

    test_layouts.build = build
    return fn(*args)


@functools.cache
def rounding(stage):
    """How far gradients turn (1 - cosine) where nothing but the weights is rounded to bf16."""
    _, expected, _ = alone(stage, Layout())
    _, got, _ = run_ranks(with_rounded_weights, gradients, stage, Layout(), ranks=1)[0]
    return 1 - _cosine(_flat(got), _flat(expected))


CELLS = [
    *itertools.product(
        ["contrastive", "generative", "full"], ["TP1", "TP2+SP", "DP2", "PP2", "recompute"]
    )
]


@pytest.mark.parametrize(("stage", "layout"), CELLS[::2])
def test_gradients_point_where_those_of_fp32_do(stage, layout):
    """The other cells are in `make accept SUBJECT=fp8`."""
    gradients_point_where_those_of_fp32_do(stage, layout)


def gradients_point_where_those_of_fp32_do(stage: str, layout: str) -> None:
    """At most twice the angle that rounded weights alone turn them by: how large that is depends
    on the stage and on the processor. Tensor parallelism also adds halves up that were rounded."""
    chosen = LAYOUTS[layout]
    terms, expected, _ = alone(stage, chosen)
    got_terms, got, _ = run_ranks(in_bf16, gradients, stage, chosen, ranks=chosen.ranks)[0]
    assert got_terms["loss"] == pytest.approx(terms["loss"], rel=0.01)
    assert got.keys() == expected.keys()
    limit = 0.015 if chosen.tensor > 1 else 4 * rounding(stage)
    assert 1 - _cosine(_flat(got), _flat(expected)) <= limit


@pytest.mark.parametrize("stage", ["generative", "simple"])
def test_losses_are_fp32(stage):
    """A mean of numbers that were rounded to bf16 would be a bf16 number more often than not."""
    terms, _, _ = run_ranks(in_bf16, gradients, stage, Layout(), ranks=1)[0]
    for name in {"loss", "itm", "itc", "itg"} & set(terms):
        assert terms[name] != float(torch.tensor(terms[name]).bfloat16()), name


def test_weights_learn_by_less_than_bf16_knows(tmp_path):
    """A gain of 1 that moves by 1e-3 a step stays where it is in bf16: its neighbours are 4e-3 and
    8e-3 away. The fp32 main weights add the steps up."""
    _, weights = run_ranks(in_bf16, curve, "simple", Layout(), tmp_path, 20, ranks=1)[0]
    assert (weights["language.decoder.final_layernorm.weight"] != 1).any()


def _flat(tensors):
    return np.concatenate([tensors[name].ravel() for name in sorted(tensors)]).astype(np.float64)


def _cosine(a, b):
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
