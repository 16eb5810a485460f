"""Pictures with their captions: a sample knows nothing of ranks, and has captions of its own."""

import numpy as np
import pytest

from vlfoundry.infra.core.errors import DataError
from vlfoundry.infra.data.images.bulk import encode_webp
from vlfoundry.infra.data.shards.pairs import PairStream
from vlfoundry.infra.data.shards.read import ShardSet
from vlfoundry.infra.data.shards.write import Sample, write_shards

SIDE = 8
CAPTIONS = {0: 5, 1: 1, 2: 2, 3: 4, 4: 3, 5: 5, 6: 2}
"""captions of each picture"""
LEVELS = {picture: 10 + 30 * picture for picture in CAPTIONS}
"""grey level of each picture, by which it is recognised"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    """Samples of one picture do not stand together."""
    folder = tmp_path_factory.mktemp("pairs")
    facts = [(k, picture) for picture, count in CAPTIONS.items() for k in range(count)]
    samples = [
        Sample(
            key=f"{picture}-{k}",
            image_bytes=encode_webp(np.full((SIDE, SIDE, 4), LEVELS[picture], np.uint8)),
            meta={"caption": f"{picture}-{k}", "picture": picture},
        )
        for k, picture in sorted(facts)
    ]
    write_shards(folder, samples, samples_per_shard=6)
    return ShardSet(folder)


def stream(shards: ShardSet, captions: int = 1, seed: int = 4) -> PairStream:
    return PairStream(shards, seed=seed, size_px=SIDE, captions=captions)


def epoch_captions(shards: ShardSet, epoch: int, captions: int = 1) -> dict[int, list[str]]:
    """Captions drawn for each picture in one epoch."""
    batch = stream(shards, captions).take(epoch, len(CAPTIONS), 0, 1)
    assert {e for e, _ in batch.positions} == {epoch}
    return {
        column[0]["picture"]: [meta["caption"] for meta in column]
        for column in zip(*batch.metas, strict=True)
    }


def test_a_picture_that_samples_share_is_one_sample(shards: ShardSet) -> None:
    assert len(shards) == sum(CAPTIONS.values())
    assert len(stream(shards)) == len(CAPTIONS)
    assert set(epoch_captions(shards, 0)) == set(CAPTIONS)


def test_picture_and_captions_belong_together(shards: ShardSet) -> None:
    batch = stream(shards, captions=3).take(0, len(CAPTIONS), 0, 1)
    assert batch.rgba.shape == (len(CAPTIONS), SIDE, SIDE, 4)
    for metas in batch.metas:
        assert [LEVELS[meta["picture"]] for meta in metas] == batch.rgba[:, 0, 0, 0].tolist()
    first = [meta["caption"] for meta in batch.metas[0]]
    assert batch.captions[: len(CAPTIONS)] == first
    assert len(batch.captions) == 3 * len(CAPTIONS)


@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_the_ranks_share_the_batch_that_one_rank_has(shards: ShardSet, ranks: int) -> None:
    """Also over the end of an epoch: batches of six, seven pictures."""
    pairs = stream(shards, captions=2)
    for step in range(5):
        whole = pairs.take(step, 6, 0, 1)
        parts = [stream(shards, captions=2).take(step, 6, rank, ranks) for rank in range(ranks)]
        assert [p for part in parts for p in part.positions] == whole.positions
        assert np.array_equal(np.concatenate([part.rgba for part in parts]), whole.rgba)
        for k in range(2):
            assert [meta for part in parts for meta in part.metas[k]] == whole.metas[k]


def test_a_batch_that_ranks_cannot_share_is_refused(shards: ShardSet) -> None:
    with pytest.raises(DataError, match="6 samples cannot be split over 4 ranks"):
        stream(shards).take(0, 6, 0, 4)


def test_captions_are_drawn_anew_in_each_epoch(shards: ShardSet) -> None:
    epochs = [epoch_captions(shards, epoch) for epoch in range(40)]
    assert epochs[0] == epoch_captions(shards, 0)
    for picture, count in CAPTIONS.items():
        drawn = {epoch[picture][0] for epoch in epochs}
        assert drawn == {f"{picture}-{k}" for k in range(count)}


def test_another_seed_draws_other_captions(shards: ShardSet) -> None:
    def drawn(seed: int) -> set[str]:
        return {
            c for step in range(3) for c in stream(shards, 1, seed).take(step, 7, 0, 1).captions
        }

    assert drawn(4) != drawn(5)


def test_captions_of_one_sample_differ_and_start_again_if_too_few(shards: ShardSet) -> None:
    for epoch in range(5):
        for picture, drawn in epoch_captions(shards, epoch, captions=4).items():
            count = min(4, CAPTIONS[picture])
            assert len(set(drawn)) == count
            assert drawn == (drawn[:count] * 4)[:4]


@pytest.mark.parametrize("kept", [0, 3], ids=["none", "some"])
def test_more_pictures_than_memory_are_the_same_batches(shards: ShardSet, kept: int) -> None:
    few = PairStream(shards, seed=4, size_px=SIDE, captions=2, keep_bytes=kept * 4 * SIDE**2)
    for step in range(5):
        expected, got = stream(shards, 2).take(step, 6, 0, 1), few.take(step, 6, 0, 1)
        assert np.array_equal(got.rgba, expected.rgba)
        assert got.metas == expected.metas


def test_only_what_a_step_needs_is_read(shards: ShardSet, monkeypatch) -> None:
    asked: list[int] = []
    real = ShardSet.images
    monkeypatch.setattr(ShardSet, "images", lambda self, i: asked.extend(i) or real(self, i))
    pairs = stream(shards)
    for step in range(len(CAPTIONS)):
        pairs.take(step, 1, 0, 1)
        assert len(asked) == step + 1
    pairs.take(0, len(CAPTIONS), 0, 1)
    assert len(asked) == len(CAPTIONS)  # they are all known


def test_a_picture_that_cannot_be_decoded_is_named(tmp_path) -> None:
    samples = [Sample(key="bad", image_bytes=b"no picture", meta={"caption": "x"})]
    write_shards(tmp_path, samples)
    with pytest.raises(DataError, match=r"00000.tar at byte \d+ \(sample 'bad'\)"):
        stream(ShardSet(tmp_path)).take(0, 1, 0, 1)
