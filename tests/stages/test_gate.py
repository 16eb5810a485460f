"""The gate: each kind of rule holds and fails for the right reason."""

import dataclasses
import json
from pathlib import Path

import pytest

from vlfoundry.eval.compare.rules import Rule, decide
from vlfoundry.eval.compare.scores import mean_score, with_baseline, with_untrained, write_scores
from vlfoundry.eval.outputs import OUTPUTS
from vlfoundry.infra.core.config import build
from vlfoundry.infra.core.errors import ConfigError
from vlfoundry.infra.core.stage import Context
from vlfoundry.stages.gate import STAGE, Config

ROOT = Path(__file__).parents[2]


def score(hits=30, n=100, chance=0.05, untrained=5):
    made = mean_score("zero_shot", "top1", [1] * hits + [0] * (n - hits), lang="en", chance=chance)
    control = mean_score("zero_shot", "top1", [1] * untrained + [0] * (n - untrained), lang="en")
    return with_untrained([made], [control])[0]


def only(rule, made, other=None):
    full = {"variant": "internvl_c", "score": "zero_shot/top1/en"} | rule
    run = {"internvl_c": {made.key: made}, "internvl_g": {other.key: other} if other else {}}
    (check,) = decide(build(Rule, full), run)
    return check


def beside(made, earlier):
    return with_baseline([made], [earlier])[0]


@pytest.mark.parametrize(
    ("rule", "made", "passed", "reason"),
    [
        ({"at_least": 0.3}, score(30), True, r"30\.0% reaches 30\.0%"),
        ({"at_least": 0.31}, score(30), False, r"30\.0% is below 31\.0%"),
        ({"above_chance": True}, score(30), True, "above chance, 5.0%"),
        ({"above_chance": True}, score(8), False, "not above chance"),
        ({"above_untrained_by_stderr": 3}, score(30), True, "of the untrained control"),
        ({"above_untrained_by_stderr": 3}, score(10), False, "of the untrained control"),
    ],
)
def test_conditions(rule, made, passed, reason):
    check = only(rule, made)
    assert check.passed is passed
    assert pytest.approx(check.value) == (
        made.interval[0] if "above_chance" in rule else made.value
    )
    import re

    assert re.search(reason, check.reason)


def test_zero_against_zero_is_no_lead():
    check = only({"above_untrained_by_stderr": 1}, score(0, untrained=0))
    assert not check.passed


def test_a_baseline_counts_only_if_there_is_one():
    rule = {"better_than_baseline_by_stderr": 0}
    assert only(rule, score(30)).passed
    assert "no baseline" in only(rule, score(30)).reason
    assert only(rule, beside(score(31), score(30))).passed
    assert not only(rule, beside(score(30), score(30))).passed  # a copy of it is not better
    assert not only(rule, beside(score(29), score(30))).passed


def test_a_negative_margin_lets_it_be_a_little_worse():
    rule = {"better_than_baseline_by_stderr": -1}
    assert only(rule, beside(score(30), score(30))).passed
    assert only(rule, beside(score(29), score(30))).passed is False
    assert not only(rule, beside(score(20), score(30))).passed


def test_a_lead_is_measured_item_by_item():
    """5 items more of the same 100 are 2.3 standard errors; of other ones they would be 0.8."""
    rule = {"better_than_baseline_by_stderr": 2}
    assert only(rule, beside(score(35), score(30))).passed
    other = dataclasses.replace(score(30), by_item=score(30).by_item[::-1])
    check = only(rule, beside(score(35), other))
    assert not check.passed
    assert "35.0% against 30.0% of the baseline: 0." in check.reason


def test_a_model_is_held_against_another_of_the_run():
    rule = {"not_below": "internvl_g"}
    assert only(rule, score(30), score(30)).passed
    assert only(rule, score(27), score(30)).passed  # half a standard error
    check = only(rule, score(20), score(30))
    assert not check.passed
    assert "20.0% against 30.0% of internvl_g: -1.6 standard errors" in check.reason
    assert "internvl_g has no such score" in only(rule, score(30)).reason
    with pytest.raises(ConfigError, match=r"no model \['internvl_x'\]"):
        build(Config, {"gate": {"candidate": "internvl_c", "rules": [
            {"variant": "internvl_c", "score": "x", "not_below": "internvl_x"}]}})  # fmt: skip


