"""Shards in S3: a real server on this machine, spoken to over HTTP."""

import os

import fsspec
import pytest
from moto.server import ThreadedMotoServer

from vlfoundry.infra.core.errors import DataError
from vlfoundry.infra.data.shards.prefetch import Prefetch
from vlfoundry.infra.data.shards.read import ShardSet
from vlfoundry.infra.data.shards.write import Sample, write_shards

COUNT = 40
BUCKET = "vlfoundry-test"


def make() -> list[Sample]:
    return [
        Sample(key=f"{i:04d}", image_bytes=bytes([i]) * (3000 + i), meta={"row": i})
        for i in range(COUNT)
    ]


@pytest.fixture(scope="module")
def options():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield {
        "key": "test",
        "secret": "test",
        "endpoint_url": f"http://{host}:{port}",
        "client_kwargs": {"region_name": "eu-west-1"},
    }
    server.stop()


@pytest.fixture(scope="module")
def remote(options, tmp_path_factory) -> ShardSet:
    folder = tmp_path_factory.mktemp("local")
    write_shards(folder, make(), samples_per_shard=9)
    s3 = fsspec.filesystem("s3", **options)
    s3.mkdir(BUCKET)
    for name in os.listdir(folder):
        s3.pipe_file(f"{BUCKET}/set/{name}", (folder / name).read_bytes())
    return ShardSet(f"s3://{BUCKET}/set", options)


def test_samples_anywhere_and_in_order(remote):
    order = [39, 0, 17, 17, 8]
    assert remote.samples(order) == [make()[i] for i in order]
    assert remote[21] == make()[21]
    assert remote.image_bytes(5) == make()[5].image_bytes
    assert remote.meta(5) == {"row": 5}
    assert list(remote) == make()


def test_workers_read_by_themselves(remote):
    """A file system that was used before the fork cannot be used after it."""
    assert remote[3] == make()[3]
    batches = Prefetch(lambda step: remote.samples([step, 39 - step]), steps=6, workers=2)
    for step in range(6):
        assert batches(step) == [make()[step], make()[39 - step]]


def test_a_shard_that_was_replaced_is_refused(remote, options):
    s3 = fsspec.filesystem("s3", **options)
    whole = s3.cat_file(f"{BUCKET}/set/00002.tar")
    s3.pipe_file(f"{BUCKET}/set/00002.tar", whole[:-512])
    with pytest.raises(DataError, match=r"00002\.tar has \d+ bytes, its index says"):
        ShardSet(remote.folder, options)[20]
    s3.rm(f"{BUCKET}/set/00002.tar")
    s3.invalidate_cache()
    with pytest.raises(DataError, match=r"a shard of s3://vlfoundry-test/set is missing"):
        ShardSet(remote.folder, options)[20]
    s3.pipe_file(f"{BUCKET}/set/00002.tar", whole)


def test_a_bucket_without_shards_is_refused(options):
    with pytest.raises(DataError, match=r"index\.json does not exist"):
        ShardSet(f"s3://{BUCKET}/elsewhere", options)


def test_a_data_set_under_evaluation_may_be_there(options, monkeypatch, tmp_path):
    from tests.support.fake_models import write_concept_set
    from vlfoundry.eval.datasets.folders import read_folder

    s3 = fsspec.filesystem("s3", **options)
    s3.mkdir("own-data")
    s3.put(f"{write_concept_set(tmp_path, count=3)}/", "own-data/set/", recursive=True)
    monkeypatch.setenv("AWS_ENDPOINT_URL", options["endpoint_url"])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", options["key"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", options["secret"])
    data = read_folder("s3://own-data/set")
    assert data.facts() == read_folder(tmp_path).facts() | {"folder": "set"}
    with pytest.raises(DataError, match="s3://no-such-bucket/x"):
        read_folder("s3://no-such-bucket/x")
