"""Drop re-encoded copies: of records with the same caption and near-identical pictures, keep one.

Only records with the same caption and language are compared. The same drawing under another
caption, or in another language, is another lesson and stays; so does another designer's drawing of
the same thing, unless it cannot be told from the first.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlfoundry.infra.core.config import check_ranges
from vlfoundry.infra.core.errors import ConfigError
from vlfoundry.infra.core.progress import Progress
from vlfoundry.infra.core.stage import Context, Stage, main
from vlfoundry.infra.core.tables import read_table, write_table
from vlfoundry.infra.data.funnel import Verdict, dropped_table
from vlfoundry.infra.data.images.bulk import decode_batch
from vlfoundry.infra.data.images.phash import colour_grid, connected, hamming, perceptual_hash

INGEST = "artifacts/ingest"
BEFORE = "artifacts/filter/kept.parquet"
OUT = "artifacts/dedup"
PICTURE_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class DedupConfig:
    """How alike two pictures must be to count as copies."""

    max_bits: int = 14
    """Bits of 64 in which their perceptual hashes may differ."""
    max_levels: float = 3.0
    """Mean difference of their 8x8 colour grids, of 255, that is still too small to matter."""

    def __post_init__(self) -> None:
        check_ranges("dedup", self, from_zero=("max_levels",))
        if not 0 <= self.max_bits < 32:
            raise ConfigError(f"dedup.max_bits: expected 0-31 (32 is chance), got {self.max_bits}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """What `dedup` reads from params.yaml."""

    dedup: DedupConfig = field(default_factory=DedupConfig)


def run(config: Config, context: Context) -> None:
    """Hash the pictures of the survivors, group copies, keep the best of each group."""
    kept = read_table(context.path(BEFORE))
    columns = ["image_id", "caption", "lang"]
    records = read_table(context.path(f"{INGEST}/records.parquet"), columns).take(kept["row"])
    rows = kept["row"].to_numpy()
    hashes, colours = _hashes(context, records["image_id"].to_pylist())
    texts = zip(records["lang"].to_pylist(), records["caption"].to_pylist(), strict=True)
    scope = np.unique([f"{lang}\x1f{caption}" for lang, caption in texts], return_inverse=True)[1]
    a, b = copies(scope, hashes, colours, config.dedup)
    group = connected(len(rows), a, b)
    best = best_of(group, kept["effective_side"].to_numpy(), kept["score"].to_numpy())
    drop = best != np.arange(len(rows))
    detail = [
        f"copy of row {rows[best[i]]}, {hamming(hashes[i], hashes[best[i]])} bits"
        for i in np.flatnonzero(drop)
    ]
    verdict = Verdict(rule="copy", target="duplicate", drop=drop, detail=detail)
    write_table(context.output(f"{OUT}/kept.parquet"), kept.filter(~drop))
    write_table(context.output(f"{OUT}/dropped.parquet"), dropped_table(rows, [verdict]))
    original = read_table(context.path(f"{INGEST}/truth.parquet"))["original"].to_numpy()
    context.write_json(f"{OUT}/metrics.json", copy_metrics(rows, original, drop))
    context.log(f"kept {int((~drop).sum())} of {len(rows)} records")


def copies(
    scope: np.ndarray, hashes: np.ndarray, colours: np.ndarray, limits: DedupConfig
) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of copies inside one scope, as two index arrays.

    Args:
        scope: int [N]; only rows with the same number are compared.
        hashes, colours: uint64 [N], float32 [N, F].
    """
    order = np.argsort(scope, kind="stable")
    found_a, found_b = [], []
    for members in np.split(order, np.flatnonzero(np.diff(scope[order])) + 1):
        i, j = np.triu_indices(len(members), 1)
        i, j = members[i], members[j]
        alike = hamming(hashes[i], hashes[j]) <= limits.max_bits
        i, j = i[alike], j[alike]
        close = np.abs(colours[i] - colours[j]).mean(axis=1) < limits.max_levels
        found_a.append(i[close])
        found_b.append(j[close])
    return np.concatenate(found_a), np.concatenate(found_b)


def best_of(group: np.ndarray, side: np.ndarray, score: np.ndarray) -> np.ndarray:
    """For each row the row of its group to keep: sharpest, then best score, then first. [N]."""
    order = np.lexsort((np.arange(len(group)), -score, -np.round(side), group))
    first = np.ones(len(group), bool)
    first[1:] = group[order][1:] != group[order][:-1]
    winner_of = dict(zip(group[order][first].tolist(), order[first].tolist(), strict=True))
    return np.array([winner_of[value] for value in group.tolist()], np.int64)


def copy_metrics(rows: np.ndarray, original: np.ndarray, drop: np.ndarray) -> dict[str, Any]:
    """Precision and recall; of a true group any one may stay, and all others should go.

    `original` is the truth for all records: the row that a row copies, or -1.
    """
    root = np.where(original[rows] >= 0, original[rows], rows)
    values, member, size = np.unique(root, return_inverse=True, return_counts=True)
    gone = np.bincount(member, weights=drop, minlength=len(values)).astype(int)
    wanted, hits = int((size - 1).sum()), int(np.minimum(gone, size - 1).sum())
    dropped = int(drop.sum())
    measured = {
        "dropped": dropped,
        "wanted": wanted,
        "precision": round(hits / dropped, 4) if dropped else None,
        "recall": round(hits / wanted, 4) if wanted else None,
    }
    return {
        "rows_in": len(rows),
        "rows_out": int((~drop).sum()),
        "rules": {"copy": {"target": "duplicate", **measured}},
        "overall": measured,
    }


def _hashes(context: Context, image_ids: list[str]) -> tuple[np.ndarray, np.ndarray]:
    table = read_table(context.path(f"{INGEST}/images.parquet"), ["image_id", "bytes"])
    stored = dict(zip(*(column.to_pylist() for column in table.columns), strict=True))
    distinct, image = np.unique(image_ids, return_inverse=True)
    hashes, colours = [], []
    with Progress(len(distinct), unit="pictures", label="dedup") as progress:
        for start in range(0, len(distinct), PICTURE_BATCH):
            part = distinct[start : start + PICTURE_BATCH].tolist()
            pictures = decode_batch([stored[image_id] for image_id in part], 64, part)
            hashes.append(perceptual_hash(pictures))
            colours.append(colour_grid(pictures))
            progress.update(len(part))
    return np.concatenate(hashes)[image], np.concatenate(colours)[image]


STAGE = Stage(
    name="dedup",
    config=Config,
    inputs=(
        f"{INGEST}/records.parquet",
        f"{INGEST}/images.parquet",
        f"{INGEST}/truth.parquet",
        BEFORE,
    ),
    outputs=tuple(f"{OUT}/{name}" for name in ("kept.parquet", "dropped.parquet", "metrics.json")),
    run=run,
    timeout_s=1800,
    cpu=1,
)

if __name__ == "__main__":
    raise SystemExit(main(STAGE))
