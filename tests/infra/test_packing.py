"""Packs: every sample once, within the budget, about equal, and the same wherever they are made."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlfoundry.infra.core.errors import ConfigError, DataError
from vlfoundry.infra.data.shards.packing import PackingConfig, pack

SMALL = PackingConfig(max_tokens=100, max_tiles=6)
SAMPLES = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 3)), min_size=24, max_size=60)
"""at least two to a pack, so that none can lack a sample"""


@settings(max_examples=200, deadline=None)
@given(samples=SAMPLES, multiple=st.sampled_from([1, 2, 3, 4, 8]))
def test_every_sample_once_and_no_pack_too_large(samples, multiple):
    tokens, tiles = [t for t, _ in samples], [n for _, n in samples]
    packs = pack(tokens, tiles, SMALL, multiple=multiple)
    assert sorted(i for members in packs for i in members) == list(range(len(samples)))
    assert len(packs) % multiple == 0
    for members in packs:
        assert members == sorted(members) != []
        assert sum(tokens[i] for i in members) <= SMALL.max_tokens
        assert sum(tiles[i] for i in members) <= SMALL.max_tiles
    assert packs == pack(tokens, tiles, SMALL, multiple=multiple)


def test_packs_are_about_equal():
    packs = pack([50, 40, 30, 20, 10, 10, 10, 10], [1] * 8, SMALL, multiple=2)
    tokens = [50, 40, 30, 20, 10, 10, 10, 10]
    assert [sum(tokens[i] for i in members) for members in packs] == [90, 90]


def test_samples_of_equal_length_are_taken_in_order():
    assert pack([10] * 6, [0] * 6, SMALL, multiple=2) == [[0, 2, 4], [1, 3, 5]]


def test_tiles_bound_a_pack_too():
    assert len(pack([1] * 6, [3] * 6, SMALL)) == 3
    assert len(pack([90, 1, 1], [0, 6, 6], SMALL)) == 2


def test_the_defaults_are_those_of_internvl_2_5():
    assert (PackingConfig().max_tokens, PackingConfig().max_tiles) == (16384, 48)


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(DataError, match=r"sample 1 of the step has 101 tokens and 0 tiles, more"):
        pack([1, 101], [0, 0], SMALL)
    with pytest.raises(DataError, match=r"sample 0 of the step has 1 tokens and 7 tiles, more"):
        pack([1], [7], SMALL)
    with pytest.raises(DataError, match=r"3 samples of a step cannot fill 4 packs; give a step"):
        pack([1, 1, 1], [0, 0, 0], SMALL, multiple=4)
    with pytest.raises(ConfigError, match=r"packing\.max_tiles is 0, expected 1 or more"):
        PackingConfig(max_tiles=0)
