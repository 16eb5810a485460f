"""Accuracy of short answers against those of several people (TextVQA, VQAv2, ST-VQA).

Source: the EvalAI answer processor as in internvl_chat/eval/vqa/textvqa_eval.py.
"""

import re
from collections.abc import Sequence

from vlfoundry.infra.core.errors import DataError

PEOPLE = 10
AGREEING = 3
"""So many others with the same answer make it fully right."""

MARKS = ';/[]"{}()=+\\_-><@`!'
PERIOD = re.compile(r"\.(?!\d)")
PERIODS_DROPPED = 32
"""The script passes a flag of this value where `re.sub` takes a count."""
ARTICLES = {"a", "an", "the"}
NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
    "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
CONTRACTIONS = """
ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't
needn't oughtn't shan't shouldn't wasn't weren't won't wouldn't couldn't've hadn't've mightn't've
shouldn't've wouldn't've could've might've must've not've should've they've we've what've where've
who've would've you've he'd how'd it'd someone'd something'd there'd they'd where'd who'd you'd
he'd've it'd've she'd've somebody'd've someone'd've something'd've there'd've they'd've we'd've
who'd've you'd've y'all'd've how'll it'll somebody'll someone'll something'll they'll what'll
who'll why'll you'll y'all'll there're they're what're why're you're he's how's somebody's
someone's that's there's what's when's where's who's why's y'all ma'am o'clock 'twas
"""


def _with_one_apostrophe_missing(word: str) -> list[str]:
    return [word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'"]


MENDED = {
    spelt: word for word in CONTRACTIONS.split() for spelt in _with_one_apostrophe_missing(word)
} | {"somebody'd": "somebodyd", "'ows'at": "'ow's'at"}


def plain_answer(text: str) -> str:
    """The answer without case, articles and punctuation; number words as digits.

    A mark that stands beside a blank anywhere in the text vanishes, otherwise it becomes a blank.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = re.sub(r"[\n\t]", " ", text.strip()).strip()
    blank = {mark: "" if f"{mark} " in text or f" {mark}" in text else " " for mark in MARKS}
    text = PERIOD.sub("", text.translate(str.maketrans(blank)), count=PERIODS_DROPPED)
    words = [NUMBERS.get(word, word) for word in text.split()]
    return " ".join(MENDED.get(word, word) for word in words if word not in ARTICLES)


def soft_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Mean over the ten people, each left out in turn, of min(1, others that agree / 3).

    Raises DataError unless there are exactly ten answers.
    """
    if len(answers) != PEOPLE:
        raise DataError(f"got {len(answers)} answers, expected the {PEOPLE} of TextVQA and VQAv2")
    said = plain_answer(prediction)
    agree = [plain_answer(answer) == said for answer in answers]
    if not any(agree):
        return 0.0
    return sum(min(1.0, (sum(agree) - own) / AGREEING) for own in agree) / PEOPLE


def any_answer_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction is one of the answers, else 0 (ST-VQA)."""
    if not answers:
        raise DataError("no answers to compare with; expected at least one")
    return float(plain_answer(prediction) in {plain_answer(answer) for answer in answers})