def test_a_missing_score_fails_and_says_what_there_is():
    made = dataclasses.replace(score(), lang="zh")
    check = only({"at_least": 0.0}, made)
    assert not check.passed
    assert "zero_shot/top1/zh" in check.reason


def test_rules_without_a_condition_or_a_model_are_refused():
    with pytest.raises(ConfigError, match="sets no condition"):
        build(Rule, {"variant": "internvl_c", "score": "x"})
    rule = {"variant": "internvl_c", "score": "x", "at_least": 0.1}
    with pytest.raises(ConfigError, match=r"no model \['internvl_x'\]"):
        build(Config, {"gate": {"candidate": "internvl_x", "rules": [rule]}})
    with pytest.raises(ConfigError, match="lets everything pass"):
        build(Config, {"gate": {"candidate": "internvl_c", "rules": []}})


def decided(root, *rules):
    """The stage's decision on one score, for Chat full."""
    for variant in OUTPUTS:
        write_scores(root / OUTPUTS[variant].scores, [score()], model={"fingerprint": "f"}, data={})
    common = {"variant": "internvl_c", "score": "zero_shot/top1/en"}
    config = build(
        Config, {"gate": {"candidate": "chat_full", "rules": [common | rule for rule in rules]}}
    )
    STAGE.run(config, Context(STAGE.bind(None), root, "key"))
    return json.loads((root / "artifacts/gate/gate.json").read_text())


def test_a_rule_may_warn_alone(tmp_path):
    gate = decided(tmp_path, {"at_least": 0.2}, {"at_least": 0.5, "warn": True})
    assert gate["passed"] is True
    assert gate["reasons"] == []
    assert [line[:41] for line in gate["warnings"]] == ["WARN internvl_c zero_shot/top1/en at_leas"]
    assert [check["passed"] for check in gate["checks"]] == [True, False]
    gate = decided(tmp_path, {"at_least": 0.5}, {"at_least": 0.2, "warn": True})
    assert (gate["passed"], len(gate["reasons"]), gate["warnings"]) == (False, 1, [])
    with pytest.raises(ConfigError, match="no rule that can fail"):
        decided(tmp_path, {"at_least": 0.2, "warn": True})


@pytest.mark.parametrize(("at_least", "passed"), [(0.2, True), (0.5, False)])
def test_the_stage_writes_its_decision(tmp_path, at_least, passed):
    for variant in OUTPUTS:
        write_scores(
            tmp_path / OUTPUTS[variant].scores, [score()], model={"fingerprint": "f"}, data={},
            baseline={"name": f"earlier {variant}"},
        )  # fmt: skip
    rules = [
        {"variant": "internvl_c", "score": "zero_shot/top1/en", "at_least": at_least},
        {"variant": "internvl_c", "score": "zero_shot/top1/en", "above_chance": True},
    ]
    config = build(Config, {"gate": {"candidate": "chat_full", "rules": rules}})
    STAGE.run(config, Context(STAGE.bind(None), tmp_path, "key"))
    gate = json.loads((tmp_path / "artifacts/gate/gate.json").read_text())
    assert gate["passed"] is passed
    assert gate["model"] == OUTPUTS["chat_full"].folder
    assert gate["baseline"] == {"name": "earlier chat_full"}
    assert [check["passed"] for check in gate["checks"]] == [passed, True]
    assert gate["unwatched"] == ["chat_full", "chat_simple", "internvl_g"]
    assert len(gate["reasons"]) == (0 if passed else 1)


def test_rules_look_at_every_model_of_the_run():
    """Of params.yaml, and of every profile over it."""
    from vlfoundry.flows.recipes import PROFILES, with_profile
    from vlfoundry.infra.core.config import load_params

    params = load_params(ROOT / "params.yaml")
    profiles = sorted(path.stem for path in (ROOT / PROFILES).glob("*.yaml"))
    assert len(profiles) > 5
    for given in (params, *(with_profile(params, ROOT, name) for name in profiles)):
        assert {rule["variant"] for rule in given["gate"]["rules"]} == set(OUTPUTS)
