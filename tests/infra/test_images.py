"""Pictures: exact compositing, features that recognise, repeatable augmentation."""

import io

import numpy as np
import pytest
from PIL import Image

from vlfoundry.infra.core.errors import DataError
from vlfoundry.infra.data.images.bulk import (
    AugmentConfig,
    augment,
    composite,
    decode_rgba,
    encode_webp,
    hog_features,
    uniforms,
)
from vlfoundry.infra.data.sources.concept_set import read_artwork


@pytest.fixture(scope="module")
def drawings():
    return np.stack([decode_rgba(d.image_bytes) for d in read_artwork("data/fxemoji.parquet")[:32]])


def test_lossless_storage_gives_every_pixel_back():
    rgba = np.random.default_rng(0).integers(0, 256, (64, 64, 4), np.uint8)
    assert np.array_equal(decode_rgba(encode_webp(rgba)), rgba)


def test_any_picture_can_be_decoded():
    buffer = io.BytesIO()
    Image.new("P", (10, 20), 3).save(buffer, "PNG")
    assert decode_rgba(buffer.getvalue()).shape == (20, 10, 4)
    assert decode_rgba(buffer.getvalue(), 64).shape == (64, 64, 4)
    with pytest.raises(DataError, match="cannot be read as a picture"):
        decode_rgba(b"no picture")


def test_compositing_is_exact():
    pixels = np.array([[[[200, 100, 0, 255], [200, 100, 0, 0], [200, 100, 0, 51]]]], np.uint8)
    expected = [[200, 100, 0], [255, 255, 255], [244, 224, 204]]
    assert composite(pixels)[0, 0].tolist() == expected
    assert composite(pixels, (0, 0, 0))[0, 0].tolist() == [[200, 100, 0], [0, 0, 0], [40, 20, 0]]


def test_features_are_unit_vectors_that_ignore_place_and_size(drawings):
    features = hog_features(drawings)
    assert features.dtype == np.float32
    assert features.shape == (32, 704)
    assert np.allclose(np.linalg.norm(features, axis=1), 1.0, atol=1e-5)
    small = np.zeros_like(drawings[0])
    small[20:52, 24:56] = np.asarray(Image.fromarray(drawings[0]).resize((32, 32)))
    likeness = hog_features(small[None]) @ features.T
    assert likeness.argmax() == 0
    assert likeness[0, 0] > 0.8


def test_nearest_pictures_recognise_another_vendors_drawings():
    """The reference that a trained model is compared with must itself be far above chance."""
    train = {d.concept: d.image_bytes for d in read_artwork("data/noto.parquet")}
    test = {d.concept: d.image_bytes for d in read_artwork("data/twemoji.parquet")}
    shared = sorted(set(train) & set(test))[::16]
    a, b = (hog_features(np.stack([decode_rgba(d[c]) for c in shared])) for d in (train, test))
    accuracy = ((b @ a.T).argmax(axis=1) == np.arange(len(shared))).mean()
    assert len(shared) > 90
    assert accuracy > 0.5


def test_random_numbers_depend_on_the_place_alone():
    many = uniforms(3, [(e, i) for e in range(20) for i in range(500)], 4)
    assert np.array_equal(uniforms(3, [(7, 11)], 4)[0], many[7 * 500 + 11])
    assert abs(many.mean() - 0.5) < 0.005
    assert abs(many.std() - 12**-0.5) < 0.005
    assert len(np.unique(many)) == many.size
    assert abs(np.corrcoef(many[:-1, 0], many[1:, 0])[0, 1]) < 0.03
    assert not np.array_equal(uniforms(4, [(7, 11)], 4)[0], many[7 * 500 + 11])


def test_augmentation_is_a_function_of_seed_epoch_and_index(drawings):
    places = [(1, i) for i in range(32)]
    batch = augment(drawings, 5, places)
    assert batch.shape == (32, 3, 64, 64)
    assert batch.min() >= 0.0
    assert batch.max() <= 1.0
    for i in (0, 9, 31):  # alone, or in another batch on another rank: the same bits
        assert batch[i].equal(augment(drawings[i : i + 1], 5, places[i : i + 1])[0])
    assert batch[8:16].equal(augment(drawings[8:16], 5, places[8:16]))
    assert not batch[0].equal(augment(drawings[:1], 5, [(2, 0)])[0])
    assert not batch[0].equal(augment(drawings[:1], 6, places[:1])[0])


def test_without_variation_augmentation_is_compositing(drawings):
    still = AugmentConfig(
        scale_min=1.0, scale_max=1.0, shift=0.0, stretch=0.0, rotate_degrees=0.0,
        brightness=0.0, contrast=0.0, saturation=0.0, white_share=1.0,
    )  # fmt: skip
    result = augment(drawings, 0, [(0, i) for i in range(32)], still).numpy()
    expected = composite(drawings).transpose(0, 3, 1, 2) / 255.0
    assert np.abs(result - expected).max() < 1.5 / 255


def test_half_of_the_grounds_are_white():
    empty = np.zeros((400, 64, 64, 4), np.uint8)
    corner = augment(empty, 0, [(0, i) for i in range(400)])[:, :, 0, 0]
    share = (corner == 1.0).all(dim=1).float().mean()
    assert 0.42 < share < 0.58


def test_augmentation_can_change_the_size(drawings):
    result = augment(drawings[:2], 0, [(0, 0), (0, 1)], size_px=32)
    assert result.shape == (2, 3, 32, 32)
