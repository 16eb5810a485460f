"""Mixtures: proportions that hold in every window, and a place that is known by its number."""

import itertools
import time
from collections import Counter

import pytest

from vlfoundry.infra.core.errors import ConfigError
from vlfoundry.infra.data.shards.mixture import WINDOW, Mixture

LENGTHS = {"coco": 567, "svit": 426, "vsr": 8}


def mixture(weights=None, seed: int = 3, **lengths: int) -> Mixture:
    return Mixture(lengths or LENGTHS, weights, seed=seed)


def test_every_window_has_the_same_proportions():
    mixed = mixture({"coco": 5, "svit": 2.5, "vsr": 0.5})
    for window in (0, 1, 12345):
        seen = Counter(place.source for place in mixed.indices(window * WINDOW, WINDOW))
        assert seen == mixed.counts
    for name, share in (("coco", 5 / 8), ("svit", 2.5 / 8), ("vsr", 0.5 / 8)):
        assert abs(mixed.counts[name] - WINDOW * share) < 1
    assert sum(mixed.counts.values()) == WINDOW


def test_rounding_goes_by_the_largest_remainder():
    mixed = mixture({"a": 1, "b": 1, "c": 1}, a=5, b=5, c=5)
    assert sorted(mixed.counts.values()) == [WINDOW // 3, WINDOW // 3, WINDOW // 3 + 1]
    near = mixture({"a": 10.9, "b": WINDOW - 10.9}, a=5, b=5)
    assert near.counts == {"a": 11, "b": WINDOW - 11}


def test_without_weights_the_square_roots_of_the_lengths_decide():
    counts = mixture(a=100, b=400, c=900).counts
    assert counts["b"] == pytest.approx(2 * counts["a"], abs=2)
    assert counts["c"] == pytest.approx(3 * counts["a"], abs=2)


def test_each_source_has_epochs_of_its_own():
    places = mixture().indices(0, WINDOW + 5000)
    for name, length in LENGTHS.items():
        stream = [(place.epoch, place.index) for place in places if place.source == name]
        assert [epoch for epoch, _ in stream] == [i // length for i in range(len(stream))]
        epochs = len(stream) // length
        seen = Counter(stream[: epochs * length])
        assert seen == Counter((e, i) for e in range(epochs) for i in range(length))


def test_sources_of_one_length_have_different_orders():
    places = mixture(a=50, b=50).indices(0, 1000)
    orders = [[p.index for p in places if p.source == name][:50] for name in "ab"]
    assert orders[0] != orders[1]


def test_sources_come_in_no_fixed_order():
    first, second = (
        [place.source for place in mixture(a=50, b=50).indices(start, 1000)]
        for start in (0, WINDOW)
    )
    assert first != second
    runs = sum(a != b for a, b in itertools.pairwise(first))
    assert 400 < runs < 600


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_resuming_anywhere_on_any_number_of_ranks(ranks):
    batch, mixed = 24, mixture()
    whole = mixed.indices(WINDOW - 100, 10 * batch)
    for step in (0, 3, 9):
        start = (WINDOW - 100) // batch + step
        got = [
            p for rank in range(ranks) for p in mixture().rank_indices(start, batch, rank, ranks)
        ]
        offset = start * batch - (WINDOW - 100)
        if offset >= 0:
            assert got == whole[offset : offset + batch]
        assert got == mixed.indices(start * batch, batch)


def test_another_seed_is_another_mixture():
    assert mixture(seed=1).indices(0, 50) != mixture(seed=2).indices(0, 50)


def test_resumes_in_under_10_ms():
    took = []
    for _ in range(5):
        begun = time.process_time()
        Mixture({"a": 10**9, "b": 4000, "c": 10**6}, seed=1).indices(10**11 + 5, 64)
        took.append(time.process_time() - begun)
    assert min(took) < 0.010


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"coco": 1}, r"weights for \['coco'\], expected one for each of its sources \['coco', '"),
        ({"coco": 1, "svit": 1, "vsr": 0}, r"\{'vsr': 0\}, expected more than 0"),
        ({"coco": 1, "svit": 1, "vsr": 1e-9}, r"\['vsr'\] would come less than once in"),
    ],
)
def test_weights_that_cannot_be_kept_are_refused(weights, message):
    with pytest.raises(ConfigError, match=message):
        mixture(weights)
