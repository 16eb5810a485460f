"""Reading shards: every sample once, in order and at random, against webdataset on the same files.

Raw is both members as bytes; else the JSON is parsed. Pictures are not decoded: that is the same
work for all. All are timed in turns. To resume is to read samples from three quarters of an epoch
on, all opened anew.
"""

import functools
import importlib.util
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.harness import Case, LeftOut, benchmark

SAMPLES = 4096
PICTURE_BYTES = 32 << 10
SAMPLES_PER_SHARD = 1024
RESUMED = 32
REPETITIONS = 11
PEERS = ("webdataset, raw", "webdataset", "webdataset, resume")
SEED = 0

_case = functools.partial(Case, items=SAMPLES, unit="samples", repetitions=REPETITIONS)


@benchmark("shards")
def shards() -> Iterator[LeftOut | tuple[Case, ...]]:
    """Samples a second out of a warm page cache."""
    import numpy as np

    from vlfoundry.infra.data.shards.write import Sample, write_shards

    noise = np.random.default_rng(SEED)
    with tempfile.TemporaryDirectory(prefix="vlfoundry-bench-") as folder:
        samples = (
            Sample(
                key=f"{row:08d}",
                image_bytes=noise.bytes(PICTURE_BYTES),
                meta={"caption": f"picture number {row}", "lang": "en", "row": row},
            )
            for row in range(SAMPLES)
        )
        write_shards(folder, samples, SAMPLES_PER_SHARD)
        theirs: list[Case] = []
        if importlib.util.find_spec("webdataset"):
            theirs += _webdataset(Path(folder))
        else:
            reason = "webdataset is not installed; `make bench LOCK=bench`"
            yield from (LeftOut(name=name, reason=reason) for name in PEERS)
        yield *theirs, *_ours(folder)


def _webdataset(folder: Path) -> Iterator[Case]:
    import webdataset

    urls = [str(path) for path in sorted(folder.glob("*.tar"))]

    def read(first: int, stop: int) -> int:
        stream = webdataset.WebDataset(urls, shardshuffle=False)
        return sum(
            len(sample["webp"]) + len(json.loads(sample["json"]))
            for sample in itertools.islice(stream, first, stop)
        )

    def read_raw() -> int:
        return sum(
            len(sample["webp"]) + len(sample["json"])
            for sample in webdataset.WebDataset(urls, shardshuffle=False)
        )

    case = functools.partial(_case, packages=("webdataset",))
    raw, parsed, resume = PEERS
    yield case(name=raw, call=read_raw)
    yield case(name=parsed, call=lambda: read(0, SAMPLES))
    start = SAMPLES * 3 // 4
    yield case(name=resume, call=lambda: read(start, start + RESUMED), items=RESUMED)


def _ours(folder: str) -> Iterator[Case]:
    from vlfoundry.infra.data.shards.read import SampleStream, ShardSet, global_order

    ours = ShardSet(folder)
    order = global_order(SAMPLES, SEED, 0).tolist()
    has_peer = importlib.util.find_spec("webdataset") is not None

    def case(name: str, call: Callable[[], int], peer: str, items: int = SAMPLES) -> Case:
        against = peer if has_peer else ""
        packages = ("numpy", "fsspec")
        return _case(name=name, call=call, items=items, against=against, packages=packages)

    def resume() -> int:
        places = SampleStream(SAMPLES, SEED).indices(SAMPLES * 3 // 4, RESUMED)
        return len(ShardSet(folder).samples([index for _, index in places]))

    def raw(indices: list[int]) -> int:
        return sum(len(image) + len(meta) for image, meta in map(ours.members, indices))

    def parsed(indices: list[int]) -> int:
        return sum(len(ours[i].image_bytes) for i in indices)

    in_order = list(range(SAMPLES))
    yield case("ours, raw", lambda: raw(in_order), "webdataset, raw")
    yield case("ours, raw, any order", lambda: raw(order), "webdataset, raw")
    yield case("ours", lambda: parsed(in_order), "webdataset")
    yield case("ours, any order", lambda: parsed(order), "webdataset")
    yield case("ours, resume", resume, "webdataset, resume", RESUMED)
