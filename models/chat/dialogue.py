"""How a chat model is spoken to: its questions, and what it learns of conversations, as ids.

Letters: T tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from vlfoundry.infra.core.errors import DataError
from vlfoundry.models.chat import jinja
from vlfoundry.models.chat.labels import IGNORE, ids_of, row
from vlfoundry.models.chat.templates import (
    IMAGE,
    IMG_CONTEXT,
    Message,
    Template,
    generation_prompt,
    with_image_tokens,
)
from vlfoundry.models.chat.tokenizer import ChatTokenizer

if TYPE_CHECKING:
    from vlfoundry.models.tokenizer import Tokenizer


class Dialogue(ABC):
    """The one way in which a model is asked, wherever it is asked: in training and in use."""

    context_id: int
    """stands in each place of a visual token; below 0 where none of the vocabulary does"""
    stop_id: int
    """ends an answer"""

    @abstractmethod
    def question(self, text: str, visual_tokens: int) -> list[int]:
        """Ids that the answer to a question about one picture follows; no tokens: no picture."""

    @abstractmethod
    def exchange(
        self, question: str, answer: str, visual_tokens: int
    ) -> tuple[list[int], list[int]]:
        """Ids of `question`, and those of what is learnt: the answer and its end."""

    @abstractmethod
    def conversation(
        self, messages: Sequence[Message], visual_tokens: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """Ids and labels [T] of a conversation; -100 but on the answers and their ends.

        Control tokens that are written out in a message are text (`models.chat.control`).

        Args:
            messages: each "<image>" of a question is a picture.
            visual_tokens: of each picture, in order.

        Raises:
            DataError: placeholders and pictures do not go together, or roles are out of order.
        """


class WrittenDialogue(Dialogue):
    """A dialogue that other programs can be told."""

    @abstractmethod
    def jinja(self) -> str:
        """The same as a Jinja template that transformers renders."""


class PlainDialogue(WrittenDialogue):
    """Our own models': "\\nUser: ...\\nAssistant:", behind the picture."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.context_id, self.stop_id = tokenizer.context_id, tokenizer.eos_id

    def jinja(self) -> str:
        return jinja.plain()

    def question(self, text: str, visual_tokens: int) -> list[int]:
        image = self._tokenizer.places(visual_tokens) if visual_tokens else []
        asked = self._tokenizer.encode(f"\nUser: {text}\nAssistant:")
        return [*self._tokenizer.begin, *image, *asked]

    def exchange(
        self, question: str, answer: str, visual_tokens: int
    ) -> tuple[list[int], list[int]]:
        return self.question(question, visual_tokens), self._answer(answer)

    def conversation(
        self, messages: Sequence[Message], visual_tokens: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """As in the base class. Pictures that open a question stand before its "User:", as where
        a model is asked about one."""
        encode, places = self._tokenizer.encode, self._tokenizer.places
        counts = iter(visual_tokens)
        ids, labels = list(self._tokenizer.begin), [IGNORE]
        for role, text in messages:
            if role == "gpt":
                new = self._answer(text.strip())
                ids, labels = ids + new, labels + new
                continue
            new, text = [], text.strip()
            while role == "human" and text.startswith(IMAGE):
                new += places(next(counts))
                text = text.removeprefix(IMAGE).lstrip()
            if role == "human":
                text = f"\nUser: {text}\nAssistant:"
            first, *others = text.split(IMAGE)
            new += encode(first)
            for piece in others:
                new += [*places(next(counts)), *encode(piece)]
            ids, labels = ids + new, labels + [IGNORE] * len(new)
        return ids, labels

    def _answer(self, text: str) -> list[int]:
        return [*self._tokenizer.encode(f" {text}"), self.stop_id]


class TemplateDialogue(WrittenDialogue):
    """An official chat model's: its template, and `<image>` on a line of its own before a question.

    Where the template has an id of its own for pictures, it stands here as often as a picture has
    visual tokens.
    """

    def __init__(self, tokenizer: ChatTokenizer, template: Template):
        """Raises ModelError if the tokenizer lacks a special token that the template needs."""
        self._tokenizer, self._template = tokenizer, template
        self.stop_id = tokenizer.special_id(template.stop)
        own = template.own_image_id
        self.context_id = tokenizer.special_id(IMG_CONTEXT) if own is None else own

    def jinja(self) -> str:
        return jinja.named(self._template, begins=bool(self._tokenizer.begin))

    def question(self, text: str, visual_tokens: int) -> list[int]:
        messages = self._as_text([_asked(text, visual_tokens)])
        counts = [visual_tokens] if visual_tokens else []
        if self._template.own_image_id is None:
            messages = with_image_tokens(messages, counts)
        text = generation_prompt(self._template, messages)
        made = [*self._tokenizer.begin, *ids_of(self._tokenizer, self._template, text, opens=True)]
        ids = np.array(made, np.int64)
        return np.repeat(ids, self._repeats(ids, counts)).tolist()

    def exchange(
        self, question: str, answer: str, visual_tokens: int
    ) -> tuple[list[int], list[int]]:
        """As in the base class; what follows the answer's end and is not learnt is left out."""
        messages = [_asked(question, visual_tokens), Message("gpt", answer)]
        ids, labels = self.conversation(messages, [visual_tokens] if visual_tokens else [])
        learnt = [place for place, label in enumerate(labels) if label != IGNORE]
        return ids[: learnt[0]], ids[learnt[0] : learnt[-1] + 1]

    def conversation(
        self, messages: Sequence[Message], visual_tokens: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        messages = self._as_text(messages)
        made = row(self._tokenizer, self._template, messages, image_tokens=visual_tokens)
        repeats = self._repeats(made.ids, visual_tokens)
        return np.repeat(made.ids, repeats).tolist(), np.repeat(made.labels, repeats).tolist()

    def _as_text(self, messages: Sequence[Message]) -> list[Message]:
        """What people wrote; the template's own tokens come to it afterwards."""
        return [Message(role, self._tokenizer.as_text(text)) for role, text in messages]

    def _repeats(self, ids: np.ndarray, visual_tokens: Sequence[int]) -> np.ndarray:
        """How often each of `ids` [T] is needed: once, but for an id that stands for a picture."""
        repeats = np.ones(len(ids), np.int64)
        if self._template.own_image_id is None:
            return repeats
        pictures = ids == self._template.own_image_id
        if pictures.sum() != len(visual_tokens):
            raise DataError(
                f"{pictures.sum()} {IMAGE} in the conversation, but visual tokens for "
                f"{len(visual_tokens)} images; expected one {IMAGE} an image"
            )
        repeats[pictures] = visual_tokens
        return repeats


def _asked(text: str, visual_tokens: int) -> Message:
    return Message("human", f"{IMAGE}\n{text}" if visual_tokens else text)
