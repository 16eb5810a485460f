"""Rules that a model must meet before it may be promoted, and what became of each."""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial

from vlfoundry.eval.compare.scores import Score
from vlfoundry.eval.compare.stats import Z_95
from vlfoundry.infra.core.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """What one score must satisfy; each condition that is set is one check."""

    variant: str
    """Model that the score belongs to."""
    score: str
    """suite/name or suite/name/lang."""
    at_least: float | None = None
    """The value itself, as a fraction."""
    above_chance: bool = False
    """The lower end of the 95 % interval lies above chance."""
    above_untrained_by_stderr: float | None = None
    """Lead over the untrained control, in standard errors of the difference."""
    better_than_baseline_by_stderr: float | None = None
    """Lead over an earlier model on the same items, where `evaluate.baseline` names one, in
    standard errors of the difference; 0 means better at all, which an equally good model is half
    of the time; a negative number lets it be worse by so much."""
    not_below: str | None = None
    """Another model of the run: the score is at least its, as far as the standard errors of both
    can tell (one of the difference)."""
    warn: bool = False
    """Where a condition does not hold, it is said, and stops nothing."""

    def __post_init__(self) -> None:
        if not self.conditions():
            raise ConfigError(f"gate rule on {self.variant} {self.score} sets no condition")

    def conditions(self) -> tuple[str, ...]:
        """Names of the conditions that are set."""
        names = ("at_least", "above_untrained_by_stderr", "better_than_baseline_by_stderr")
        chosen = tuple(name for name in names if getattr(self, name) is not None)
        chosen += ("not_below",) if self.not_below else ()
        return chosen + (("above_chance",) if self.above_chance else ())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One condition of one rule, decided."""

    variant: str
    """Model."""
    score: str
    """suite/name/lang."""
    rule: str
    """Name of the condition."""
    value: float | None
    """The score, or None if there is none."""
    against: float | None
    """What the value had to reach."""
    passed: bool
    """Whether it did, or need not."""
    reason: str
    """The decision in words."""
    warn: bool = False
    """Whether it stops nothing if it did not."""

    @property
    def stands(self) -> bool:
        """Whether it is no reason against the model."""
        return self.passed or self.warn

    @property
    def line(self) -> str:
        """The check for people."""
        state = "ok  " if self.passed else "WARN" if self.warn else "FAIL"
        return f"{state} {self.variant} {self.score} {self.rule}: {self.reason}"


def decide(rule: Rule, run: Mapping[str, Mapping[str, Score]]) -> list[Check]:
    """The checks of one rule. A score that is missing fails; a missing baseline does not.

    Args:
        rule: the rule.
        run: model of the run -> its scores by key.
    """
    scores = run[rule.variant]
    score = scores.get(rule.score)
    if score is None:
        reason = f"there is no such score; there are {len(scores)}, e.g. {sorted(scores)[:3]}"
        return [_check(rule, name, None, None, False, reason) for name in rule.conditions()]
    deciders = {
        "at_least": _at_least,
        "above_chance": _above_chance,
        "above_untrained_by_stderr": _above_untrained,
        "better_than_baseline_by_stderr": _above_baseline,
        "not_below": partial(_not_below, run=run),
    }
    return [deciders[name](rule, score) for name in rule.conditions()]


def _at_least(rule: Rule, score: Score) -> Check:
    wanted = rule.at_least
    assert wanted is not None
    passed = score.value >= wanted
    return _check(
        rule, "at_least", score.value, wanted, passed,
        f"{score.value:.1%} {'reaches' if passed else 'is below'} {wanted:.1%}",
    )  # fmt: skip


def _above_chance(rule: Rule, score: Score) -> Check:
    low, chance = score.interval[0], score.chance
    if chance is None:
        return _check(rule, "above_chance", low, None, False, "the score has no chance level")
    passed = low > chance
    return _check(
        rule, "above_chance", low, chance, passed,
        f"the 95 % interval starts at {low:.1%}, {'above' if passed else 'not above'} chance, "
        f"{chance:.1%}",
    )  # fmt: skip


def _above_untrained(rule: Rule, score: Score) -> Check:
    name, margin = "above_untrained_by_stderr", rule.above_untrained_by_stderr
    assert margin is not None
    if score.untrained is None:
        return _check(rule, name, score.value, None, False, "no untrained control was scored")
    spread = math.hypot(_spread(score.stderr, score.n), _spread(score.untrained_stderr, score.n))
    return _lead(rule, name, score.value, score.untrained, spread, margin, "the untrained control")


def _above_baseline(rule: Rule, score: Score) -> Check:
    name, margin = "better_than_baseline_by_stderr", rule.better_than_baseline_by_stderr
    assert margin is not None
    if score.baseline is None:
        return _check(rule, name, score.value, None, True, "there is no baseline to compare with")
    spread = _spread(score.baseline_lead_stderr, score.n)
    return _lead(rule, name, score.value, score.baseline, spread, margin, "the baseline")


def _not_below(rule: Rule, score: Score, *, run: Mapping[str, Mapping[str, Score]]) -> Check:
    other = run.get(rule.not_below or "", {}).get(rule.score)
    if other is None:
        reason = f"{rule.not_below} has no such score"
        return _check(rule, "not_below", score.value, None, False, reason)
    spread = math.hypot(_spread(score.stderr, score.n), _spread(other.stderr, other.n))
    return _lead(rule, "not_below", score.value, other.value, spread, -1, str(rule.not_below))


def _lead(
    rule: Rule, name: str, value: float, other: float, spread: float, margin: float, who: str
) -> Check:
    wanted = other + margin * spread
    passed = value > wanted
    return _check(
        rule, name, value, wanted, passed,
        f"{value:.1%} against {other:.1%} of {who}: "
        f"{(value - other) / spread:.1f} standard errors, more than {margin:g} asked",
    )  # fmt: skip


def _spread(stderr: float | None, n: int) -> float:
    """A standard error, at least that of one hit in n: a share of 0 is not known exactly."""
    return max(stderr or 0.0, math.sqrt((1 / n) * (1 - 1 / n) / n) if n > 1 else Z_95)


def _check(
    rule: Rule, name: str, value: float | None, against: float | None, passed: bool, reason: str
) -> Check:
    return Check(
        variant=rule.variant, score=rule.score, rule=name, value=value,
        against=None if against is None else round(against, 6), passed=passed, reason=reason,
        warn=rule.warn,
    )  # fmt: skip
