"""Scores, their intervals, ranks and chance levels, and the metrics behind them."""

import subprocess
import sys

import numpy as np
import pytest

from vlfoundry.eval.compare.scores import (
    mean_score,
    read_items,
    read_scores,
    with_untrained,
    write_items,
    write_scores,
)
from vlfoundry.eval.compare.stats import bootstrap_interval, wilson_interval
from vlfoundry.eval.metrics import METRICS, compute
from vlfoundry.eval.metrics.ranking import best_rank, chance_at, top_candidates
from vlfoundry.infra.core.errors import DataError


def test_wilson_interval_of_a_textbook_case():
    low, high = wilson_interval(0.1, 10)
    assert (round(low, 4), round(high, 4)) == (0.0179, 0.4042)
    assert wilson_interval(0.0, 20)[0] == 0.0
    assert wilson_interval(0.0, 20)[1] > 0.1


def test_wilson_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    shares = rng.binomial(60, 0.05, 2000) / 60
    inside = [
        wilson_interval(share, 60)[0] <= 0.05 <= wilson_interval(share, 60)[1] for share in shares
    ]
    assert 0.93 <= np.mean(inside) <= 0.985


def test_bootstrap_is_seeded_and_near_the_normal_interval():
    values = np.random.default_rng(1).normal(0.5, 0.1, 400)
    low, high = bootstrap_interval(values, seed=3)
    assert (low, high) == bootstrap_interval(values, seed=3)
    assert (low, high) != bootstrap_interval(values, seed=4)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def test_ties_count_against_the_model():
    scores = np.array([[0.5, 0.5, 0.5], [0.1, 0.9, 0.2], [0.7, 0.7, 0.1]])
    right = np.array([[True, False, False], [False, False, True], [True, True, False]])
    assert best_rank(scores, right).tolist() == [3, 2, 1]
    assert top_candidates(scores, right, 2).tolist() == [[1, 2], [1, 2], [0, 1]]


def test_rank_agrees_with_sorting():
    rng = np.random.default_rng(0)
    scores, right = rng.normal(size=(50, 30)), rng.random((50, 30)) < 0.1
    right[np.arange(50), rng.integers(0, 30, 50)] = True
    order = np.argsort(-scores, axis=1)
    expected = [1 + min(np.flatnonzero(right[q][order[q]])) for q in range(50)]
    assert best_rank(scores, right).tolist() == expected


def test_chance_is_what_guessing_reaches():
    assert chance_at(5, np.array([1, 1]), 100) == pytest.approx(0.05)
    assert chance_at(10, np.array([1]), 4) == 1.0
    rng = np.random.default_rng(0)
    right = np.zeros((1, 20), bool)
    right[0, :3] = True
    hits = [best_rank(rng.random((1, 20)), right)[0] <= 5 for _ in range(4000)]
    assert np.mean(hits) == pytest.approx(chance_at(5, np.array([3]), 20), abs=0.03)


def test_a_score_survives_its_file_and_the_file_is_stable(tmp_path):
    items = write_items(tmp_path / "items", "one", [{"b": np.float32(0.1), "a": [np.int64(3)]}])
    assert items == "items/one.jsonl"
    assert read_items(tmp_path / items) == [{"a": [3], "b": 0.1}]
    score = mean_score("s", "n", [1, 0, 0, 1], lang="en", chance=0.25, items=items)
    assert (score.value, score.n, score.stderr, score.key) == (0.5, 4, 0.25, "s/n/en")
    control = mean_score("s", "n", [0, 0, 0, 1], lang="en")
    (both,) = with_untrained([score], [control])
    assert both.untrained == 0.25
    write_scores(tmp_path / "scores.json", [both], model={"kind": "x"}, data={})
    assert read_scores(tmp_path / "scores.json") == [both]
    first = (tmp_path / "scores.json").read_bytes()
    write_scores(tmp_path / "scores.json", [both], model={"kind": "x"}, data={})
    assert (tmp_path / "scores.json").read_bytes() == first


def test_a_score_of_nothing_and_a_foreign_file_are_refused(tmp_path):
    with pytest.raises(DataError, match="no items to score"):
        mean_score("s", "n", [])
    with pytest.raises(DataError, match="does not exist"):
        read_scores(tmp_path / "none.json")
    (tmp_path / "x.json").write_text('{"format": "other"}')
    with pytest.raises(DataError, match=r"format 'other', expected 'vlfoundry\.scores\.v1'"):
        read_scores(tmp_path / "x.json")


CASES = {
    "topk_accuracy": ([[3, 1], [2, 0]], [[1], [2, 9]], {"k": (1, 2)}, {"top1": 0.5, "top2": 1.0}),
    "recall_at_k": ([1, 7, 3], [1, 1, 2], {"k": (1, 5)}, {"r1": 1 / 3, "r5": 2 / 3}),
    "iou_accuracy": (
        [[0, 0, 10, 10], [], [0, 0, 10, 5]],
        [[0, 0, 10, 10], [0, 0, 1, 1], [0, 0, 10, 10]],
        {},
        {"accuracy": 2 / 3, "mean_iou": 0.5, "unparsed": 1},
    ),
    "exact_match": (
        ["Red. ", "ＢＬＵＥ", "no"],
        [["red"], ["blue"], ["yes"]],
        {},
        {"exact_match": 2 / 3},
    ),
    "token_f1": (
        ["a red dog", "红色的狗", ""],
        [["a red cat", "x"], ["红色的猫"], ["dog"]],
        {},
        {"token_f1": (2 / 3 + 3 / 4 + 0) / 3},
    ),
    "chrf": (["same text", "xyz"], [["same text"], ["abc"]], {}, {"chrf": 0.5}),
}


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_loads_by_path_and_gives_known_values(name):
    predictions, references, options, expected = CASES[name]
    result = compute(name, predictions=predictions, references=references, **options)
    assert {key: result[key] for key in expected} == pytest.approx(expected)


def test_chrf_agrees_with_a_hand_count():
    # "abc" against "abd": 1-grams 2/3, 2-grams 1/2, 3-grams 0; the mean is 7/18 both ways
    result = compute("chrf", predictions=["abc"], references=[["abd"]])
    assert result["chrf"] == pytest.approx(7 / 18)


def test_a_metric_does_not_import_transformers():
    code = (
        "import sys; from vlfoundry.eval.metrics import compute;"
        "compute('exact_match', predictions=['a'], references=[['a']]);"
        "heavy = {'torch', 'transformers'} & set(sys.modules); import transformers;"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
