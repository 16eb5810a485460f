"""RMSNorm kernels against plain ones, alone and with the heads on two ranks."""

import numpy as np
import pytest
import torch

from tests.models.kernels.helpers import assert_as_exact, gradients, leaves
from vlfoundry.infra.backend import Layout
from vlfoundry.infra.backend.parallel import parallel
from vlfoundry.models.kernels.norms import query_key_norm, rms_norm
from vlfoundry.models.layers.parallel import tensor_group

pytestmark = pytest.mark.slow

EPS = 1e-6
TOKENS, BATCH, HEADS, SIZE = 3, 2, 5, 4
WIDTH = HEADS * SIZE


def plain(x, weight, width=None):
    """The definition, over the last axis or over heads [S, B, N, H]."""
    flat = x if width is None else x.flatten(2)
    squares = flat.square().sum(-1, keepdim=True) / (width or x.shape[-1])
    return (flat * torch.rsqrt(squares + EPS) * weight).view(x.shape)


def plain_heads(query, key, query_weight, key_weight):
    return plain(query, query_weight, WIDTH), plain(key, key_weight, WIDTH)


def fused_heads(query, key, query_weight, key_weight):
    weights = query_weight, key_weight
    return query_key_norm(query, key, *weights, EPS, true_width=WIDTH, group=None)


def heads(dtype) -> list[torch.Tensor]:
    return leaves(dtype, *[(TOKENS, BATCH, HEADS, SIZE)] * 2, (WIDTH,), (WIDTH,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7,), (3, 32), (2, 5, 33)])
def test_rows_of_any_width(shape, dtype):
    given = leaves(dtype, shape, shape[-1:])

    def fused(x, weight):
        return (rms_norm(x, weight, EPS),)

    assert_as_exact(fused, lambda x, weight: (plain(x, weight),), given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_and_keys_over_all_heads(dtype):
    assert_as_exact(fused_heads, plain_heads, heads(dtype))


def test_gradients_are_those_of_small_steps():
    assert torch.autograd.gradcheck(fused_heads, heads(torch.float64), fast_mode=True)


def test_as_they_lie_in_the_projection():
    """Queries, keys and values of a head are neighbours in what they are cut out of."""
    mixed, *weights = leaves(torch.float32, (TOKENS, BATCH, HEADS, 3 * SIZE), (WIDTH,), (WIDTH,))

    def of_mixed(heads_norm):
        def norm(mixed, *weights):
            query, key, _ = mixed.split(SIZE, 3)
            return heads_norm(query, key, *weights)

        return norm

    assert_as_exact(of_mixed(fused_heads), of_mixed(plain_heads), [mixed, *weights])


def test_gradients_that_lie_otherwise():
    """Attention returns gradients in an order of its own."""

    def samples_first(heads_norm):
        def norm(*given):
            return [x.permute(1, 2, 0, 3).contiguous() for x in heads_norm(*given)]

        return norm

    given = heads(torch.float32)
    assert_as_exact(samples_first(fused_heads), samples_first(plain_heads), given)


def test_more_rows_than_programs_share_them(monkeypatch):
    monkeypatch.setattr("vlfoundry.models.kernels.rows.PROGRAMS", 4)
    assert_as_exact(fused_heads, plain_heads, heads(torch.float32))


def on_ranks(ranks: int) -> list:
    """Results and gradients of this rank's heads; a head of zeros makes them six."""
    with parallel(Layout(tensor=ranks)):
        group = tensor_group()
        each = (HEADS + 1) // ranks
        mine = slice(group.rank() * each, (group.rank() + 1) * each)
        query, key, *weights = heads(torch.float32)
        cut = [
            torch.nn.functional.pad(x.detach().view(-1, HEADS, SIZE), (0, 0, 0, 1))[:, mine]
            for x in (query, key, *weights)
        ]
        given = [x.reshape(TOKENS, BATCH, each, SIZE).requires_grad_() for x in cut[:2]]
        given += [x.flatten().requires_grad_() for x in cut[2:]]

        def fused(*given):
            shared = group if ranks > 1 else None
            outs = query_key_norm(*given, EPS, true_width=WIDTH, group=shared)
            # Heads as columns, so that every head's upstream gradient is its own in each layout.
            return [out * torch.linspace(0.1, 1, 6 * SIZE).view(6, SIZE)[mine] for out in outs]

        outs = fused(*given)
        torch.stack(outs).sin().sum().backward()
        return [x.detach().numpy() for x in (*outs, *(leaf.grad for leaf in given))]


def test_ranks_share_the_heads(run_ranks):
    (whole,) = run_ranks(on_ranks, 1, ranks=1)
    parts = run_ranks(on_ranks, 2, ranks=2)
    for index, wanted in enumerate(whole):
        axis = 2 if wanted.ndim == 4 else 0
        got = np.concatenate([part[index] for part in parts], axis)
        assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_the_same_bits_again():
    given = heads(torch.float32)
    pairs = zip(gradients(fused_heads, given), gradients(fused_heads, given), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
