"""Drop training pictures that are near-duplicates of drawings that evaluation will show.

The test set stays whole; it is the training set that gives way. How well the check works is
measured on planted copies: test drawings re-encoded as another site would serve them.
"""

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlfoundry.infra.core.config import check_ranges
from vlfoundry.infra.core.errors import ConfigError, DataError
from vlfoundry.infra.core.progress import Progress
from vlfoundry.infra.core.stage import Context, Stage, main
from vlfoundry.infra.core.tables import read_table, write_table
from vlfoundry.infra.data.funnel import Verdict, dropped_table
from vlfoundry.infra.data.images.bulk import decode_batch, decode_rgba
from vlfoundry.infra.data.images.phash import colour_grid, hamming, near, perceptual_hash
from vlfoundry.infra.data.sources.concept_set import hash64, read_artwork
from vlfoundry.infra.data.synthetic.noise import reencode

INGEST = "artifacts/ingest"
BEFORE = "artifacts/dedup/kept.parquet"
OUT = "artifacts/decontaminate"
TEST_FILE = "data/twemoji.parquet"
PICTURE_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class DecontaminateConfig:
    """How alike a training picture may be to a test drawing."""

    max_bits: int = 6
    """Bits of 64 in which the perceptual hashes of near-duplicates differ at most."""
    max_levels: float = 12.0
    """Mean difference of the colour grids, of 255, below which colours count as the same."""
    copy_bits: int = 24
    """The same for pictures whose colours are those of a copy."""
    copy_levels: float = 3.0
    """Mean difference below which the colours are those of a copy, not merely alike."""
    planted: int = 200
    """Re-encoded test drawings by which the check measures itself."""

    def __post_init__(self) -> None:
        check_ranges("decontaminate", self, from_zero=("max_levels", "copy_bits", "copy_levels"))
        if not 0 <= self.max_bits < 32 or self.planted < 0:
            raise ConfigError(
                f"decontaminate: expected max_bits 0-31 and planted >= 0, "
                f"got {self.max_bits} and {self.planted}"
            )


@dataclass(frozen=True, kw_only=True)
class Config:
    """What `decontaminate` reads from params.yaml."""

    seed: int
    """Seed of the planted copies."""
    decontaminate: DecontaminateConfig = field(default_factory=DecontaminateConfig)


@dataclass(frozen=True, kw_only=True)
class Prints:
    """Hash and colours of some pictures."""

    hashes: np.ndarray
    """uint64 [N]."""
    colours: np.ndarray
    """float32 [N, F]."""


def run(config: Config, context: Context) -> None:
    """Compare every surviving picture with every test drawing."""
    limits = config.decontaminate
    kept = read_table(context.path(BEFORE))
    records = read_table(context.path(f"{INGEST}/records.parquet"), ["image_id"])
    image_ids = records.take(kept["row"])["image_id"].to_pylist()
    distinct, image = np.unique(image_ids, return_inverse=True)
    table = read_table(context.path(f"{INGEST}/images.parquet"), ["image_id", "bytes"])
    stored = dict(zip(*(column.to_pylist() for column in table.columns), strict=True))
    training = prints([stored[image_id] for image_id in distinct.tolist()])
    drawings = read_artwork(context.path(_test_file(context)))
    test = prints([drawing.image_bytes for drawing in drawings])

    verdict = contaminated(training, test, limits, [drawing.id for drawing in drawings], image)
    rows = kept["row"].to_numpy()
    write_table(context.output(f"{OUT}/kept.parquet"), kept.filter(~verdict.drop))
    write_table(context.output(f"{OUT}/dropped.parquet"), dropped_table(rows, [verdict]))
    planted = _plant([drawing.image_bytes for drawing in drawings], limits.planted, config.seed)
    found = found_copies(prints(planted), test, limits)
    dropped = int(verdict.drop.sum())
    metrics = {
        "rows_in": len(rows),
        "rows_out": len(rows) - dropped,
        "rules": {"test_picture": {"target": "", "dropped": dropped}},
        "pictures_dropped": len(np.unique(image[verdict.drop])),
        "planted_copies": {
            "planted": len(planted),
            "found": int(found.sum()),
            "recall": round(float(found.mean()), 4) if len(found) else None,
        },
    }
    context.write_json(f"{OUT}/metrics.json", metrics)
    context.log(f"kept {len(rows) - dropped} of {len(rows)} records")


