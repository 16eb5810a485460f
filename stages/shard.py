"""Write the survivors as WebDataset shards: `stage1` (all) and `stage2` (the best).

Stage 1 learns from everything that is left; stage 2 from records that fit well and have a caption
of the right kind. Rows are in the order of their number, which `ingest` has mixed; the loader
permutes.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlfoundry.infra.core.errors import ConfigError, DataError
from vlfoundry.infra.core.progress import Progress
from vlfoundry.infra.core.stage import Context, Stage, main
from vlfoundry.infra.core.tables import read_table
from vlfoundry.infra.data.shards.write import Sample, write_shards

INGEST = "artifacts/ingest"
BEFORE = "artifacts/decontaminate/kept.parquet"
OUT = "artifacts/shard"
META = ("caption", "lang", "kind", "source", "concept")


@dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """What goes into which shards."""

    samples_per_shard: int = 4096
    """Samples in one tar file."""
    stage2_kinds: tuple[str, ...] = ("name",)
    """Kinds of captions that stage 2 learns from; stage 3 takes what things are called from names
    alone."""
    stage2_share: float = 0.9
    """Share of each kind, best similarity first, that stage 2 keeps."""

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1 or not 0 < self.stage2_share <= 1:
            raise ConfigError(
                "shard: expected samples_per_shard >= 1 and 0 < stage2_share <= 1, "
                f"got {self.samples_per_shard} and {self.stage2_share}"
            )


@dataclass(frozen=True, kw_only=True)
class Config:
    """What `shard` reads from params.yaml."""

    shard: ShardConfig = field(default_factory=ShardConfig)


def run(config: Config, context: Context) -> None:
    """Select, write the two shard folders, count."""
    kept = read_table(context.path(BEFORE), ["row", "similarity"])
    records = read_table(context.path(f"{INGEST}/records.parquet")).take(kept["row"])
    table = read_table(context.path(f"{INGEST}/images.parquet"), ["image_id", "bytes"])
    stored = dict(zip(*(column.to_pylist() for column in table.columns), strict=True))
    columns = {name: records[name].to_pylist() for name in ("row", "image_id", *META)}
    similarity = kept["similarity"].to_numpy()
    if not len(similarity):
        raise DataError("no record survived the funnel; loosen the limits under `filter`")
    chosen = {
        "stage1": np.arange(len(similarity)),
        "stage2": best(columns["kind"], similarity, config.shard),
    }
    metrics: dict[str, Any] = {}
    for name, indices in chosen.items():
        folder = context.output(f"{OUT}/{name}")
        with Progress(len(indices), unit="samples", label=f"shard {name}") as progress:
            samples = _samples(columns, similarity, stored, indices, progress)
            write_shards(folder, samples, config.shard.samples_per_shard)
        metrics[name] = _counts(columns, indices)
    context.write_json(f"{OUT}/metrics.json", metrics)


def best(kinds: list[str], similarity: np.ndarray, config: ShardConfig) -> np.ndarray:
    """Rows of stage 2's kinds, of each the upper share by similarity, in their order."""
    chosen = np.zeros(len(kinds), bool)
    for kind in config.stage2_kinds:
        rows = np.flatnonzero(np.array(kinds) == kind)
        if len(rows):
            limit = np.quantile(similarity[rows], 1.0 - config.stage2_share, method="lower")
            chosen[rows] = similarity[rows] >= limit
    return np.flatnonzero(chosen)


def _samples(
    columns: dict[str, list[Any]],
    similarity: np.ndarray,
    stored: dict[str, bytes],
    indices: np.ndarray,
    progress: Progress,
) -> Iterator[Sample]:
    for i in indices.tolist():
        row = columns["row"][i]
        meta = {name: columns[name][i] for name in META}
        meta |= {"row": row, "similarity": round(float(similarity[i]), 4)}
        image_bytes = stored[columns["image_id"][i]]
        yield Sample(key=f"{row:08d}", image_bytes=image_bytes, meta=meta)
        progress.update()


def _counts(columns: dict[str, list[Any]], indices: np.ndarray) -> dict[str, Any]:
    def count(name: str) -> dict[str, int]:
        return dict(Counter(columns[name][i] for i in indices))

    return {
        "samples": len(indices),
        "pictures": len({columns["image_id"][i] for i in indices}),
        "concepts": len({columns["concept"][i] for i in indices}),
        "by_language": count("lang"),
        "by_kind": count("kind"),
        "by_source": count("source"),
    }


STAGE = Stage(
    name="shard",
    config=Config,
    inputs=(f"{INGEST}/records.parquet", f"{INGEST}/images.parquet", BEFORE),
    outputs=(f"{OUT}/stage1", f"{OUT}/stage2", f"{OUT}/metrics.json"),
    run=run,
    timeout_s=1800,
    cpu=1,
)

if __name__ == "__main__":
    raise SystemExit(main(STAGE))
