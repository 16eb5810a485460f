"""The contrastive losses over kernels against plain ones that hold all logits."""

import pytest
import torch

from tests.models.kernels.helpers import DEVICE, assert_as_exact, leaves
from vlfoundry.models import kernels
from vlfoundry.models.kernels import pairs
from vlfoundry.models.objectives.contrastive import ContrastiveConfig, info_nce, sigmoid_loss
from vlfoundry.models.objectives.tiled import softplus_sum, two_way_logsumexp

SIZES = [(5, 7, 3), (20, 50, 9)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Kernels on any device, and tiles small enough for several of them, none of which divides."""
    monkeypatch.setattr(kernels, "use_kernels", lambda tensor: True)
    monkeypatch.setattr(pairs, "BLOCKS", {"ROWS": 16, "COLUMNS": 16, "CHANNELS": 16})


def embeddings(rows, columns, width, dtype=torch.float32):
    made = leaves(dtype, (rows, width), (columns, width), ())
    return [tensor.detach().mul(2).requires_grad_() for tensor in made]


@pytest.mark.parametrize("size", SIZES)
def test_both_ways(size):
    rows, columns, _ = embeddings(*size)

    def fused(rows, columns):
        return two_way_logsumexp(rows, columns, tile=24)[:2]

    def plain(rows, columns):
        logits = rows @ columns.T
        return logits.logsumexp(1), logits.logsumexp(0)

    assert_as_exact(fused, plain, [rows, columns])


@pytest.mark.parametrize("size", SIZES)
def test_the_best_are_those_of_the_whole_matrix(size):
    rows, columns, _ = embeddings(*size)
    logits = rows @ columns.T
    both = two_way_logsumexp(rows, columns)
    assert torch.equal(both.row_best, logits.argmax(1))
    assert torch.equal(both.column_best, logits.argmax(0))
    assert torch.allclose(both.column_max, logits.amax(0))


@pytest.mark.parametrize("shift", [0.0, -12.0, 12.0])
@pytest.mark.parametrize("size", SIZES)
def test_softplus(size, shift):
    """Also far from 0, where 1 + exp(logit) has hardly a digit of exp(logit)."""
    rows, columns, bias = embeddings(*size)
    small = [tensor.detach().mul(0.1).requires_grad_() for tensor in (rows, columns)]
    bias = torch.tensor(shift, device=DEVICE, requires_grad=True)

    def fused(*given):
        return (softplus_sum(*given, tile=24),)

    def plain(rows, columns, bias):
        return (torch.logaddexp(rows @ columns.T + bias, torch.zeros_like(bias)).sum(),)

    assert_as_exact(fused, plain, [*small, bias])


def test_gradients_are_those_of_small_steps():
    rows, columns, bias = embeddings(5, 18, 3, torch.float64)

    def both(rows, columns):
        return two_way_logsumexp(rows, columns, tile=24)[:2]

    assert torch.autograd.gradcheck(both, (rows, columns), fast_mode=True)
    assert torch.autograd.gradcheck(softplus_sum, (rows, columns, bias), fast_mode=True)


def test_whole_losses_of_bf16_embeddings():
    """They go into the kernels as fp32, with nothing lost."""
    images, texts = (tensor.detach() for tensor in embeddings(20, 20, 9)[:2])
    images, texts = (torch.nn.functional.normalize(t, dim=1).bfloat16() for t in (images, texts))
    scale = torch.tensor(3.0, device=DEVICE)

    def plain_softmax(images, texts):
        logits = scale.double().exp() * images.double() @ texts.double().T
        own = torch.arange(len(images), device=DEVICE)
        cross_entropy = torch.nn.functional.cross_entropy
        return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2

    got, _ = info_nce(images, texts, scale, ContrastiveConfig())
    assert got.item() == pytest.approx(plain_softmax(images, texts).item(), rel=1e-5)
    bias = torch.tensor(-10.0, device=DEVICE)
    logits = scale.double().exp() * images.double() @ texts.double().T + bias
    sign = 2.0 * torch.eye(20, device=DEVICE).double() - 1
    wanted = -torch.nn.functional.logsigmoid(sign * logits).sum() / 20
    got = sigmoid_loss(images, texts, scale, bias)
    assert got.item() == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_is_not_a_number_is_not_hidden():
    rows, columns, _ = embeddings(5, 7, 3)
    with torch.no_grad():
        rows[2, 1] = torch.nan
    both = two_way_logsumexp(rows, columns)
    assert both.row_lse.isnan().tolist() == [False, False, True, False, False]
    assert both.column_lse.isnan().all()
    assert both.row_best.max() < 7
    assert both.column_best.max() < 5
