"""Master weights kept as remainders, and what a checkpoint sees of them."""

import types

import pytest
import torch

from infra.errors import ConfigError
from infra.train.config import TrainConfig
from infra.train.masters import MASTER, join, split, whole_masters
from infra.train.optim import check_moments


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
    """`state` as FusedAdam has it; only the masters of bf16 parameters are remainders."""
    state = {}
    adam = types.SimpleNamespace(
        get_unscaled_state=lambda param, name: state[param, name].clone(),
        set_scaled_state=lambda param, name, value: state.update({(param, name): value}),
    )
    whole_masters(adam)
    master = torch.randn(16, generator=torch.Generator().manual_seed(1))
    narrow, wide = torch.zeros(16, dtype=torch.bfloat16), torch.zeros(16)
    for param in (narrow, wide):
        adam.set_scaled_state(param, MASTER, master)
        adam.set_scaled_state(param, "exp_avg", master)
        assert torch.equal(adam.get_unscaled_state(param, MASTER), master)
        assert torch.equal(adam.get_unscaled_state(param, "exp_avg"), master)
    assert state[narrow, MASTER].dtype == torch.int16
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
