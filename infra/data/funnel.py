"""What the steps of the data funnel share: who is dropped and why, and how right that was."""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one rule says of all rows that it looked at."""

    rule: str
    """Name of the rule, as it stands in `dropped.parquet`."""
    target: str
    """The noise that it is meant to find, as it stands in `truth.parquet`; empty if none."""
    drop: np.ndarray
    """bool [N]: rows that the rule rejects."""
    detail: list[str]
    """For each rejected row, in order, the measured value beside the limit."""


def dropped_table(rows: np.ndarray, verdicts: list[Verdict]) -> dict[str, Any]:
    """One line for each dropped row, with the first rule that rejected it, in the order of rows."""
    reasons: dict[int, tuple[str, str]] = {}
    for verdict in verdicts:
        for index, detail in zip(np.flatnonzero(verdict.drop), verdict.detail, strict=True):
            reasons.setdefault(int(rows[index]), (verdict.rule, detail))
    ordered = sorted(reasons)
    return {
        "row": np.array(ordered, np.int64),
        "rule": [reasons[row][0] for row in ordered],
        "detail": [reasons[row][1] for row in ordered],
    }


def any_drop(verdicts: list[Verdict]) -> np.ndarray:
    """bool [N]: rows that at least one rule rejects."""
    return np.logical_or.reduce([verdict.drop for verdict in verdicts])


def rates(drop: np.ndarray, wanted: np.ndarray) -> dict[str, Any]:
    """Precision and recall of dropping `drop` where `wanted` should go; None where undefined."""
    hits = int((drop & wanted).sum())
    return {
        "dropped": int(drop.sum()),
        "wanted": int(wanted.sum()),
        "precision": round(hits / int(drop.sum()), 4) if drop.any() else None,
        "recall": round(hits / int(wanted.sum()), 4) if wanted.any() else None,
    }


def funnel_metrics(noise: np.ndarray, verdicts: list[Verdict]) -> dict[str, Any]:
    """Counts, precision and recall by rule (each on its own) and of all rules together.

    `noise` [N] is the truth of the same rows. This is the only place that looks at it.
    """
    drop = any_drop(verdicts)
    targets = sorted({verdict.target for verdict in verdicts if verdict.target})
    by_rule: dict[str, Any] = {}
    for verdict in verdicts:
        measured = rates(verdict.drop, noise == verdict.target)
        if not verdict.target:  # nothing was planted for it: there is no truth to compare with
            measured = {"dropped": measured["dropped"]}
        by_rule[verdict.rule] = {"target": verdict.target, **measured}
    return {
        "rows_in": len(noise),
        "rows_out": int((~drop).sum()),
        "rules": by_rule,
        "overall": rates(drop, np.isin(noise, targets)),
        "clean_lost": int((drop & (noise == "")).sum()),
        "noise_left": {target: int((~drop & (noise == target)).sum()) for target in targets},
    }
