"""Workers: the same batches in the same order, never too many, and none left behind."""

import os
import signal
import time
from collections import Counter

import numpy as np
import psutil
import pytest

from vlfoundry.infra.core.errors import DataError, KilledError
from vlfoundry.infra.data.images.bulk import decode_rgba, encode_webp
from vlfoundry.infra.data.shards.prefetch import DEPTH, Prefetch
from vlfoundry.infra.data.shards.read import SampleStream, ShardSet
from vlfoundry.infra.data.shards.write import Sample, write_shards

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
SAMPLES, BATCH, STEPS = 60, 24, 5
"""two epochs in five steps, whose border lies inside a batch"""


@pytest.fixture(scope="module", autouse=True)
def torch():
    import torch

    torch.set_num_threads(1)  # as in every rank
    return torch


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    folder = tmp_path_factory.mktemp("shards")
    samples = (
        Sample(
            key=f"{i:03d}",
            image_bytes=encode_webp(np.full((8, 8, 4), (i, i, i, 255), np.uint8)),
            meta={"number": i},
        )
        for i in range(SAMPLES)
    )
    write_shards(folder, samples, samples_per_shard=7)
    return ShardSet(folder)


def loader(shards: ShardSet, rank: int, ranks: int):
    """A rank's `batch_at`: places, and the pictures that stand there, decoded."""
    import torch

    order = SampleStream(len(shards), seed=5)

    def batch_at(step: int):
        places = order.rank_indices(step, BATCH, rank, ranks)
        pictures = []
        for (_, i), sample in zip(places, shards.samples([i for _, i in places]), strict=True):
            with shards.named(i):
                pictures.append(decode_rgba(sample.image_bytes))
        return {"places": places, "pictures": torch.from_numpy(np.stack(pictures))}

    return batch_at


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_every_sample_once_an_epoch_with_any_number_of_workers(shards, ranks):
    whole = SampleStream(SAMPLES, seed=5).indices(0, STEPS * BATCH)
    for workers in range(4):
        seen = []
        rank_batches = [
            Prefetch(loader(shards, rank, ranks), steps=STEPS, workers=workers)
            for rank in range(ranks)
        ]
        for step in range(STEPS):
            for batches in rank_batches:
                batch = batches(step)
                seen += batch["places"]
                shown = batch["pictures"][:, 0, 0, 0].tolist()
                assert shown == [index for _, index in batch["places"]]
        assert seen == whole, f"{workers} workers"
        assert Counter(seen) == Counter((e, i) for e in range(2) for i in range(SAMPLES))


@pytest.mark.parametrize("workers", [0, 2])
def test_any_step_may_be_asked_for(shards, workers):
    """A dry run asks for step 0 and then the run asks again; a resumed one begins elsewhere."""
    plain = loader(shards, 0, 1)
    batches = Prefetch(plain, steps=STEPS, workers=workers)
    for step in (0, 0, 1, 3, 4, 2):
        assert batches(step)["places"] == plain(step)["places"]


def test_pictures_come_as_bytes_in_shared_memory(shards, torch):
    pictures = Prefetch(loader(shards, 0, 1), steps=STEPS, workers=1)(0)["pictures"]
    assert pictures.dtype == torch.uint8
    assert pictures.is_shared()


def test_workers_do_not_run_ahead_without_end(tmp_path):
    def batch_at(step: int) -> int:
        (tmp_path / str(step)).touch()
        return step

    batches = Prefetch(batch_at, steps=1000, workers=2)
    assert batches(0) == 0
    time.sleep(0.5)
    assert len(list(tmp_path.iterdir())) <= 1 + 2 * DEPTH


def test_a_run_draws_the_same_numbers_with_and_without_workers(shards, torch):
    drawn = []
    for workers in (0, 2):
        torch.manual_seed(4)
        Prefetch(loader(shards, 0, 1), steps=STEPS, workers=workers)(0)
        drawn.append(torch.rand(3).tolist())
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_sample_is_named(shards, tmp_path, workers, new_children):
    for path in sorted(os.listdir(shards.folder)):
        (tmp_path / path).write_bytes((np.fromfile(f"{shards.folder}/{path}", np.uint8)).tobytes())
    victim = tmp_path / "00002.tar"
    data = bytearray(victim.read_bytes())
    data[512:540] = bytes(28)  # the picture of sample 14, the first of its shard
    victim.write_bytes(data)
    batches = Prefetch(loader(ShardSet(tmp_path), 0, 1), steps=STEPS, workers=workers)

    with pytest.raises(DataError, match=r"00002\.tar .*cannot be read as a picture"):
        list(map(batches, range(STEPS)))
    assert new_children() == []


def test_another_mistake_keeps_its_traceback(new_children):
    def batch_at(step: int) -> int:
        return {}[step]

    with pytest.raises(KeyError, match=r"return \{\}"):
        Prefetch(batch_at, steps=3, workers=1)(0)
    assert new_children() == []


def test_a_worker_that_is_killed_is_an_error(new_children):
    batches = Prefetch(lambda _: os.kill(os.getpid(), signal.SIGKILL), steps=3, workers=1)
    with pytest.raises(KilledError, match=r"worker .* was killed by SIGKILL \(out of memory\?\)"):
        batches(0)
    assert new_children() == []


def test_a_worker_that_is_killed_while_nobody_waits_for_it(new_children):
    """Not in the middle of whatever this process does, and within 10 s of the next batch."""
    batches = Prefetch(lambda step: time.sleep(0.1 * step) or step, steps=100, workers=1)
    batches(0)
    os.kill(new_children()[0].pid, signal.SIGKILL)
    time.sleep(0.3)
    began = time.monotonic()
    with pytest.raises(KilledError, match="was killed by SIGKILL"):
        list(map(batches, range(1, 10)))
    assert time.monotonic() - began < 10
    assert new_children() == []


def test_no_worker_outlives_a_process_that_is_killed():
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        batches = Prefetch(lambda step: step, steps=1000, workers=2)
        batches(0)
        os.write(write_end, b".")
        time.sleep(60)
        os._exit(1)
    assert os.read(read_end, 1) == b"."
    workers = psutil.Process(pid).children(recursive=True)
    assert len(workers) == 2
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    _, alive = psutil.wait_procs(workers, timeout=3)
    assert not alive


def test_a_request_to_stop_is_left_to_the_rank(shards, new_children):
    """Ctrl-C reaches the whole process group; the workers go on serving the last steps."""
    batches = Prefetch(loader(shards, 0, 1), steps=STEPS, workers=2)
    batches(0)
    for worker in new_children():
        worker.send_signal(signal.SIGINT)
    assert [len(batches(step)["places"]) for step in range(1, STEPS)] == [BATCH] * (STEPS - 1)
