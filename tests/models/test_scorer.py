"""The scorer's own optimizer is AdamW, and its loss is InfoNCE."""

import math

import pytest
import torch

from vlfoundry.models.scorer.adamw import AdamW
from vlfoundry.models.scorer.model import Scorer, ScorerConfig


def test_the_small_adamw_is_torchs():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(5, 3)) for _ in range(2))
    reference = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1, betas=(0.9, 0.98))
    small = AdamW([ours], weight_decay=0.1)
    for _ in range(20):
        target = torch.randn(5, 3)
        for parameter in (ours, theirs):
            ((parameter - target) ** 2).sum().backward()
        small.step([1e-2])
        reference.step()
        reference.zero_grad()
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_copies_in_a_batch_are_no_negatives():
    torch.manual_seed(0)
    model = Scorer(ScorerConfig(hidden=8, width=4, token_width=8), features=6, tokens=10).eval()
    images = model.embed_images(torch.randn(2, 6))
    texts = model.embed_texts(torch.arange(6), torch.tensor([0, 3]))
    nothing, everything = torch.zeros(2, 2, dtype=torch.bool), ~torch.eye(2, dtype=torch.bool)
    assert model.loss(images, texts, everything).item() == pytest.approx(0.0, abs=1e-6)
    assert model.loss(images, texts, nothing).item() == pytest.approx(math.log(2), rel=0.5)
    assert images.norm(dim=1).tolist() == pytest.approx([1.0, 1.0])
