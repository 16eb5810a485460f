"""Drop bad records, each with the rule that rejected it and the value that it measured.

Rules look at pixels, captions, tags and bootstrap scores, never at `truth.parquet` or at what the
picture is known to show. Precision and recall are measured afterwards, in `metrics.json`.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlfoundry.infra.core.config import check_ranges
from vlfoundry.infra.core.errors import DataError
from vlfoundry.infra.core.progress import Progress
from vlfoundry.infra.core.stage import Context, Stage, main
from vlfoundry.infra.core.tables import read_table, write_table
from vlfoundry.infra.data.funnel import Verdict, any_drop, dropped_table, funnel_metrics
from vlfoundry.infra.data.images.bulk import decode_batch
from vlfoundry.infra.data.rules.language import tag_probability
from vlfoundry.infra.data.rules.quality import effective_side, text_strokes

INGEST = "artifacts/ingest"
SCORES = "artifacts/bootstrap/scores.parquet"
OUT = "artifacts/filter"
PICTURE_BATCH = 256
NULL_HALF = 0.5


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """The limits of the rules."""

    min_side_px: float = 32.0
    """Smallest effective side, measured from the pixels; half of the stored side."""
    max_text_strokes: float = 12.0
    """Black-and-white strokes side by side in one line above which it is print."""
    min_characters: int = 1
    """Shortest caption."""
    max_characters: int = 200
    """Longest caption."""
    max_repeats: int = 5
    """How often one word may stand in a caption."""
    min_tag_probability: float = 0.2
    """Smallest probability of the declared language."""
    similarity_precision: float = 0.85
    """Estimated share of mismatches among those dropped for their score (0: keep all)."""

    def __post_init__(self) -> None:
        check_ranges(
            "filter",
            self,
            whole=("max_characters", "max_repeats"),
            from_zero=("min_side_px", "max_text_strokes", "min_characters"),
            shares=("min_tag_probability", "similarity_precision"),
        )


@dataclass(frozen=True, kw_only=True)
class Config:
    """What `filter` reads from params.yaml."""

    filter: FilterConfig = field(default_factory=FilterConfig)


def run(config: Config, context: Context) -> None:
    """Measure, judge, write who stays and who goes, and say how right that was."""
    limits = config.filter
    columns = ["row", "image_id", "caption", "lang"]
    records = read_table(context.path(f"{INGEST}/records.parquet"), columns).to_pydict()
    rows = np.asarray(records["row"])
    measured = _measure(context, records)
    verdicts = [
        resolution(limits, measured["effective_side"]),
        overlay(limits, measured["text_strokes"]),
        caption_text(limits, records["caption"]),
        language(limits, measured["tag_probability"], measured.pop("best_lang")),
    ]
    mismatch, estimate = similarity(limits, measured["score"], ~any_drop(verdicts))
    verdicts.append(mismatch)
    drop = any_drop(verdicts)
    if drop.all():
        by_rule = {verdict.rule: int(verdict.drop.sum()) for verdict in verdicts}
        raise DataError(
            f"no record of {len(rows)} survived the filter: rejected by {by_rule}; "
            "loosen the limits under `filter` in params.yaml"
        )
    kept = {"row": rows[~drop], **{name: values[~drop] for name, values in measured.items()}}
    write_table(context.output(f"{OUT}/kept.parquet"), kept)
    write_table(context.output(f"{OUT}/dropped.parquet"), dropped_table(rows, verdicts))
    noise = np.asarray(read_table(context.path(f"{INGEST}/truth.parquet"))["noise"].to_pylist())
    metrics = {**funnel_metrics(noise, verdicts), "similarity_estimate": estimate}
    context.write_json(f"{OUT}/metrics.json", metrics)
    context.log(f"kept {int((~drop).sum())} of {len(rows)} records")


def resolution(limits: FilterConfig, side: np.ndarray) -> Verdict:
    """Pictures that were enlarged from something small."""
    drop = side < limits.min_side_px
    detail = [f"{value:.0f} px < {limits.min_side_px:g}" for value in side[drop]]
    return Verdict(rule="resolution", target="low_resolution", drop=drop, detail=detail)


def overlay(limits: FilterConfig, strokes: np.ndarray) -> Verdict:
    """Pictures with a line of print over them."""
    drop = strokes > limits.max_text_strokes
    detail = [f"{value:.1f} strokes > {limits.max_text_strokes:g}" for value in strokes[drop]]
    return Verdict(rule="overlay", target="overlay", drop=drop, detail=detail)


def caption_text(limits: FilterConfig, captions: list[str]) -> Verdict:
    """Captions that are too short, too long, without a letter, or stutter."""
    found = [_caption_fault(limits, caption) for caption in captions]
    drop = np.array([bool(fault) for fault in found])
    return Verdict(rule="caption", target="", drop=drop, detail=[f for f in found if f])


def language(limits: FilterConfig, probability: np.ndarray, best: np.ndarray) -> Verdict:
    """Captions whose text is in another language than their tag says."""
    drop = probability < limits.min_tag_probability
    detail = [
        f"p = {p:.1e} < {limits.min_tag_probability:g}, looks {lang}"
        for p, lang in zip(probability[drop], best[drop], strict=True)
    ]
    return Verdict(rule="language", target="wrong_lang", drop=drop, detail=detail)


def similarity(
    limits: FilterConfig, score: np.ndarray, among: np.ndarray
) -> tuple[Verdict, dict[str, float]]:
    """Captions that fit their picture no better than random ones; and the estimate behind it."""
    cutoff, estimate = mismatch_cutoff(score[among], limits.similarity_precision)
    drop = among & (score < cutoff)
    detail = [f"score {value:.3f} < {cutoff:.3f}" for value in score[drop]]
    return Verdict(rule="similarity", target="shuffled", drop=drop, detail=detail), estimate


def mismatch_cutoff(score: np.ndarray, precision: float) -> tuple[float, dict[str, float]]:
    """The highest cutoff below which at least `precision` of the rows are mismatches.

    Mismatched rows spread evenly over 0..1 and matched ones lie near 1, so twice the number below
    one half estimates how many mismatches there are (Storey 2002), and that number times c how
    many of them lie below c. Nothing is looked up: the noise rate is estimated from the scores.
    """
    mismatches = float((score < NULL_HALF).sum()) / NULL_HALF
    ordered = np.sort(score)
    best = 0.0
    if precision > 0 and mismatches:
        candidates = np.linspace(0.02, 0.999, 980)
        below = np.searchsorted(ordered, candidates)
        expected = mismatches * candidates / np.maximum(below, 1)
        good = candidates[(expected >= precision) & (below > 0)]
        best = float(good.max()) if len(good) else 0.0
    estimate = {
        "mismatched_share": round(mismatches / max(len(score), 1), 4),
        "cutoff": round(best, 4),
        "expected_recall": round(best, 4),
    }
    return best, estimate


def _caption_fault(limits: FilterConfig, caption: str) -> str:
    text = caption.strip()
    if not limits.min_characters <= len(text) <= limits.max_characters:
        return f"{len(text)} characters, limits {limits.min_characters}-{limits.max_characters}"
    if not any(character.isalnum() for character in text):
        return "no letter and no digit"
    words = [word for word in text.lower().replace(",", " ").split() if len(word) > 1]
    word, count = Counter(words).most_common(1)[0] if words else ("", 0)
    return f"{word!r} {count} times > {limits.max_repeats}" if count > limits.max_repeats else ""


def _measure(context: Context, records: dict[str, list[Any]]) -> dict[str, np.ndarray]:
    table = read_table(context.path(f"{INGEST}/images.parquet"), ["image_id", "bytes"])
    position = {image_id: i for i, image_id in enumerate(table["image_id"].to_pylist())}
    image = np.array([position[image_id] for image_id in records["image_id"]])
    encoded = table["bytes"].to_pylist()
    sides, strokes = [], []
    with Progress(len(encoded), unit="pictures", label="filter") as progress:
        for start in range(0, len(encoded), PICTURE_BATCH):
            part = encoded[start : start + PICTURE_BATCH]
            pictures = decode_batch(part, 64, range(start, start + len(part)))
            sides.append(effective_side(pictures))
            strokes.append(text_strokes(pictures))
            progress.update(len(part))
    probability, best = tag_probability(records["caption"], records["lang"])
    scores = read_table(context.path(SCORES), ["row", "similarity", "score"])
    assert scores["row"].to_pylist() == records["row"], "scores and records are not of one run"
    return {
        "effective_side": np.concatenate(sides)[image].astype(np.float32),
        "text_strokes": np.concatenate(strokes)[image].astype(np.float32),
        "tag_probability": probability.astype(np.float32),
        "best_lang": best,
        "similarity": scores["similarity"].to_numpy(),
        "score": scores["score"].to_numpy(),
    }


STAGE = Stage(
    name="filter",
    config=Config,
    inputs=(
        f"{INGEST}/records.parquet",
        f"{INGEST}/images.parquet",
        f"{INGEST}/truth.parquet",
        SCORES,
    ),
    outputs=tuple(f"{OUT}/{name}" for name in ("kept.parquet", "dropped.parquet", "metrics.json")),
    run=run,
    timeout_s=1800,
    cpu=1,
)

if __name__ == "__main__":
    raise SystemExit(main(STAGE))
