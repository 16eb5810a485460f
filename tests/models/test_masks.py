"""Who sees whom, cell by cell, and what follows from it."""

import torch

from tests.support.tiny_models import pixels, texts, three_tasks, tiny_config
from vlfoundry.models.internvl.model import build
from vlfoundry.models.qllama.masks import contrastive_blocked, generative_blocked, matching_blocked

# Two queries, three text tokens of which the last is padding; rows look at columns; 1: sees.
TABLES = {
    matching_blocked: """
        1 1 1 1 0
        1 1 1 1 0
        1 1 1 1 0
        1 1 1 1 0
        1 1 1 1 0""",
    contrastive_blocked: """
        1 1 0 0 0
        1 1 0 0 0
        0 0 1 0 0
        0 0 1 1 0
        0 0 1 1 0""",
    generative_blocked: """
        1 1 0 0 0
        1 1 0 0 0
        1 1 1 0 0
        1 1 1 1 0
        1 1 1 1 0""",
}


def test_truth_tables():
    text_mask = torch.tensor([[1, 1, 0]])
    for make, table in TABLES.items():
        sees = [[int(cell) for cell in row.split()] for row in table.split("\n") if row.strip()]
        assert (~make(2, text_mask))[0, 0].int().tolist() == sees, make.__name__


def test_contrastive_rows_equal_the_towers_run_alone():
    model = build("internvl_g", tiny_config(), seed=1).eval()
    images, (ids, mask) = pixels(3), texts(3)
    with torch.no_grad():
        out = three_tasks(model, images, *[(ids, mask)] * 3)
        vision = model.vision(images)
        alone = torch.nn.functional.normalize(
            model.clip_projector2(model.text.encode_image(vision)), dim=-1
        )
        assert torch.allclose(out["image"], alone, atol=1e-5)
        assert torch.allclose(out["text"], model.embed_texts(ids, mask), atol=1e-5)


def test_matching_sees_the_text_and_the_image():
    model = build("internvl_g", tiny_config(), seed=1).eval()
    images, first, second = pixels(2), texts(2, seed=1), texts(2, seed=2)
    with torch.no_grad():
        base = three_tasks(model, images, first, first, first)["match"]
        other_text = three_tasks(model, images, second, first, first)["match"]
        other_image = three_tasks(model, pixels(2, seed=9), first, first, first)["match"]
    assert not torch.allclose(base, other_text, atol=1e-4)
    assert not torch.allclose(base, other_image, atol=1e-4)


def test_unknown_tokens_inside_a_text_are_masked():
    """Id 0 inside a text is padding to the official code, so the causal shortcut must not run."""
    model = build("internvl_c", tiny_config(), seed=1).eval()
    ids, _ = texts(1, length=6)
    ids = torch.tensor([[1, 20, 0, 30, 40, 2]])
    mask = (ids > 0).long()
    changed = model.text.encode(torch.tensor([[1, 20, 33, 30, 40, 2]]), mask)
    with torch.no_grad():
        assert torch.allclose(model.text.encode(ids, mask)[:, 3:], changed[:, 3:], atol=1e-5)
