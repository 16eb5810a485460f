"""The contrastive losses against plain ones that hold all logits: values, gradients, memory."""

import ctypes
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid, normalize

from vlfoundry.infra.backend import Layout
from vlfoundry.infra.backend.parallel import parallel
from vlfoundry.models.layers.parallel import data_group
from vlfoundry.models.objectives.contrastive import ContrastiveConfig, info_nce, sigmoid_loss
from vlfoundry.models.objectives.tiled import TILE_COLUMNS, softplus_sum, two_way_logsumexp

pytestmark = pytest.mark.slow

WIDTH = 6
SCALE = 2.0
SMOOTHED = ContrastiveConfig(label_smoothing=0.1)
OPTIONS = {
    "plain": (ContrastiveConfig(), ()),
    "smoothed": (SMOOTHED, ()),
    "capped": (ContrastiveConfig(max_logit_scale=3.0), ()),
    "valid": (SMOOTHED, ("valid",)),
    "group": (SMOOTHED, ("group",)),
    "group and valid": (ContrastiveConfig(), ("group", "valid")),
}


def embeddings(size: int, dtype: torch.dtype, width: int = WIDTH) -> tuple[torch.Tensor, ...]:
    """Images, their texts (similar to them), and the two scalars, all with gradients."""
    generator = torch.Generator().manual_seed(size)
    images = torch.randn(size, width, generator=generator, dtype=torch.float64)
    texts = images + torch.randn(size, width, generator=generator, dtype=torch.float64)
    scalars = torch.tensor(SCALE), torch.tensor(-1.5)
    parts = (normalize(images, dim=1), normalize(texts, dim=1), *scalars)
    return tuple(part.to(dtype).requires_grad_() for part in parts)


def in_fp64(leaves) -> tuple[torch.Tensor, ...]:
    return tuple(leaf.detach().double().requires_grad_() for leaf in leaves)


def marks(size: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(size + 1)
    return {
        "group": torch.randint(size // 2, (size,), generator=generator),
        "valid": torch.rand(size, generator=generator) < 0.7,
    }


def plain_softmax(images, texts, logit_scale, config, group=None, valid=None):
    """The definition: cross entropy of every row and every column, over one matrix of logits."""
    ids = torch.arange(len(images)) if group is None else group
    same = (ids[:, None] == ids).to(images.dtype)
    target = same / same.sum(1, keepdim=True)
    target = (1 - config.label_smoothing) * target + config.label_smoothing / len(images)
    ceiling = torch.inf if config.max_logit_scale is None else config.max_logit_scale
    logits = logit_scale.exp().clamp(max=ceiling) * images @ texts.T
    counts = torch.ones(len(images), dtype=torch.bool) if valid is None else valid
    losses = [-(target * each.log_softmax(1)).sum(1)[counts] for each in (logits, logits.T)]
    return torch.stack(losses).mean()


def plain_sigmoid(images, texts, logit_scale, logit_bias, group=None):
    ids = torch.arange(len(images)) if group is None else group
    sign = 2.0 * (ids[:, None] == ids) - 1.0
    logits = logit_scale.exp() * images @ texts.T + logit_bias
    return -logsigmoid(sign.to(logits.dtype) * logits).sum() / len(images)


def gradients(loss: torch.Tensor, leaves: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def assert_near(got: list[torch.Tensor], wanted: list[torch.Tensor], tolerance: float) -> None:
    """Relative to the largest entry of each tensor."""
    for ours, plain in zip(got, wanted, strict=True):
        assert ours.shape == plain.shape
        assert (ours.double() - plain).abs().max() <= tolerance * plain.abs().max()


PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 1e-5)]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=["fp64", "fp32"])
@pytest.mark.parametrize("size", [5, TILE_COLUMNS + 100])
@pytest.mark.parametrize("option", OPTIONS)
def test_softmax_is_the_plain_one(option, size, dtype, tolerance):
    config, names = OPTIONS[option]
    given = {name: marks(size)[name] for name in names}
    *ours, _ = embeddings(size, dtype)
    exact = in_fp64(ours)
    got = gradients(info_nce(*ours, config, **given)[0], tuple(ours))
    assert_near(got, gradients(plain_softmax(*exact, config, **given), exact), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS, ids=["fp64", "fp32"])
@pytest.mark.parametrize("size", [5, TILE_COLUMNS + 100])
@pytest.mark.parametrize("names", [(), ("group",)], ids=["own", "group"])
def test_sigmoid_is_the_plain_one(names, size, dtype, tolerance):
    given = {name: marks(size)[name] for name in names}
    ours = embeddings(size, dtype)
    exact = in_fp64(ours)
    got = gradients(sigmoid_loss(*ours, **given), ours)
    assert_near(got, gradients(plain_sigmoid(*exact, **given), exact), tolerance)


def test_gradients_of_the_sums_are_those_of_small_steps():
    rows, texts, _, bias = embeddings(7, torch.float64)
    columns = torch.cat([texts, rows[:4]]).detach().requires_grad_()

    def both(rows, columns):
        return two_way_logsumexp(rows, columns, tile=4)[:2]

    assert torch.autograd.gradcheck(both, (4 * rows, columns))
    assert torch.autograd.gradcheck(softplus_sum, (4 * rows, columns, bias, 4))


@pytest.mark.parametrize("tile", [1, 4, 11, 50])
def test_the_best_are_those_of_the_whole_matrix(tile):
    rows, texts, *_ = embeddings(9, torch.float64)
    columns = torch.cat([texts, 0.7 * rows[:2]])
    logits = rows @ columns.T
    both = two_way_logsumexp(rows, columns, tile)
    assert torch.equal(both.row_best, logits.argmax(1))
    assert torch.equal(both.column_best, logits.argmax(0))
    assert torch.allclose(both.row_lse, logits.logsumexp(1), atol=1e-12)
    assert torch.allclose(both.column_lse, logits.logsumexp(0), atol=1e-12)


