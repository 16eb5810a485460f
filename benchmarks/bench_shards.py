"""Reading shards: every sample once, in order and at random, against webdataset on the same files.

Pictures are read as bytes and not decoded: that is the same work for all.
"""

import importlib.util
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness import Case, LeftOut, benchmark

SAMPLES = 4096
PICTURE_BYTES = 2048
SAMPLES_PER_SHARD = 1024


@benchmark("shards")
def shards() -> Iterator[Case | LeftOut]:
    """Samples a second out of a warm page cache."""
    import numpy as np

    from infra.loader import ShardSet, global_order
    from infra.shards import Sample, write_shards

    noise = np.random.default_rng(0)
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
        ours = ShardSet(folder)
        order = [int(index) for index in global_order(SAMPLES, 0, 0)]
        counted = {"items": SAMPLES, "unit": "samples", "packages": ("numpy", "fsspec")}

        def read_all(indices: list[int]) -> int:
            return sum(len(sample.image_bytes) for sample in map(ours.__getitem__, indices))

        yield Case(name="ours, in order", call=lambda: read_all(list(range(SAMPLES))), **counted)
        yield Case(name="ours, any order", call=lambda: read_all(order), **counted)
        yield _webdataset(Path(folder))


def _webdataset(folder: Path) -> Case | LeftOut:
    name = "webdataset, in order"
    if importlib.util.find_spec("webdataset") is None:
        return LeftOut(name=name, reason="webdataset is not installed; `make bench LOCK=bench`")
    import webdataset

    urls = [str(path) for path in sorted(folder.glob("*.tar"))]

    def read_all() -> int:
        total = 0
        for sample in webdataset.WebDataset(urls, shardshuffle=False):
            json.loads(sample["json"])
            total += len(sample["webp"])
        return total

    return Case(name=name, call=read_all, items=SAMPLES, unit="samples", packages=("webdataset",))
