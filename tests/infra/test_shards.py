"""Shards: equal samples give equal bytes, and any tar reader understands them."""

import io
import json
import tarfile

import pytest

from vlfoundry.infra.core.errors import DataError
from vlfoundry.infra.data.shards.write import Sample, index_shards, parse_index, write_shards


def samples(count: int = 10) -> list[Sample]:
    return [
        Sample(key=f"{i:08d}", image_bytes=bytes([i]) * (500 + 37 * i), meta={"caption": f"猫 {i}"})
        for i in range(count)
    ]


def test_equal_samples_give_equal_bytes(tmp_path):
    write_shards(tmp_path / "a", samples(), samples_per_shard=4)
    write_shards(tmp_path / "b", samples(), samples_per_shard=4)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["00000.tar", "00001.tar", "00002.tar", "index.json"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_tar_reader_finds_pairs_without_times(tmp_path):
    write_shards(tmp_path, samples(), samples_per_shard=100)
    with tarfile.open(fileobj=io.BytesIO((tmp_path / "00000.tar").read_bytes())) as archive:
        members = archive.getmembers()
        assert {member.mtime for member in members} == {0}
        assert [m.name for m in members[:2]] == ["00000000.webp", "00000000.json"]
        for i, sample in enumerate(samples()):
            assert archive.extractfile(members[2 * i]).read() == sample.image_bytes
            assert json.load(archive.extractfile(members[2 * i + 1])) == sample.meta


def test_the_index_can_be_rebuilt_from_the_tars(tmp_path):
    written = write_shards(tmp_path, samples(), samples_per_shard=4)
    assert index_shards(tmp_path) == written
    assert parse_index((tmp_path / "index.json").read_text("utf-8"), "here") == written


def test_older_shards_do_not_stay_behind(tmp_path):
    write_shards(tmp_path, samples(10), samples_per_shard=2)
    write_shards(tmp_path, samples(3), samples_per_shard=2)
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == ["00000.tar", "00001.tar"]


@pytest.mark.parametrize("key", ["a.b", "a/b", "", "x" * 91])
def test_keys_that_a_reader_would_split_are_refused(tmp_path, key):
    bad = Sample(key=key, image_bytes=b"x", meta={})
    with pytest.raises(DataError, match="sample key"):
        write_shards(tmp_path, [bad])


def test_a_key_twice_is_refused(tmp_path):
    with pytest.raises(DataError, match="occurs twice"):
        write_shards(tmp_path, [samples(1)[0], samples(1)[0]])


def test_a_foreign_index_is_refused():
    with pytest.raises(DataError, match=r"expected 'vlfoundry\.shards\.v2'"):
        parse_index('{"format": "other"}', "index.json")
    with pytest.raises(DataError, match="is no JSON"):
        parse_index("{", "index.json")
