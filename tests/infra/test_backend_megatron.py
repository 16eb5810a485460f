"""Megatron on the CPU: the traps that would be silent."""

import numpy as np
import pytest

from vlfoundry.infra.backend import Layout


@pytest.fixture(scope="module")
def single_gradients(run_ranks):
    return run_ranks(_gradients, Layout(), ranks=1)[0]


def _gradients(layout, **options):
    from tests.support import tiny_tower as tower
    from vlfoundry.infra.backend.parallel import parallel

    with parallel(layout):
        return tower.gradients(**options)


def _worst(got, expected):
    assert got.keys() == expected.keys()
    return max(
        (np.linalg.norm(got[name] - want) / np.linalg.norm(want), name)
        for name, want in expected.items()
    )


def test_data_parallel_gradients_equal_one_rank(run_ranks, single_gradients):
    got = run_ranks(_gradients, Layout(data=2), ranks=2)[0]
    assert _worst(got, single_gradients)[0] < 1e-6


def test_tensor_parallel_gradients_equal_one_rank(run_ranks, single_gradients):
    got = run_ranks(_gradients, Layout(tensor=2), ranks=2)[0]
    assert _worst(got, single_gradients)[0] < 1e-5


def test_qk_norm_gradients_are_not_summed_over_tensor_ranks_by_name(run_ranks, single_gradients):
    got = run_ranks(_gradients, Layout(tensor=2), ranks=2)[0]
    names = [name for name in got if "q_layernorm" in name or "k_layernorm" in name]
    assert len(names) == 4
    for name in names:
        np.testing.assert_allclose(got[name], single_gradients[name], rtol=1e-3, atol=1e-7)


def test_the_trap_of_the_qk_norms_is_still_there(run_ranks, single_gradients):
    """What the test above would see if the models used Megatron's own flag."""

    def trapped():
        return _gradients(Layout(tensor=2), sum_qk_norms_by_name=True)

    error, name = _worst(run_ranks(trapped, ranks=2)[0], single_gradients)
    assert "_layernorm" in name
    assert error > 0.1


def test_adam_is_torch_adamw_bit_for_bit(run_ranks):
    def work():
        import torch

        from vlfoundry.infra.backend.adam import CpuFusedAdam

        def train(optimizer_class, **options):
            generator = torch.Generator().manual_seed(0)
            shapes = [(7, 5), (5,), (), (3, 2, 4)]
            params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
            groups = [
                {"params": params[:2], "lr": 3e-3},
                {"params": params[2:], "weight_decay": 0.0},
            ]
            optimizer = optimizer_class(groups, **options)
            for _ in range(12):
                for param in params:
                    param.grad = torch.randn(param.shape, generator=generator)
                optimizer.step()
            return params, optimizer

        options = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1}
        ours, optimizer = train(CpuFusedAdam, **options)
        theirs, _ = train(torch.optim.AdamW, **options)
        return (
            all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)),
            [group["step"] for group in optimizer.param_groups],
            {key for state in optimizer.state.values() for key in state},
        )

    ((equal, steps, keys),) = run_ranks(work, ranks=1)
    assert equal
    # The contract of the distributed optimizer: the step lives in the group, not in the state.
    assert steps == [12, 12]
    assert keys == {"exp_avg", "exp_avg_sq"}


def test_random_states_fork_and_return(run_ranks):
    def work():
        import torch
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        from vlfoundry.infra.backend.parallel import parallel

        def draw():
            return torch.rand(3).tolist()

        with parallel(Layout(tensor=2), seed=5):
            plain = draw()
            torch.manual_seed(5)
            with get_cuda_rng_tracker().fork():
                inside = draw()
            return plain, inside, draw()

    (plain0, inside0, after0), (plain1, inside1, after1) = run_ranks(work, ranks=2)
    assert plain0 == plain1 == after0 == after1
    assert inside0 != inside1, "tensor ranks must draw different dropout inside the tracker"


def test_recompute_draws_the_same_numbers_again(run_ranks):
    def work():
        import torch
        from megatron.core.tensor_parallel import checkpoint, get_cuda_rng_tracker

        from vlfoundry.infra.backend import device_literals
        from vlfoundry.infra.backend.parallel import parallel

        def noisy(x):
            with get_cuda_rng_tracker().fork():
                return torch.nn.functional.dropout(x, 0.5) * x

        with parallel(Layout()), device_literals():
            x = torch.ones(64, requires_grad=True)
            out = checkpoint(noisy, False, x)
            out.sum().backward()
            # d/dx of keep*2*x*x is twice the output where x is 1.
            return torch.equal(x.grad, 2 * out)

    assert run_ranks(work, ranks=1) == [True]


def test_cuda_literals_mean_the_cpu_inside_only(run_ranks):
    def work():
        import torch

        from vlfoundry.infra.backend import device_literals, install

        if install().kind == "cuda":
            return True
        with device_literals():
            there = torch.zeros(2, device="cuda").cuda().to("cuda")
            name = there.type()
        return (
            there.device.type == "cpu"
            and name.startswith("torch.cuda")
            and (there.type() == "torch.FloatTensor")
        )

    assert run_ranks(work, ranks=1) == [True]
