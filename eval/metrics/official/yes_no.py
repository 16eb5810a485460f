"""Yes-or-no benchmarks: POPE and MME.

Sources: Y. Li et al., EMNLP 2023, and internvl_chat/eval/pope/eval_pope.py; C. Fu et al., MME,
arXiv 2306.13394, and its calculation.py with internvl_chat/eval/mme/eval.py.
"""

import re
from collections.abc import Sequence

from vlfoundry.eval.metrics.official.inputs import same_length
from vlfoundry.infra.core.errors import DataError

NEGATIONS = {"No", "no", "not"}
MME_LETTERS = 4
MME_QUESTIONS = 2
MME_WORDS = (("不是", "no"), ("是", "yes"), ("否", "no"))
HAN = re.compile("[\u4e00-\u9fa5]")


def pope_answer(text: str) -> str:
    """yes, but no if the first sentence holds No, no or not as a word between blanks."""
    first = text.split(".")[0].replace(",", "")
    return "yes" if NEGATIONS.isdisjoint(first.split(" ")) else "no"


def pope_scores(texts: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """TP, FP, TN, FN (counts, "yes" is positive) and accuracy, precision, recall, f1, yes_ratio.

    A ratio whose denominator is 0 is 0; the script stops there.
    """
    total = same_length(texts=texts, labels=labels)
    counts = _confusion([pope_answer(text) for text in texts], labels)
    precision, recall = _precision_recall(counts)
    return {
        **counts,
        "accuracy": (counts["TP"] + counts["TN"]) / total,
        "precision": precision,
        "recall": recall,
        "f1": _ratio(2 * precision * recall, precision + recall),
        "yes_ratio": (counts["TP"] + counts["FP"]) / total,
    }


def mme_tidy(text: str) -> str:
    """The reply as MME's answer file holds it: Chinese and true/false become yes and no.

    Lower case, without line breaks and the remaining Chinese characters.
    """
    text = text.replace("\n", "")
    for word, answer in MME_WORDS:
        text = text.replace(word, answer)
    return HAN.sub("", text.lower().replace("true", "yes").replace("false", "no"))


def mme_answer(text: str) -> str:
    """yes or no, whichever occurs in the first 4 characters (yes before no), otherwise other."""
    start = text.lower()[:MME_LETTERS]
    return next((answer for answer in ("yes", "no") if answer in start), "other")


def mme_task(
    pictures: Sequence[str], labels: Sequence[str], texts: Sequence[str]
) -> dict[str, float]:
    """One task: score (0 to 200), acc, acc_plus, precision, recall, and counts.

    Two questions on each picture stand one after the other; acc_plus is the share of pictures with
    both right; the score is 100 acc + 100 acc_plus. Replies that are neither yes nor no are wrong,
    counted in other_num, and left out of TP, FP, TN, FN, precision and recall. Raises DataError if
    the questions do not come in pairs.
    """
    total = same_length(pictures=pictures, labels=labels, texts=texts)
    if total % MME_QUESTIONS or list(pictures[0::2]) != list(pictures[1::2]):
        raise DataError("MME asks two questions on each picture, one after the other")
    wanted = [label.lower() for label in labels]
    said = [mme_answer(text) for text in texts]
    right = [answer == label for answer, label in zip(said, wanted, strict=True)]
    counts = _confusion(said, wanted)
    precision, recall = _precision_recall(counts)
    acc = sum(right) / total
    both = [first and second for first, second in zip(right[0::2], right[1::2], strict=True)]
    acc_plus = sum(both) / len(both)
    return {
        **counts,
        "other_num": said.count("other"),
        "precision": precision,
        "recall": recall,
        "acc": acc,
        "acc_plus": acc_plus,
        "score": 100 * acc + 100 * acc_plus,
    }


def _confusion(said: Sequence[str], labels: Sequence[str]) -> dict[str, int]:
    if not {"yes", "no"}.issuperset(labels):
        raise DataError(f"labels {sorted(set(labels))[:5]}, expected only 'yes' and 'no'")
    pairs = list(zip(said, labels, strict=True))
    return {
        "TP": pairs.count(("yes", "yes")),
        "FP": pairs.count(("yes", "no")),
        "TN": pairs.count(("no", "no")),
        "FN": pairs.count(("no", "yes")),
    }


def _precision_recall(counts: dict[str, int]) -> tuple[float, float]:
    hits = counts["TP"]
    return _ratio(hits, hits + counts["FP"]), _ratio(hits, hits + counts["FN"])


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
