"""Conversations to rows that are trained on: ids, and labels that leave out what is given.

Letters: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vlfoundry.models.chat.templates import (
    IMAGE,
    Message,
    Span,
    Template,
    exchanges,
    questions_first,
    with_image_tokens,
)
from vlfoundry.models.chat.tokenizer import ChatTokenizer

IGNORE = -100
"""label of a token that is not learnt"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One conversation, ready to be batched; labels are not shifted."""

    ids: np.ndarray
    """int64 [T]"""
    labels: np.ndarray
    """int64 [T], -100 but on answers and what ends them"""
    mask: np.ndarray
    """int64 [T], 0 on padding"""

    def learnt_runs(self) -> list[list[int]]:
        """Ids of each unbroken run that is learnt."""
        learnt = np.flatnonzero(self.labels != IGNORE)
        breaks = np.flatnonzero(np.diff(learnt) > 1) + 1
        return [self.labels[run].tolist() for run in np.split(learnt, breaks) if len(run)]


def row(
    tokenizer: ChatTokenizer,
    template: Template,
    messages: Sequence[Message],
    *,
    image_tokens: Sequence[int] = (),
    max_tokens: int | None = None,
    compat: bool = False,
) -> Row:
    """Ids and labels of a conversation; only answers and what ends them are learnt.

    Args:
        image_tokens: visual tokens of each picture, in order.
        max_tokens: cut to so many; see `padded` to fill up.
        compat: do what the official code does even where it is wrong (`internvl_zh`, of which it
            learns nothing).

    Raises:
        DataError: placeholders and pictures do not go together, or roles are out of order.
    """
    messages = _as_trained(template, messages)
    if template.own_image_id is None:
        messages = with_image_tokens(messages, image_tokens)
    ids, labels = list(tokenizer.begin), [IGNORE] * len(tokenizer.begin)
    for index, spans in enumerate(exchanges(template, messages)):
        for new_ids, learnt in _encoded(tokenizer, template, spans, opens=index == 0):
            ids += new_ids
            labels += new_ids if learnt else [IGNORE] * len(new_ids)
    if compat and template.official_labels_empty:
        labels = [IGNORE] * len(labels)
    return Row(
        ids=np.array(ids[:max_tokens], np.int64),
        labels=np.array(labels[:max_tokens], np.int64),
        mask=np.ones(len(ids[:max_tokens]), np.int64),
    )


def padded(row: Row, length: int, pad_id: int) -> Row:
    """The row filled up on the right to `length`; what is filled is neither seen nor learnt."""
    more = (0, max(0, length - len(row.ids)))
    return Row(
        ids=np.pad(row.ids, more, constant_values=pad_id),
        labels=np.pad(row.labels, more, constant_values=IGNORE),
        mask=np.pad(row.mask, more),
    )


def _as_trained(template: Template, messages: Sequence[Message]) -> list[Message]:
    kept = list(messages) if template.keeps_leading_answer else questions_first(messages)
    return [Message(m.role, m.text.strip()) for m in kept] if template.strips else kept


def _encoded(
    tokenizer: ChatTokenizer, template: Template, spans: Sequence[Span], *, opens: bool
) -> Iterator[tuple[list[int], bool]]:
    """Ids of each span. They are encoded together, as they will be read, and cut afterwards."""
    whole = ids_of(tokenizer, template, "".join(span.text for span in spans), opens=opens)
    start, text = 0, ""
    for span in spans:
        text += span.text
        end = max(start, len(ids_of(tokenizer, template, text, opens=opens)))
        yield whole[start:end], span.learnt
        start = end


def ids_of(tokenizer: ChatTokenizer, template: Template, text: str, *, opens: bool) -> list[int]:
    """Ids of a text; where pictures have an id of their own, each text between is encoded alone."""
    if template.own_image_id is None:
        return tokenizer.pieces(text) if opens else tokenizer.continuation(text)
    first, *others = text.split(IMAGE)
    ids = tokenizer.pieces(first)
    for piece in others:
        ids += [template.own_image_id, *tokenizer.pieces(piece)]
    return ids
