"""Reading shards: every sample once, in order and at random, against webdataset on the same files.

Raw is both members as bytes; else the JSON is parsed. Pictures are not decoded: that is the same
work for all. To resume is to read samples from three quarters of an epoch on, all opened anew.
"""

import importlib.util
import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import Case, LeftOut, benchmark

SAMPLES = 4096
PICTURE_BYTES = 32 << 10
SAMPLES_PER_SHARD = 1024
RESUMED = 32
SEED = 0


@benchmark("shards")
def shards() -> Iterator[Case | LeftOut]:
    """Samples a second out of a warm page cache."""
    import numpy as np

    from infra.shards import Sample, write_shards

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
        yield from _webdataset(Path(folder))
        yield from _ours(folder)


def _webdataset(folder: Path) -> Iterator[Case | LeftOut]:
    names = ("webdataset, raw", "webdataset", "webdataset, resume")
    if importlib.util.find_spec("webdataset") is None:
        reason = "webdataset is not installed; `make bench LOCK=bench`"
        yield from (LeftOut(name=name, reason=reason) for name in names)
        return
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

    counted = {"unit": "samples", "packages": ("webdataset",)}
    yield Case(name=names[0], call=read_raw, items=SAMPLES, **counted)
    yield Case(name=names[1], call=lambda: read(0, SAMPLES), items=SAMPLES, **counted)
    start = SAMPLES * 3 // 4
    yield Case(name=names[2], call=lambda: read(start, start + RESUMED), items=RESUMED, **counted)


def _ours(folder: str) -> Iterator[Case]:
    from infra.loader import SampleStream, ShardSet, global_order

    ours = ShardSet(folder)
    order = global_order(SAMPLES, SEED, 0).tolist()
    has_peer = importlib.util.find_spec("webdataset") is not None
    counted: dict[str, Any] = {"unit": "samples", "packages": ("numpy", "fsspec")}

    def case(name: str, call: Any, peer: str, items: int = SAMPLES) -> Case:
        against = peer if has_peer else ""
        return Case(name=name, call=call, items=items, against=against, **counted)

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
