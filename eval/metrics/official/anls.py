"""Average normalised Levenshtein similarity, for answers read from a picture.

Source: A. F. Biten et al., Scene Text Visual Question Answering, ICCV 2019. The two scripts in
internvl_chat/eval/vqa normalise differently: infographicsvqa_eval.py and textvqa_eval.py.
"""

from collections.abc import Sequence

from vlfoundry.infra.core.errors import DataError

THRESHOLD = 0.5
"""A similarity below this counts as 0."""


def anls_infographics(
    prediction: str, answers: Sequence[str], threshold: float = THRESHOLD
) -> float:
    """Best similarity over the answers (DocVQA, InfographicsVQA), from 0 to 1.

    The distance is taken after runs of white space became one blank and the outer ones none; it is
    divided by the longer of the texts as they were.
    """
    said = " ".join(prediction.lower().split())
    best = max(
        _similarity(
            edit_distance(said, " ".join(answer.lower().split())),
            # upper case, as some letters become two
            max(len(prediction.upper()), len(answer.upper())),
        )
        for answer in _some(answers)
    )
    return best if best >= threshold else 0.0


def anls_stvqa(prediction: str, answers: Sequence[str], threshold: float = THRESHOLD) -> float:
    """Best similarity over the answers (ST-VQA), from 0 to 1; only case and outer space go.

    Two empty texts are equal; the script divides by zero there.
    """
    said = prediction.lower().strip()
    tidy = [answer.lower().strip() for answer in _some(answers)]
    best = max(_similarity(edit_distance(said, text), max(len(said), len(text))) for text in tidy)
    return best if best >= threshold else 0.0


def edit_distance(left: str, right: str) -> int:
    """Fewest letters to insert, delete or replace that turn one text into the other."""
    row = list(range(len(right) + 1))
    for count, letter in enumerate(left, start=1):
        diagonal, row[0] = row[0], count
        for column, other in enumerate(right, start=1):
            replaced = diagonal + (letter != other)
            diagonal = row[column]
            row[column] = min(replaced, diagonal + 1, row[column - 1] + 1)
    return row[-1]


def _similarity(distance: int, length: int) -> float:
    return 1 - distance / length if length else 1.0


def _some(answers: Sequence[str]) -> Sequence[str]:
    if not answers:
        raise DataError("no answers to compare with; expected at least one")
    return answers
