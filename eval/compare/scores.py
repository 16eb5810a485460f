"""A score and its file: value, n, standard error, interval, chance, references, per-item file.

Values are fractions from 0 to 1. `scores.json` and the items (JSON lines) are byte-stable.
"""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlfoundry.eval.compare.stats import bootstrap_interval, standard_error, wilson_interval
from vlfoundry.infra.core.errors import DataError

if TYPE_CHECKING:
    import numpy as np

FORMAT = "vlfoundry.scores.v1"
ENSEMBLE = "ensemble"
"""stands for a language where those of all languages are added up"""
DECIMALS = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """One number that says how good a model is at one thing."""

    suite: str
    """Name of the suite, e.g. zero_shot."""
    name: str
    """Name inside the suite, e.g. top1."""
    value: float
    """The measured fraction."""
    n: int
    """Number of items that it is the mean of."""
    stderr: float
    """Standard error of the mean over the items."""
    interval: tuple[float, float]
    """95 % interval: Wilson's for shares, bootstrap over items for other means."""
    lang: str = ""
    """Language, "ensemble" over several, or empty where there is none."""
    chance: float | None = None
    """What guessing reaches on the same items, or None where guessing means nothing."""
    reference: float | None = None
    """What the nearest training picture reaches on the same items, if there is one."""
    untrained: float | None = None
    """What the same model with fresh random weights reaches, once it is measured."""
    untrained_stderr: float | None = None
    """Standard error of `untrained`."""
    baseline: float | None = None
    """What an earlier model reaches on the same items, where one is compared with."""
    baseline_lead_stderr: float | None = None
    """Standard error of `value - baseline`, from the difference of each item."""
    items: str = ""
    """Path of the per-item file, relative to the folder of the score file."""
    by_item: tuple[float, ...] = dataclasses.field(default=(), repr=False, compare=False)
    """What `value` is the mean of; empty where the score was read from a file."""

    @property
    def key(self) -> str:
        """suite/name or suite/name/lang: how gate rules and tables name the score."""
        return "/".join(part for part in (self.suite, self.name, self.lang) if part)


def mean_score(
    suite: str,
    name: str,
    values: "Sequence[float] | np.ndarray",
    *,
    lang: str = "",
    chance: float | None = None,
    reference: float | None = None,
    items: str = "",
    seed: int = 0,
) -> Score:
    """The score that is the mean of per-item values; shares (0 or 1 each) get Wilson's interval.

    Raises DataError if there are no items.
    """
    if not len(values):
        raise DataError(f"{suite}/{name}/{lang or '-'}: no items to score")
    numbers = [float(value) for value in values]
    mean = sum(numbers) / len(numbers)
    shares = all(value in (0.0, 1.0) for value in numbers)
    interval = (
        wilson_interval(mean, len(numbers)) if shares else bootstrap_interval(numbers, seed=seed)
    )
    return Score(
        suite=suite,
        name=name,
        value=_rounded(mean),
        n=len(numbers),
        stderr=_rounded(standard_error(numbers)),
        interval=(_rounded(interval[0]), _rounded(interval[1])),
        lang=lang,
        chance=_rounded(chance),
        reference=_rounded(reference),
        items=items,
        by_item=tuple(numbers),
    )


def with_untrained(scores: Iterable[Score], control: Iterable[Score]) -> list[Score]:
    """The scores, each beside the same score of the untrained control."""
    found = {score.key: score for score in control}
    return [
        dataclasses.replace(
            score, untrained=found[score.key].value, untrained_stderr=found[score.key].stderr
        )
        if score.key in found
        else score
        for score in scores
    ]


def with_baseline(scores: Iterable[Score], earlier: Iterable[Score]) -> list[Score]:
    """The scores, each beside the same score of an earlier model on the same items.

    Both must come from the same data and setting in this process: items are compared one by one.
    """
    found = {score.key: score for score in earlier}
    return [_beside(score, found[score.key]) if score.key in found else score for score in scores]


def _beside(score: Score, earlier: Score) -> Score:
    leads = [ours - theirs for ours, theirs in zip(score.by_item, earlier.by_item, strict=True)]
    return dataclasses.replace(
        score, baseline=earlier.value, baseline_lead_stderr=_rounded(standard_error(leads))
    )


def score_line(score: Score) -> str:
    """One score for people."""
    where = f" [{score.lang}]" if score.lang else ""
    error = "" if score.stderr is None else f" ± {score.stderr:.3f}"
    return f"{score.suite}/{score.name}{where}: {score.value:.3f}{error} (n={score.n})"


def write_scores(
    file: Path,
    scores: Iterable[Score],
    *,
    model: dict[str, Any],
    data: dict[str, Any],
    not_applicable: dict[str, str] | None = None,
    baseline: dict[str, Any] | None = None,
) -> None:
    """Write `scores.json`.

    Args:
        not_applicable: the reason for each suite that was not run.
        baseline: which earlier model the scores stand beside, if any.
    """
    document = {
        "format": FORMAT,
        "model": model,
        "data": data,
        "not_applicable": not_applicable or {},
        "baseline": baseline,
        "scores": [_entry(score) for score in scores],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, sort_keys=True, indent=2, ensure_ascii=False) + "\n"
    file.write_text(text, encoding="utf-8")


def _entry(score: Score) -> dict[str, Any]:
    entry = dataclasses.asdict(score)
    return {key: value for key, value in entry.items() if key != "by_item"}  # the items have it


def headline(scores: Iterable[Score]) -> dict[str, Any]:
    """The values that stand for all languages, nested by the parts of their keys:
    `{"zero_shot": {"top1": {"ensemble": 0.5}}, "box": {"mean_iou": 0.25}}`.
    """
    nested: dict[str, Any] = {}
    for score in scores:
        if score.lang in ("", ENSEMBLE):
            *outer, last = score.key.split("/")
            place = nested
            for part in outer:
                place = place.setdefault(part, {})
            place[last] = score.value
    return nested


def read_document(file: Path) -> dict[str, Any]:
    """The whole score file. Raises DataError if it is missing or of another format."""
    if not file.is_file():
        raise DataError(f"{file} does not exist; run the evaluation that writes it")
    document = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        got = document.get("format") if isinstance(document, dict) else type(document).__name__
        raise DataError(f"{file} has the format {got!r}, expected {FORMAT!r}")
    return document


def read_scores(file: Path) -> list[Score]:
    """The scores of a score file."""
    entries: list[dict[str, Any]] = read_document(file)["scores"]
    for entry in entries:
        entry["interval"] = tuple(entry["interval"])
    return [Score(**entry) for entry in entries]


def write_items(folder: Path, name: str, items: Iterable[dict[str, Any]]) -> str:
    """Write one JSON line an item; returns the path relative to the folder's parent."""
    file = folder / f"{name}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(_plain(item), sort_keys=True, ensure_ascii=False) for item in items)
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return file.relative_to(folder.parent).as_posix()


def read_items(file: Path) -> list[dict[str, Any]]:
    """The items of one per-item file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _rounded(value: float | None) -> Any:
    # the last bits of a mean depend on the order of a sum; what is hashed must not
    return None if value is None else round(float(value), DECIMALS)


def _plain(value: Any) -> Any:
    """Rounded, plain JSON: NumPy's scalars and arrays become numbers and lists."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return round(value, DECIMALS) if isinstance(value, float) else value
