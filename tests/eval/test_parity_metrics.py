"""Recorded metrics are reproduced, and a metric that is wrong is found out."""

import json
import shutil
from pathlib import Path

import pytest

from vlfoundry.eval.metrics.official import anls, charts, classification, retrieval
from vlfoundry.eval.parity.metrics import METRICS, check_metrics, is_metrics
from vlfoundry.infra.core.errors import DataError

GOLDEN = Path(__file__).parent / "golden" / "metrics"


def failed(folder):
    return [check for check in check_metrics(folder) if not check.passed]


@pytest.fixture
def write(tmp_path):
    def put(name, *records):
        (tmp_path / f"{name}.json").write_text(json.dumps(records), encoding="utf-8")
        return tmp_path

    return put


def test_every_recorded_value_is_reproduced():
    checks = check_metrics(GOLDEN)
    names = [check.name for check in checks]
    assert len(set(names)) == len(names) > 1000
    assert {name.split("[")[0] for name in names} == set(METRICS)
    assert not [check for check in checks if not check.passed]


def average_without_empty_classes(scores, targets):
    per_class = classification.average_precision_per_class(scores, targets)
    return float(per_class[per_class > 0].mean())


def other_direction(scores, owner, cuts):
    recall = retrieval.retrieval_recall(scores, owner, cuts)
    swapped = {"image": "text", "text": "image"}
    return {swapped[k.split("_")[0]] + "_" + k.split("_", 1)[1]: v for k, v in recall.items()}


MISTAKES = [
    ("zeroshot_classification", "vlfoundry.eval.metrics.official.classification.TOP5_CLASSES", 6),
    ("zeroshot_classification", "vlfoundry.eval.metrics.official.classification.TOP5_CLASSES", 4),
    (
        "zeroshot_classification",
        "vlfoundry.eval.metrics.official.classification.mean_per_class_recall",
        lambda guess, truth: (guess == truth).mean(),
    ),
    (
        "multilabel_map",
        "vlfoundry.eval.parity.metrics.mean_average_precision",
        average_without_empty_classes,
    ),
    (
        "zeroshot_prompt_ensemble",
        "vlfoundry.eval.metrics.official.classification.LOGIT_SCALE",
        1 / 0.07,
    ),
    ("retrieval", "vlfoundry.eval.parity.metrics.retrieval_recall", other_direction),
    ("vqa_answer_processor", "vlfoundry.eval.metrics.official.vqa.MENDED", {}),
    ("vqa_answer_processor", "vlfoundry.eval.metrics.official.vqa.ARTICLES", {"a", "the", "and"}),
    ("vqa_answer_processor", "vlfoundry.eval.metrics.official.vqa.MARKS", "/-"),
    ("vqa_accuracy", "vlfoundry.eval.metrics.official.vqa.AGREEING", 2),
    ("anls", "vlfoundry.eval.parity.metrics.anls_infographics", anls.anls_stvqa),
    ("anls", "vlfoundry.eval.parity.metrics.anls_stvqa", anls.anls_infographics),
    (
        "relaxed_accuracy",
        "vlfoundry.eval.parity.metrics.relaxed_accuracy",
        lambda said, targets, compat: charts.relaxed_accuracy(said, targets),
    ),
    ("relaxed_accuracy", "vlfoundry.eval.metrics.official.charts._number", lambda text: None),
    ("pope", "vlfoundry.eval.metrics.official.yes_no.NEGATIONS", {"No", "no", "not", "NO"}),
    ("mme", "vlfoundry.eval.metrics.official.yes_no.MME_LETTERS", 3),
    ("mme", "vlfoundry.eval.metrics.official.yes_no.mme_answer", lambda text: text.lower().strip()),
    ("refcoco", "vlfoundry.eval.metrics.official.boxes.IOU_THRESHOLD", 0.55),
    ("refcoco", "vlfoundry.eval.metrics.official.boxes.FRACTIONS_SUM_BELOW", 1),
]


@pytest.mark.parametrize(
    ("file", "target", "wrong"), MISTAKES, ids=[f"{m[0]}-{i}" for i, m in enumerate(MISTAKES)]
)
def test_a_wrong_metric_fails(monkeypatch, tmp_path, file, target, wrong):
    shutil.copy(GOLDEN / f"{file}.json", tmp_path)
    assert not failed(tmp_path)
    monkeypatch.setattr(target, wrong)
    assert failed(tmp_path)


def test_every_file_has_a_mistake_to_find():
    assert {file for file, _, _ in MISTAKES} == set(METRICS)


def test_the_folder_is_known_by_its_files(write, tmp_path):
    assert is_metrics(GOLDEN)
    assert not is_metrics(tmp_path)
    with pytest.raises(DataError, match="no recorded metrics"):
        check_metrics(tmp_path)
    assert is_metrics(write("pope", {}))


def test_what_is_recorded_but_not_computed_fails(write):
    folder = write(
        "vqa_answer_processor", {"raw": "a dog", "processed": "dog", "new": 1}, {"raw": "a dog"}
    )
    assert [check.name for check in failed(folder)] == [
        "vqa_answer_processor[0].new",
        "vqa_answer_processor[1]",
    ]


def test_a_file_of_an_unknown_metric_fails(write):
    write("bleu", {"prediction": "a", "bleu": 1.0})
    folder = write("vqa_answer_processor", {"raw": "a dog", "processed": "dog"})
    assert [(check.name, check.note) for check in failed(folder)] == [
        ("bleu", "no metric of this name here")
    ]


def test_a_record_that_cannot_be_scored_fails_and_says_why(write):
    folder = write(
        "vqa_accuracy",
        {"pred_answer": "a", "gt_answers": ["a"] * 9, "textvqa_accuracy": 1.0},
        {"pred_answer": "a", "textvqa_accuracy": 1.0},
    )
    few, none = failed(folder)
    assert "got 9 answers, expected the 10" in few.note
    assert "gt_answers" in none.note


@pytest.mark.parametrize("text", ["{", "{}", "[]"])
def test_a_file_that_is_no_list_of_records_is_an_error(tmp_path, text):
    (tmp_path / "pope.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"pope\.json"):
        check_metrics(tmp_path)


@pytest.mark.parametrize(("acc1", "passes"), [(0.5, True), (1.0, True), (0.0, False), (0.6, False)])
def test_where_scores_tie_either_order_passes_and_nothing_else(write, acc1, passes):
    case = {"logits": [[1, 1, 0], [0, 0, 2]], "target": [1, 2], "n_classes": 3, "acc1": acc1}
    (check,) = check_metrics(write("zeroshot_classification", case))
    assert check.passed == passes
    assert check.note == "ties: any of 0.5, 1"
