"""Our benchmark metrics against recorded ones (golden group F).

A folder holds one file of cases a metric, e.g. anls.json: a list of records. A record names its
inputs and what the official function made of them; one without inputs is about all before it.
Whatever a record holds that is neither a known input nor one of our results fails.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vlfoundry.eval.metrics.official.anls import anls_infographics, anls_stvqa
from vlfoundry.eval.metrics.official.boxes import (
    box_in_pixels,
    box_iou,
    grounding_accuracy,
    is_right,
)
from vlfoundry.eval.metrics.official.charts import exact_accuracy, relaxed_accuracy, relaxed_correct
from vlfoundry.eval.metrics.official.classification import (
    average_precision_per_class,
    class_embeddings,
    mean_average_precision,
    zero_shot_accuracy,
    zero_shot_logits,
)
from vlfoundry.eval.metrics.official.retrieval import retrieval_recall
from vlfoundry.eval.metrics.official.vqa import any_answer_accuracy, plain_answer, soft_accuracy
from vlfoundry.eval.metrics.official.yes_no import mme_answer, mme_task, mme_tidy, pope_scores
from vlfoundry.eval.parity.check import Check, close, same
from vlfoundry.infra.core.errors import DataError

ATOL = 1e-6
ATOL_OF = {"logits": 1e-4, "predicted_box_pixels": 1e-4}
"""Single-precision numbers that reach into the hundreds."""
EXTRA_ANNOTATION = "overall_with_extra_annotation_"
ABOUT_THE_FOLDER = {"meta.json"}

Record = dict[str, Any]
Compute = Callable[[Record, list[Record]], Record]


def is_metrics(folder: Path) -> bool:
    """Whether the folder holds recorded metrics."""
    return any((folder / f"{name}.json").is_file() for name in METRICS)


def check_metrics(folder: Path) -> list[Check]:
    """One check a recorded value; raises DataError if the folder holds no recorded metric."""
    if not is_metrics(folder):
        raise DataError(f"{folder} holds no recorded metrics, expected e.g. anls.json")
    files = sorted(path for path in folder.glob("*.json") if path.name not in ABOUT_THE_FOLDER)
    return [check for file in files for check in _check_file(file)]


def _check_file(file: Path) -> Iterator[Check]:
    if file.stem not in METRICS:
        yield Check(name=file.stem, passed=False, note="no metric of this name here")
        return
    inputs, compute = METRICS[file.stem]
    records = _read(file)
    for index, record in enumerate(records):
        name = f"{file.stem}[{index}]"
        try:
            got = compute(record, records)
        except (DataError, KeyError) as error:
            yield Check(name=name, passed=False, note=f"{type(error).__name__}: {error}")
            continue
        recorded = _flat({key: value for key, value in record.items() if key not in inputs})
        if not recorded:
            yield Check(name=name, passed=False, note="the record holds no result")
        for key, wanted in recorded.items():
            yield _compare(f"{name}.{key}", key, _flat(got), wanted)


def _read(file: Path) -> list[Record]:
    try:
        records = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file} is not JSON: {error}") from error
    if not isinstance(records, list) or not records:
        raise DataError(f"{file} must hold a list of at least one record")
    return records


def _flat(record: Record) -> Record:
    """The record with the entries of its dictionaries beside its own."""
    flat: Record = {}
    for key, value in record.items():
        flat |= value if isinstance(value, dict) else {key: value}
    return flat


def _compare(name: str, key: str, results: Record, wanted: Any) -> Check:
    if key not in results:
        return Check(name=name, passed=False, note="recorded, but we compute no such value")
    got, note = results[key], ""
    if isinstance(got, _AnyOf):
        note = f"ties: any of {', '.join(f'{value:.6g}' for value in got)}"
        got = min(got, key=lambda value: abs(value - wanted)) if _is_number(wanted) else got[0]
    if got is None or not _is_number(wanted):
        return same(name, got, wanted, note)
    return close(name, got, wanted, atol=ATOL_OF.get(key, ATOL), note=note)


def _is_number(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_number, value))
    return isinstance(value, int | float) and not isinstance(value, bool)


class _AnyOf(tuple[float, ...]):
    """What a share may be as tied items fall one way or the other: torch.topk leaves it open."""


def _with_ties(
    compute: Callable[[np.ndarray], Record],
    scores: Any,
    right: np.ndarray,
    items: Callable[[str], int],
) -> Record:
    """Results with ties against the model, or all possible ones; `items` a share is the mean of."""
    table = np.asarray(scores, np.float64)
    against, favoured = compute(table), compute(np.where(right, np.nextafter(table, np.inf), table))
    results = against.copy()
    for key, low in against.items():
        if low != favoured[key]:
            hits = range(round(low * items(key)), round(favoured[key] * items(key)) + 1)
            results[key] = _AnyOf(count / items(key) for count in hits)
    return results


def _classification(case: Record, _: list[Record]) -> Record:
    targets = np.array(case["target"])
    right = targets[:, None] == np.arange(case["n_classes"])
    results = _with_ties(
        lambda x: zero_shot_accuracy(x, targets), case["logits"], right, lambda _: len(targets)
    )
    recall = zero_shot_accuracy(case["logits"], targets)["mean_per_class_recall"]
    return results | {"mean_per_class_recall": recall}


def _multilabel(case: Record, _: list[Record]) -> Record:
    scores, targets = case["scores"], case["targets"]
    return {
        "ap_per_class": average_precision_per_class(scores, targets),
        "mean_average_precision": mean_average_precision(scores, targets),
    }


def _ensemble(case: Record, _: list[Record]) -> Record:
    classes = class_embeddings(case["text_features"])
    logits = zero_shot_logits(case["image_features"], classes)
    return {"classifier_DxC": classes, "logits": logits}


def _retrieval(case: Record, _: list[Record]) -> Record:
    scores, owner = np.array(case["scores_text_by_image"]), np.array(case["text_image_index"])
    cuts = sorted({int(key.rpartition("@")[2]) for key in case["recall"]})
    texts, pictures = scores.shape
    right = owner[:, None] == np.arange(pictures)
    return _with_ties(
        lambda x: retrieval_recall(x, owner, cuts),
        scores,
        right,
        lambda key: texts if key.startswith("image_retrieval") else pictures,
    )


def _answer_processor(case: Record, _: list[Record]) -> Record:
    return {"processed": plain_answer(case["raw"])}


def _vqa(case: Record, _: list[Record]) -> Record:
    said, answers = case["pred_answer"], case["gt_answers"]
    return {
        "textvqa_accuracy": soft_accuracy(said, answers),
        "stvqa_accuracy": any_answer_accuracy(said, answers),
    }


def _anls(case: Record, cases: list[Record]) -> Record:
    if "prediction" not in case:
        items = [_anls(item, cases) for item in cases if "prediction" in item]
        mean = np.mean([item["infographics_anls"] for item in items])
        return {"overall_infographics_anls": mean}
    said, answers = case["prediction"], case["answers"]
    return {
        "infographics_anls": anls_infographics(said, answers),
        "stvqa_anls": anls_stvqa(said, answers),
    }


def _relaxed(case: Record, cases: list[Record]) -> Record:
    if "prediction" not in case:
        items = [item for item in cases if "prediction" in item]
        said, targets = zip(*((i["prediction"], i["target"]) for i in items), strict=True)
        extra = {key: key.removeprefix(EXTRA_ANNOTATION) for key in case}
        return {
            key: relaxed_accuracy(said, [[target, text] for target in targets], compat=True)
            for key, text in extra.items()
            if key.startswith(EXTRA_ANNOTATION)
        }
    said, target = case["prediction"], case["target"]
    return {
        "relaxed_correct": relaxed_correct(said, target),
        "exact_match": exact_accuracy([said], [[target]]),
    }


def _pope(case: Record, _: list[Record]) -> Record:
    scores = pope_scores(case["texts"], case["labels"])
    return {**scores, "f1_score": scores["f1"]}


def _mme(case: Record, cases: list[Record]) -> Record:
    if "raw" in case:
        raw = case["raw"]
        return {"post_processing": mme_tidy(raw), "parse_pred_ans_of_lower": mme_answer(raw)}
    if "lines" not in case:
        tasks = [item for item in cases if "lines" in item]
        return {"total": sum(_mme(task, cases)["score"] for task in tasks)}
    pictures, _, labels, texts = zip(*case["lines"], strict=True)
    return {**mme_task(pictures, labels, texts), "parsed": [mme_answer(text) for text in texts]}


def _refcoco(case: Record, cases: list[Record]) -> Record:
    if "answer" not in case:
        items = [item for item in cases if "answer" in item]
        columns = zip(*((i["answer"], i["gt_bbox"], i["hw"]) for i in items), strict=True)
        return {"precision_at_1": grounding_accuracy(*columns)}
    box = box_in_pixels(case["answer"], *case["hw"])
    iou = box_iou(box, case["gt_bbox"])
    return {"predicted_box_pixels": box, "iou": iou, "correct": is_right(iou)}


METRICS: dict[str, tuple[set[str], Compute]] = {
    "zeroshot_classification": ({"logits", "target", "n_classes"}, _classification),
    "multilabel_map": ({"scores", "targets"}, _multilabel),
    "zeroshot_prompt_ensemble": ({"image_features", "text_features"}, _ensemble),
    "retrieval": ({"scores_text_by_image", "text_image_index"}, _retrieval),
    "vqa_answer_processor": ({"raw"}, _answer_processor),
    "vqa_accuracy": ({"pred_answer", "gt_answers"}, _vqa),
    "anls": ({"prediction", "answers"}, _anls),
    "relaxed_accuracy": ({"prediction", "target"}, _relaxed),
    "pope": ({"texts", "labels"}, _pope),
    "mme": ({"lines", "name", "raw"}, _mme),
    "refcoco": ({"answer", "gt_bbox", "hw"}, _refcoco),
}
"""For each file of cases: the inputs of a record, and our results for it."""