def prints(encoded: list[bytes]) -> Prints:
    """Decode and hash."""
    hashes, colours = [np.empty(0, np.uint64)], [np.empty((0, 192), np.float32)]
    with Progress(len(encoded), unit="pictures", label="decontaminate") as progress:
        for start in range(0, len(encoded), PICTURE_BATCH):
            part = encoded[start : start + PICTURE_BATCH]
            pictures = decode_batch(part, 64, range(start, start + len(part)))
            hashes.append(perceptual_hash(pictures))
            colours.append(colour_grid(pictures))
            progress.update(len(part))
    return Prints(hashes=np.concatenate(hashes), colours=np.concatenate(colours))


def contaminated(
    training: Prints, test: Prints, limits: DecontaminateConfig, test_ids: list[str],
    image: np.ndarray,
) -> Verdict:  # fmt: skip
    """Verdict on the records whose pictures are `image` [N], rows of `training`."""
    i, j = _alike(training, test, limits)
    reason: dict[int, str] = {}
    for a, b in zip(i.tolist(), j.tolist(), strict=True):
        bits = hamming(training.hashes[a], test.hashes[b])
        reason.setdefault(a, f"{bits} bits from {test_ids[b]}")
    drop = np.isin(image, list(reason))
    detail = [reason[int(index)] for index in image[drop]]
    return Verdict(rule="test_picture", target="", drop=drop, detail=detail)


def found_copies(copies: Prints, test: Prints, limits: DecontaminateConfig) -> np.ndarray:
    """Which of the planted copies the rule would drop. bool [N]."""
    i, _ = _alike(copies, test, limits)
    return np.isin(np.arange(len(copies.hashes)), i)


def _alike(a: Prints, b: Prints, limits: DecontaminateConfig) -> tuple[np.ndarray, np.ndarray]:
    """Pairs that are near-duplicates by either pair of limits; first by the stricter hash."""
    pairs = [
        near(a.hashes, a.colours, b.hashes, b.colours, bits, levels)
        for bits, levels in (
            (limits.max_bits, limits.max_levels),
            (limits.copy_bits, limits.copy_levels),
        )
    ]
    return np.concatenate([i for i, _ in pairs]), np.concatenate([j for _, j in pairs])


def _plant(encoded: list[bytes], count: int, seed: int) -> list[bytes]:
    rng = np.random.default_rng(hash64(seed, "planted"))
    chosen = rng.permutation(len(encoded))[:count]
    return [reencode(decode_rgba(encoded[i], where=f"picture {i}"), rng) for i in chosen]


def _test_file(context: Context) -> str:
    """The artwork file that ingest was told to keep for testing."""
    facts: dict[str, Any] = json.loads(context.path(f"{INGEST}/metrics.json").read_text("utf-8"))
    path = f"data/{facts['test_source']}.parquet"
    if path not in STAGE.inputs:
        raise DataError(
            f"ingest.test_source is {facts['test_source']!r}, but this stage reads {TEST_FILE}; "
            "change TEST_FILE here and the dependency in dvc.yaml with it"
        )
    return path


STAGE = Stage(
    name="decontaminate",
    config=Config,
    inputs=(
        f"{INGEST}/records.parquet",
        f"{INGEST}/images.parquet",
        f"{INGEST}/metrics.json",
        BEFORE,
        TEST_FILE,
    ),
    outputs=tuple(f"{OUT}/{name}" for name in ("kept.parquet", "dropped.parquet", "metrics.json")),
    run=run,
    timeout_s=1800,
    cpu=1,
)

if __name__ == "__main__":
    raise SystemExit(main(STAGE))
