"""What the filters measure: effective size, print, language, likeness."""

import numpy as np
import pytest

from vlfoundry.infra.data.images.bulk import decode_rgba
from vlfoundry.infra.data.images.phash import colour_grid, connected, hamming, near, perceptual_hash
from vlfoundry.infra.data.rules.language import tag_probability
from vlfoundry.infra.data.rules.quality import effective_side, text_strokes
from vlfoundry.infra.data.sources.concept_set import read_artwork, read_concepts
from vlfoundry.infra.data.synthetic import noise


@pytest.fixture(scope="module")
def drawings():
    drawn = read_artwork("data/emojitwo.parquet")[:240:3]
    return np.stack([decode_rgba(drawing.image_bytes) for drawing in drawn])


def test_enlarged_pictures_are_measured_near_their_true_side(drawings):
    rng = np.random.default_rng(0)
    changed = [noise.low_resolution(drawing, rng) for drawing in drawings]
    small = np.stack([picture for picture, _ in changed])
    assert {side for _, side in changed} <= set(range(16, 25))
    assert (effective_side(small) < 32).all()
    assert (effective_side(drawings) >= 32).mean() > 0.95


def test_print_is_told_from_drawings(drawings):
    rng = np.random.default_rng(0)
    printed = np.stack([noise.overlay_text(drawing, rng) for drawing in drawings])
    assert (text_strokes(printed) > 12).mean() > 0.85
    assert (text_strokes(drawings) > 12).mean() < 0.08


def test_language_is_learnt_from_tags_that_are_mostly_right():
    languages = ("en", "zh", "ja", "ar", "it")
    concepts = list(read_concepts("data").values())[::4]
    texts = [(c.names[lang], lang) for c in concepts for lang in languages] * 3
    rng = np.random.default_rng(0)
    tags = [lang for _, lang in texts]
    wrong = np.flatnonzero(rng.random(len(texts)) < 0.05)
    for i in wrong:
        tags[i] = languages[(languages.index(tags[i]) + int(rng.integers(1, 5))) % 5]
    probability, best = tag_probability([text for text, _ in texts], tags)
    rejected = np.flatnonzero(probability < 0.2)
    assert np.isin(wrong, rejected).mean() > 0.9
    assert np.isin(rejected, wrong).mean() > 0.75
    assert np.mean([best[i] == texts[i][1] for i in wrong]) > 0.9


def test_a_text_that_two_languages_share_is_left_alone():
    concepts = list(read_concepts("data").values())
    texts = [(c.names[lang], lang) for c in concepts for lang in ("en", "it")] * 3
    probability, _ = tag_probability(*zip(*texts, strict=True))
    shared = {c.names["en"] for c in concepts if c.names["en"] == c.names["it"]}
    kept = [p > 0.2 for p, (text, _) in zip(probability, texts, strict=True) if text in shared]
    assert len(kept) > 100
    assert np.mean(kept) > 0.8


def test_copies_are_near_and_other_drawings_are_not(drawings):
    rng = np.random.default_rng(0)
    copies = np.stack([decode_rgba(noise.reencode(drawing, rng)) for drawing in drawings])
    prints = [(perceptual_hash(p), colour_grid(p)) for p in (copies, drawings)]
    i, j = near(*prints[0], *prints[1], 14, 3.0)
    assert (np.isin(np.arange(len(drawings)), i[i == j])).mean() > 0.95
    assert (i != j).mean() < 0.05
    unrelated = hamming(prints[1][0][:-1], prints[1][0][1:])
    assert 24 < np.median(unrelated) < 40


def test_colour_decides_where_the_hash_is_blind():
    red, blue = np.zeros((2, 64, 64, 4), np.uint8)
    red[16:48, 16:40], blue[16:48, 16:40] = (200, 0, 0, 255), (0, 0, 200, 255)
    pair = np.stack([red, blue])
    hashes, colours = perceptual_hash(pair), colour_grid(pair)
    assert hamming(hashes[0], hashes[1]) <= 6
    i, _ = near(hashes[:1], colours[:1], hashes[1:], colours[1:], 6, 12.0)
    assert not len(i)


def test_a_hash_is_none_of_the_processors_rounding():
    """Of a drawing that is its own mirror image half of the coefficients are zero."""
    drawing = np.full((1, 64, 64, 3), 255, np.uint8)
    drawing[:, 10:40, 8:56], drawing[:, 20:30, 24:40] = (200, 30, 90), (7, 99, 201)
    assert np.array_equal(drawing, drawing[:, :, ::-1])
    found = perceptual_hash(drawing)
    assert found == perceptual_hash(drawing[:, :, ::-1])
    brighter = perceptual_hash(np.clip(drawing.astype(np.int64) + 1, 0, 255).astype(np.uint8))
    assert hamming(found, brighter) <= 2


def test_links_make_groups():
    group = connected(7, np.array([5, 1, 3]), np.array([6, 5, 4]))
    assert group.tolist() == [0, 1, 2, 3, 3, 1, 1]
