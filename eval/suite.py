"""What an evaluation suite is. A file of `eval/suites/` assigns one to `SUITE`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vlfoundry.eval.compare.scores import ENSEMBLE

if TYPE_CHECKING:
    from vlfoundry.eval.compare.scores import Score
    from vlfoundry.eval.context import EvalContext, Model
    from vlfoundry.eval.datasets.folders import DataFolder

Ability = Literal["embed", "match", "generate", "chat"]
"""what a model can do: vectors of images and texts; say whether a text belongs to an image; text
from an image; replies to questions"""


@dataclass(frozen=True, kw_only=True)
class Headline:
    """A score that the report shows at its top."""

    kind: str
    """of model, e.g. "internvl_c" """
    key: str
    """name, or name/language, of the score within the suite"""
    label: str
    """in the report's words"""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Images of a data set, what a model is asked of them, and how its answers are scored."""

    name: str
    """in params.yaml, on the command line and in score files"""
    position: int
    """suites run, and are shown, in this order"""
    needs: Ability
    """what a model must be able to do"""
    data: Literal["concepts", "any"]
    """the kind of data set: a concept set, or a pair set as well (`eval.datasets.folders`)"""
    asks: str
    """what a model is asked, in words or as the prompt"""
    metrics: tuple[str, ...]
    """names in `eval.metrics.METRICS`; of what it computes itself, none"""
    run: Callable[[Model, DataFolder, EvalContext], list[Score]]
    """the scores; per-item values go to files beside them"""
    whole: tuple[str, ...] = ()
    """names of its scores over all languages"""
    each: tuple[str, ...] = ()
    """names of its scores in each language"""
    ensemble: bool = False
    """whether those of each language are also given for all languages together"""
    labels: bool = False
    """whether a pair set's labels are asked about, which have no language"""
    headlines: tuple[Headline, ...] = ()
    """scores at the top of the report"""
    opened: bool = False
    """whether the report shows its table unfolded"""

    def keys(self, languages: Sequence[str]) -> Iterator[str]:
        """`suite/name` and `suite/name/lang` of all that it may score on concept sets."""
        tags = [*languages, *([ENSEMBLE] if self.ensemble else [])]
        for name in (*self.whole, *(f"{name}/{lang}" for name in self.each for lang in tags)):
            yield f"{self.name}/{name}"
