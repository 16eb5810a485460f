"""Models over the kernels are the models without them."""

import dataclasses

import pytest
import torch

from tests.models.kernels.helpers import DEVICE
from tests.support.tiny_models import pixels, tiny_config
from vlfoundry.infra.backend import Layout, device_literals
from vlfoundry.infra.backend.parallel import parallel
from vlfoundry.infra.train.weights import gather_weights
from vlfoundry.models import kernels
from vlfoundry.models.connector.config import ConnectorConfig
from vlfoundry.models.internvl.model import build
from vlfoundry.models.kernels import norms, residual, unshuffle
from vlfoundry.models.layers.parallel import tensor_group

pytestmark = pytest.mark.slow

SAMPLES = 2


def gradients(use_kernels: bool, layout: Layout) -> dict:
    """Visual tokens (on rank 0) and gradients of a chat model's vision side."""
    kernels.use_kernels = lambda tensor: use_kernels  # in this fork alone
    used = _count_calls()
    with parallel(layout), device_literals():
        config = tiny_config(connector=ConnectorConfig(init_std=0.3, ps_version="v1"))
        vision = dataclasses.replace(config.vision, drop_path=0.4)
        model = build("chat_simple", dataclasses.replace(config, vision=vision), seed=3)
        model = model.to(DEVICE).train()
        batch = {"pixels": pixels(SAMPLES).to(DEVICE), "samples": torch.arange(SAMPLES)}
        state: dict = {}
        model._visual_tokens(state, batch)
        state["visual"].sin().sum().backward()
        for parameter in model.parameters():
            grad = parameter.grad
            if grad is not None and getattr(parameter, "sequence_parallel", False):
                torch.distributed.all_reduce(grad, group=tensor_group())
            parameter.data = torch.zeros_like(parameter) if grad is None else grad
        whole = gather_weights(model) or {}
    found = {name: grad.cpu().numpy() for name, grad in whole.items()}
    return {"visual": state["visual"].detach().cpu().numpy(), "used": used, **found}


def _count_calls() -> dict[str, int]:
    """How often each kernel is called from now on, by its name."""
    used: dict[str, int] = {}

    def count(module, name: str) -> None:
        function = getattr(module, name)

        def counted(*args, **kwargs):
            used[name] = used.get(name, 0) + 1
            return function(*args, **kwargs)

        setattr(module, name, counted)

    count(norms, "query_key_norm")
    count(norms, "rms_norm")
    count(residual, "scaled_residual")
    count(unshuffle, "shuffled_norm")
    return used


def test_a_model_is_the_same_over_kernels(run_ranks):
    """On two ranks with sequence parallelism, each layer computed twice."""
    layout = Layout(tensor=2, sequence_parallel=True, recompute=True)
    expected = run_ranks(gradients, False, Layout(), ranks=1)[0]
    got = run_ranks(gradients, True, layout, ranks=layout.ranks)[0]
    depth = tiny_config().vision.depth
    assert expected.pop("used") == {}
    assert got.pop("used") == {
        "query_key_norm": 2 * depth,
        "rms_norm": 2 * depth,  # before attention; the one before the MLP is fused
        "scaled_residual": 2 * 2 * depth,
        "shuffled_norm": 1,
    }
    assert got.keys() == expected.keys()
    for name, wanted in expected.items():
        assert abs(got[name] - wanted).max() <= 1e-5 * max(1e-3, abs(wanted).max()), name


def test_nothing_of_a_cpu_goes_through_kernels():
    assert not kernels.use_kernels(torch.zeros(1))
