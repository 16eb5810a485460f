"""Answers that may be numbers (ChartQA), and plain equality (AI2D, OCR-VQA).

Source: A. Masry et al., ChartQA, Findings of ACL 2022, section 5.1; internvl_chat/eval/vqa/
evaluate_vqa.py.
"""

from collections.abc import Sequence

from vlfoundry.eval.metrics.official.inputs import same_length
from vlfoundry.infra.core.errors import DataError

TOLERANCE = 0.05


def relaxed_correct(
    prediction: str, target: str, tolerance: float = TOLERANCE, *, compat: bool = False
) -> bool:
    """Whether a number lies within `tolerance` of the target, bounds included, or texts are equal.

    "12%" is 0.12; "1,000" is no number. A target of 0 is compared as text. `compat` measures the
    difference relative to the prediction, as the script does when it scores a whole data set.
    """
    said = prediction.strip()
    base, other = (said, target) if compat else (target, said)
    scale, value = _number(base), _number(other)
    if scale and value is not None:
        return abs(value - scale) / abs(scale) <= tolerance
    return said.lower() == target.lower()


def relaxed_accuracy(
    predictions: Sequence[str], targets: Sequence[Sequence[str]], *, compat: bool = False
) -> float:
    """Share of predictions that are relaxed_correct for any of their targets."""
    count = same_length(predictions=predictions, targets=targets)
    pairs = zip(predictions, map(_several, targets), strict=True)
    hits = [
        any(relaxed_correct(said, t, compat=compat) for t in accepted) for said, accepted in pairs
    ]
    return sum(hits) / count


def exact_accuracy(predictions: Sequence[str], targets: Sequence[Sequence[str]]) -> float:
    """Share of predictions that equal any of their targets but for case and outer space."""
    count = same_length(predictions=predictions, targets=targets)
    pairs = zip(predictions, map(_several, targets), strict=True)
    return sum(_plain(said) in map(_plain, accepted) for said, accepted in pairs) / count


def _several(targets: Sequence[str]) -> Sequence[str]:
    if isinstance(targets, str) or not targets:
        raise DataError(f"targets of one item are {targets!r}, expected a list of at least one")
    return targets


def _plain(text: str) -> str:
    return text.strip().lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