def test_accuracy_counts_both_ways_among_valid_rows():
    images = torch.eye(4)
    texts = images[[1, 0, 2, 3]]
    scale, config = torch.tensor(0.0), ContrastiveConfig()
    assert info_nce(images, texts, scale, config)[1] == 0.5
    valid = torch.tensor([True, False, True, True])
    assert info_nce(images, texts, scale, config, valid=valid)[1] == pytest.approx(2 / 3)
    group = torch.tensor([7, 7, 8, 9])
    assert info_nce(images, texts, scale, config, group=group)[1] == 1
    one_way = texts.clone()
    one_way[1] = images[1]  # two texts of image 1: it finds one, both find it
    assert info_nce(images, one_way, scale, config)[1] == pytest.approx((3 + 3) / 8)


def test_a_batch_without_valid_rows_costs_nothing():
    *leaves, _ = embeddings(3, torch.float32)
    loss, hits = info_nce(*leaves, ContrastiveConfig(), valid=torch.zeros(3, dtype=torch.bool))
    assert (loss.item(), hits.item()) == (0.0, 0.0)
    assert all(not gradient.any() for gradient in gradients(loss, tuple(leaves)))


def test_bf16_embeddings_are_compared_in_fp32():
    images, texts, scale, _ = embeddings(64, torch.float32, width=32)
    images, texts = (part.detach().bfloat16().requires_grad_() for part in (images, texts))
    loss, _ = info_nce(images, texts, scale, ContrastiveConfig())
    exact = plain_softmax(images.double(), texts.double(), scale.double(), ContrastiveConfig())
    loss.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    assert images.grad is not None
    assert images.grad.dtype == torch.bfloat16


def on_ranks(kind: str, ranks: int) -> list[np.ndarray]:
    """Loss, accuracy and gradients of a batch of 8 that is dealt out to ranks, as DP means them."""
    with parallel(Layout(data=ranks)):
        images, texts, scale, bias = embeddings(8, torch.float32)
        size = 8 // ranks
        start = data_group().rank() * size
        mine = slice(start, start + size)
        group = {"group": torch.tensor([0, 1, 2, 0, 3, 4, 0, 1])[mine]} if "group" in kind else {}
        if kind.startswith("softmax"):
            terms = info_nce(images[mine], texts[mine], scale, SMOOTHED, **group)
        else:
            terms = (sigmoid_loss(images[mine], texts[mine], scale, bias, **group),)
        terms[0].backward()
        gradients = [leaf.grad for leaf in (images, texts, scale, bias) if leaf.grad is not None]
        values = [term.detach() for term in terms] + gradients
        for value in values:
            torch.distributed.all_reduce(value, group=data_group())
            value /= ranks
        return [value.numpy() for value in values]


@pytest.mark.parametrize("kind", ["softmax", "softmax group", "sigmoid", "sigmoid group"])
def test_ranks_share_the_loss_of_the_whole_batch(run_ranks, kind):
    one = run_ranks(on_ranks, kind, 1, ranks=1)[0]
    for ranks in (2, 4):
        for several in run_ranks(on_ranks, kind, ranks, ranks=ranks):
            for wanted, got in zip(one, several, strict=True):
                assert np.abs(got - wanted).max() <= 1e-6 * max(1.0, np.abs(wanted).max())


def valid_on_ranks(ranks: int) -> list[np.ndarray]:
    with parallel(Layout(data=ranks)):
        *leaves, _ = embeddings(8, torch.float32)
        mine = slice(data_group().rank() * 8 // ranks, (data_group().rank() + 1) * 8 // ranks)
        valid = torch.tensor([True, False, True, True, True, True, False, True])[mine]
        images, texts, scale = leaves
        loss, _ = info_nce(images[mine], texts[mine], scale, ContrastiveConfig(), valid=valid)
        loss.backward()
        values = [loss.detach(), *(leaf.grad for leaf in leaves)]
        for value in values:
            torch.distributed.all_reduce(value, group=data_group())
            value /= ranks
        return [value.numpy() for value in values]


def test_ranks_with_as_many_valid_rows_share_the_loss(run_ranks):
    one = run_ranks(valid_on_ranks, 1, ranks=1)[0]
    for wanted, got in zip(one, run_ranks(valid_on_ranks, 2, ranks=2)[1], strict=True):
        assert np.abs(got - wanted).max() <= 1e-6 * max(1.0, np.abs(wanted).max())


def peak_mib(kind: str, size: int) -> float:
    """What a forward and backward pass adds to this process at most."""
    images, texts, scale, bias = embeddings(size, torch.float32, width=16)
    ctypes.CDLL(None).malloc_trim(0)  # what the parent freed would be used, and not be seen
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what we hold
    before = _status_mib("VmRSS")
    if kind == "softmax":
        loss, _ = info_nce(images, texts, scale, ContrastiveConfig())
    else:
        loss = sigmoid_loss(images, texts, scale, bias)
    loss.backward()
    return _status_mib("VmHWM") - before


def _status_mib(name: str) -> float:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_memory_is_linear_in_the_batch(run_ranks, kind):
    small, large = (run_ranks(peak_mib, kind, size, ranks=1)[0] for size in (4096, 8192))
    whole_matrix_mib = 8192**2 * 4 / 2**20
    assert large < 2.3 * small
    assert large < 0.3 * whole_matrix_mib
