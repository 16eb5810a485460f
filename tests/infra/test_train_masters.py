"""Master weights kept as remainders, and what a checkpoint sees of them."""

import types

import pytest
import torch

from vlfoundry.infra.core.errors import ConfigError
from vlfoundry.infra.train.config import TrainConfig
from vlfoundry.infra.train.masters import MASTER, join, split, whole_masters
from vlfoundry.infra.train.optim import check_moments


def test_a_master_is_put_together_as_it_was_taken_apart():
    generator = torch.Generator().manual_seed(0)
    master = torch.randn(4096, generator=generator) * torch.logspace(-20, 10, 4096)
    master[:4] = torch.tensor([0.0, -0.0, 1.0, -1.0])
    weight, remainder = split(master)
    assert (weight.dtype, remainder.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(join(weight, remainder), master)
    assert torch.equal(weight[:4].float(), master[:4])
    # bf16 has 8 significant bits: the nearest is within half of the last one.
    assert ((weight.float() - master).abs() <= master.abs() * 2**-8).all()


def test_an_optimizer_gives_and_takes_whole_masters():
    """`state` as Megatron gets it of FusedAdam: only masters of bf16 weights are remainders."""
    narrow, wide = torch.zeros(16, dtype=torch.bfloat16), torch.zeros(16)
    state = {}
    optimizer = types.SimpleNamespace(
        optimizer=types.SimpleNamespace(param_groups=[{"params": [narrow, wide]}]),
        model_param_group_index_map={"narrow": (0, 0), "wide": (0, 1)},
        _get_main_param_and_optimizer_states=lambda name: dict(state[name]),
        _set_main_param_and_optimizer_states=state.__setitem__,
    )
    whole_masters(optimizer)
    master = torch.randn(16, generator=torch.Generator().manual_seed(1))
    for name in ("narrow", "wide"):
        optimizer._set_main_param_and_optimizer_states(name, {MASTER: master, "exp_avg": master})
        found = optimizer._get_main_param_and_optimizer_states(name)
        assert torch.equal(found[MASTER], master)
        assert torch.equal(found["exp_avg"], master)
    assert state["narrow"][MASTER].dtype == torch.int16
    assert torch.equal(narrow, split(master)[0])
    assert torch.equal(wide, torch.zeros(16))


def test_what_cannot_be_is_refused():
    fields = {"steps": 1, "batch_samples": 1, "lr": 1.0}
    with pytest.raises(ConfigError, match=r"set train\.moments to bf16"):
        TrainConfig(**fields, gradients="bf16")
    with pytest.raises(ConfigError, match="expected adamw"):
        TrainConfig(**fields, moments="bf16", optimizer="stable_adamw")
    with pytest.raises(ConfigError, match="no GPU is visible"):
        check_moments(TrainConfig(**fields, moments="bf16"))
    check_moments(TrainConfig(**fields))
