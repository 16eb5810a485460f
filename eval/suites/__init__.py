"""The suites: each file has one `run(model, data, setting) -> list[Score]`."""

from collections.abc import Callable

from eval.datasets import DataFolder
from eval.embedding import Model, Setting
from eval.scores import Score
from infra.errors import ModelError

SuiteRun = Callable[[Model, DataFolder, Setting], list[Score]]

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
    able = abilities(model.kind, model.capabilities)
    if NEEDS[suite] in able:
        return ""
    return (
        f"{suite} needs a model that can {NEEDS[suite]}; one of kind {model.kind} can "
        f"{' and '.join(sorted(able))}"
    )


def suite_run(name: str) -> SuiteRun:
    """The `run` function of a suite."""
    from eval.suites import box, caption, colour, linear_probe, matching, retrieval, zero_shot

    modules = (zero_shot, retrieval, linear_probe, matching, caption, colour, box)
    return {module.NAME: module.run for module in modules}[name]
