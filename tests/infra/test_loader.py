"""The loader: any sample at once, from anywhere, in an order that knows nothing of ranks."""

import pickle

import fsspec
import pytest

from infra.errors import DataError
from infra.loader import SampleStream, ShardSet, global_order
from infra.shards import Sample, write_shards

COUNT = 23


def make(count: int = COUNT) -> list[Sample]:
    return [
        Sample(key=f"{i:04d}", image_bytes=bytes([i]) * (40 + i), meta={"row": i, "lang": "ja"})
        for i in range(count)
    ]


@pytest.fixture
def folder(tmp_path):
    write_shards(tmp_path / "shards", make(), samples_per_shard=5)
    return tmp_path / "shards"


def test_random_access_gives_what_was_written(folder):
    shards = ShardSet(folder)
    assert len(shards) == COUNT
    for i in (22, 0, 5, 4, 17):
        assert shards[i] == make()[i]
        assert shards.image_bytes(i) == make()[i].image_bytes
        assert shards.meta(i) == make()[i].meta
    with pytest.raises(IndexError):
        shards[COUNT]
    assert [sample.key for sample in shards] == [sample.key for sample in make()]


def test_remote_folders_are_read_by_ranges(folder):
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe_file(f"/loader-test/{path.name}", path.read_bytes())
    remote = ShardSet("memory://loader-test")
    assert [remote[i] for i in (7, 22, 0)] == [make()[i] for i in (7, 22, 0)]
    assert remote.fingerprint == ShardSet(folder).fingerprint


def test_the_fingerprint_follows_the_samples(folder, tmp_path):
    write_shards(tmp_path / "other", make()[::-1], samples_per_shard=5)
    assert ShardSet(folder).fingerprint != ShardSet(tmp_path / "other").fingerprint


def test_a_shard_set_survives_pickling_after_use(folder):
    shards = ShardSet(folder)
    assert shards[3] == make()[3]
    assert pickle.loads(pickle.dumps(shards))[9] == make()[9]


def test_a_cut_shard_is_refused_by_name(folder):
    path = folder / "00001.tar"
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(DataError, match=r"00001\.tar has \d+ bytes, its index says"):
        ShardSet(folder)[6]
    assert ShardSet(folder)[0] == make()[0]


def test_a_folder_without_an_index_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"index\.json does not exist"):
        ShardSet(tmp_path)


def test_orders_are_permutations_that_differ_by_seed_and_epoch():
    orders = [global_order(100, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(100))
    assert len({order.tobytes() for order in orders}) == 4


def test_this_order_is_pinned():
    """A library that changed its permutation would silently change every run."""
    assert global_order(8, 0, 0).tolist() == [5, 0, 6, 1, 7, 2, 4, 3]


def test_a_stream_shows_every_sample_once_an_epoch():
    stream = SampleStream(COUNT, seed=3)
    positions = stream.indices(0, 3 * COUNT)
    for epoch in range(3):
        seen = [index for e, index in positions if e == epoch]
        assert sorted(seen) == list(range(COUNT))


def test_resuming_anywhere_gives_the_same_samples():
    whole = SampleStream(COUNT, seed=3).indices(0, 200)
    for start in (0, 1, 57, 180):
        assert SampleStream(COUNT, seed=3).indices(start, 20) == whole[start : start + 20]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_global_batch_does_not_depend_on_the_number_of_ranks(ranks):
    stream = SampleStream(COUNT, seed=5)
    for step in (0, 2, 7):  # 23 samples: batches of 16 cross the end of an epoch
        parts = [stream.rank_indices(step, 16, rank, ranks) for rank in range(ranks)]
        assert [p for part in parts for p in part] == stream.indices(16 * step, 16)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(DataError, match="expected a multiple of 3"):
        SampleStream(10, 0).rank_indices(0, 16, 0, 3)


def test_reading_costs_the_same_everywhere(folder):
    """No prefix is read: only the shard that holds the sample is opened."""
    for path in folder.glob("*.tar"):
        if path.name != "00004.tar":
            path.unlink()
    assert ShardSet(folder)[22] == make()[22]
