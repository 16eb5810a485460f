"""Where is the named drawing in a composed scene? The reply must hold [x1,y1,x2,y2] in 0..1000."""

from typing import Any

import numpy as np

from vlfoundry.eval.compare.scores import Score, mean_score, write_items
from vlfoundry.eval.context import EvalContext, Model
from vlfoundry.eval.datasets.folders import DataFolder
from vlfoundry.eval.metrics import compute
from vlfoundry.eval.questions import ask, by_language, keep_scenes, nearest_answers, replies
from vlfoundry.eval.suite import Headline, Suite
from vlfoundry.infra.data.synthetic.scenes import parse_box

NAME = "box"
IOU_THRESHOLD = 0.5
MAX_NEW_TOKENS = 24


def run(model: Model, data: DataFolder, setting: EvalContext) -> list[Score]:
    """Share of boxes with IoU >= 0.5, the mean IoU, and the share of replies that hold a box.

    A reply without a box counts as IoU 0 and is reported. Chance is the best constant box.
    """
    questions = ask(
        data, NAME, languages=setting.languages, count=setting.scenes, seed=setting.seed
    )
    keep_scenes(setting.items_dir, questions)
    said = replies(
        model, [q.image for q in questions], [q.prompt for q in questions], MAX_NEW_TOKENS
    )
    boxes = [list(parse_box(text) or ()) for text in said]
    truths = [list(q.box) for q in questions]
    ious = _ious(boxes, truths)
    middle = np.median(np.array(truths), axis=0).tolist()
    constant = _ious([middle] * len(truths), truths)
    near = nearest_answers(questions, NAME, setting)
    reference = _ious([list(n.box) for n in near], truths) if near else None
    parsed = np.array([bool(box) for box in boxes], float)
    items = write_items(
        setting.items_dir,
        NAME,
        (
            {"id": q.id, "lang": q.lang, "prompt": q.prompt, "answer": q.answer, "said": text,
             "box": boxes[i], "truth": truths[i], "iou": ious[i], "picture": q.picture}
            for i, (q, text) in enumerate(zip(questions, said, strict=True))
        ),
    )  # fmt: skip
    measures = {"accuracy_iou50": lambda x: (x >= IOU_THRESHOLD).astype(float), "mean_iou": _same}
    scores = [
        mean_score(
            NAME,
            name,
            measure(ious[rows]),
            lang=lang,
            chance=float(measure(constant[rows]).mean()),
            reference=None if reference is None else float(measure(reference[rows]).mean()),
            items=items,
            seed=setting.seed,
        )
        for name, measure in measures.items()
        for lang, rows in by_language(questions).items()
    ]
    return [*scores, mean_score(NAME, "has_box", parsed, items=items, seed=setting.seed)]


def _ious(boxes: Any, truths: Any) -> np.ndarray:
    return np.array(compute("iou_accuracy", predictions=boxes, references=truths)["per_item"])


def _same(values: np.ndarray) -> np.ndarray:
    return values


SUITE = Suite(
    name=NAME,
    position=70,
    needs="chat",
    data="concepts",
    asks="where the named drawing is in a composed scene, as [x1,y1,x2,y2] in 0..1000",
    metrics=("iou_accuracy",),
    run=run,
    whole=("accuracy_iou50", "mean_iou", "has_box"),
    each=("accuracy_iou50", "mean_iou"),
    opened=True,
    headlines=(
        Headline(kind="chat_simple", key="accuracy_iou50", label="boxes at IoU 0.5, chat simple"),
        Headline(kind="chat_full", key="accuracy_iou50", label="boxes at IoU 0.5, chat full"),
    ),
)
