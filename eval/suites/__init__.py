"""The suites: each file has one `run(model, data, setting) -> list[Score]`."""

from collections.abc import Callable, Sequence

from vlfoundry.eval.compare.scores import ENSEMBLE, Score
from vlfoundry.eval.context import EvalContext, Model
from vlfoundry.eval.datasets.folders import DataFolder
from vlfoundry.infra.core.errors import ModelError

SuiteRun = Callable[[Model, DataFolder, EvalContext], list[Score]]

NEEDS = {
    "zero_shot": "embed",
    "retrieval": "embed",
    "linear_probe": "embed",
    "matching": "match",
    "caption": "generate",
    "colour": "chat",
    "box": "chat",
}
"""What a model must be able to do for each suite; in the order in which they run."""
TOPS = ("top1", "top5")
CUTS = ("r1", "r5", "r10")
SCORES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "zero_shot": ((), (*TOPS, *(f"{top}_{part}" for top in TOPS for part in ("seen", "held_out")))),
    "retrieval": (CUTS, tuple(f"{way}_{cut}" for way in ("image_to_text", "text_to_image")
                              for cut in CUTS)),
    "linear_probe": (("group_accuracy",), ()),
    "matching": (("accuracy", "hard_accuracy"),) * 2,
    "caption": (("token_f1", "chrf", "in_language"),) * 2,
    "colour": (("accuracy", "in_words"), ("accuracy",)),
    "box": (("accuracy_iou50", "mean_iou", "has_box"), ("accuracy_iou50", "mean_iou")),
}  # fmt: skip
"""What a suite may score over all languages, and what in each."""


def score_keys(suite: str, languages: Sequence[str]) -> list[str]:
    """`suite/name` and `suite/name/lang` of all that a suite may score on concept sets."""
    whole, each = SCORES[suite]
    tags = [*languages, *([ENSEMBLE] if suite == "zero_shot" else [])]
    names = [*whole, *(f"{name}/{lang}" for name in each for lang in tags)]
    return [f"{suite}/{name}" for name in names]


def abilities(kind: str, capabilities: frozenset[str]) -> frozenset[str]:
    """A model's capabilities, and `chat` if one of its kind answers questions."""
    can_chat = "generate" in capabilities and kind.startswith("chat")
    return capabilities | ({"chat"} if can_chat else set())


def why_not(model: Model, suite: str) -> str:
    """Why the model cannot run the suite, or an empty string if it can.

    Raises ModelError for a suite that does not exist.
    """
    if suite not in NEEDS:
        raise ModelError(f"unknown suite {suite!r}; choose from {', '.join(NEEDS)}")
    return why_not_kind(model.kind, model.capabilities, suite)


def why_not_kind(kind: str, capabilities: frozenset[str], suite: str) -> str:
    """`why_not` of a model that is not loaded yet."""
    able = abilities(kind, capabilities)
    if NEEDS[suite] in able:
        return ""
    return (
        f"{suite} needs a model that can {NEEDS[suite]}; one of kind {kind} can "
        f"{' and '.join(sorted(able))}"
    )


def suite_run(name: str) -> SuiteRun:
    """The `run` function of a suite."""
    from vlfoundry.eval.suites import (
        box,
        caption,
        colour,
        linear_probe,
        matching,
        retrieval,
        zero_shot,
    )

    modules = (zero_shot, retrieval, linear_probe, matching, caption, colour, box)
    return {module.NAME: module.run for module in modules}[name]
