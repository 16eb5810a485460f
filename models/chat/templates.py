"""The official conversation templates as data, and the one renderer they share.

A template differs from another by its texts alone. A conversation becomes a list of exchanges,
and an exchange a list of spans, each learnt or not: prompts and label masks are both read off
that list, so they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from vlfoundry.infra.core.errors import ConfigError, DataError

IMAGE = "<image>"
"""stands for one picture in a message"""
IMG, END_IMG, IMG_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
"""what stands for it in the ids: begin, end, and each place of a visual token between them"""

Role = Literal["system", "human", "gpt"]


class Message(NamedTuple):
    """One turn, in the words of the chat jsonl format."""

    role: Role
    text: str


class Span(NamedTuple):
    """A stretch of a rendered conversation."""

    text: str
    learnt: bool


@dataclass(frozen=True, kw_only=True)
class Template:
    """How a conversation is written: what stands before and after each kind of message."""

    name: str
    system: str
    """the message where a conversation brings none of its own"""
    system_header: str = ""
    system_end: str
    user: str
    user_end: str
    assistant: str
    """header of an answer; generation goes on from its end"""
    lead: str = ""
    """between a header and its message; in front of an answer it is learnt"""
    answer_end: str
    """closes an answer, and is learnt: generation stops on it"""
    after_answer: str = ""
    """follows the end and is not learnt"""
    strips: bool = False
    """training rows hold messages without the blanks around them"""
    keeps_leading_answer: bool = False
    """training rows keep, and learn, an answer to no question that opens a conversation"""
    own_image_id: int | None = None
    """id that stands for a picture, in place of <img>, <IMG_CONTEXT> ... and </img>"""
    also_stops_on: str | None = None
    official_labels_empty: bool = False
    """the official code masks every sample: it splits on the separators in the wrong order"""

    @property
    def stop(self) -> str:
        """The text on which generation ends."""
        return self.answer_end.strip()


INTERNVL_2 = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
    "是一个有用无害的人工智能助手。"
)
INTERNVL_2_5 = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位"
    "联合开发的多模态大语言模型。"
)
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def _chatml(name: str, system: str, **rest: Any) -> Template:
    options: dict[str, Any] = {"system_end": "<|im_end|>", "user_end": "<|im_end|>", **rest}
    return Template(
        name=name,
        system=system,
        system_header="<|im_start|>system\n",
        user="<|im_start|>user\n",
        assistant="<|im_start|>assistant\n",
        answer_end="<|im_end|>",
        **options,
    )


TEMPLATES = {
    template.name: template
    for template in (
        Template(
            name="vicuna_v1",
            system=VICUNA,
            system_end=" ",
            user="USER:",
            user_end=" ",
            assistant="ASSISTANT:",
            lead=" ",
            answer_end="</s>",
            own_image_id=-200,
        ),
        Template(
            name="internvl_zh",
            system="",
            system_end=" ",
            user="<human>:",
            user_end=" ",
            assistant="<bot>:",
            lead=" ",
            answer_end="</s>",
            official_labels_empty=True,
        ),
        _chatml("Hermes-2", INTERNVL_2, also_stops_on="<|endoftext|>"),
        _chatml("internlm2-chat", INTERNVL_2, strips=True),
        Template(
            name="phi3-chat",
            system=INTERNVL_2,
            system_header="<|system|>\n",
            system_end="<|end|>",
            user="<|user|>\n",
            user_end="<|end|>",
            assistant="<|assistant|>\n",
            answer_end="<|end|>",
        ),
        _chatml(
            "internvl2_5",
            INTERNVL_2_5,
            system_end="<|im_end|>\n",
            user_end="<|im_end|>\n",
            after_answer="\n",
            keeps_leading_answer=True,
        ),
    )
}


def named(name: str) -> Template:
    """The template of that name. Raises ConfigError, with the names there are."""
    if name not in TEMPLATES:
        raise ConfigError(
            f"unknown conversation template {name!r}; there are: {', '.join(TEMPLATES)}"
        )
    return TEMPLATES[name]


def prompt(template: Template, messages: Sequence[Message]) -> str:
    """The conversation as text, its last answer closed."""
    rows = exchanges(template, questions_first(messages))
    return "".join(span.text for row in rows for span in row)


def generation_prompt(template: Template, messages: Sequence[Message]) -> str:
    """The text from which the answer to the last question is generated."""
    if not messages or messages[-1].role != "human":
        got = messages[-1].role if messages else "no message"
        raise DataError(f"a generation prompt ends in a human message, got {got}")
    return prompt(template, messages) + template.assistant


def exchanges(template: Template, messages: Sequence[Message]) -> Iterator[list[Span]]:
    """Spans up to and with each answer; the last list may end in a question."""
    messages = list(messages)
    system = template.system
    if messages and messages[0].role == "system":
        system = messages.pop(0).text
    row = [Span(template.system_header + system + template.system_end, False)]
    for role, text in messages:
        if role == "human":
            row.append(Span(template.user + template.lead + text + template.user_end, False))
        elif role == "gpt":
            row.append(Span(template.assistant, False))
            row.append(Span(template.lead + text + template.answer_end, True))
            row.append(Span(template.after_answer, False))
            yield row
            row = []
        else:
            raise DataError(f"a {role} message can only be the first of a conversation")
    if row:
        yield row


def questions_first(messages: Sequence[Message]) -> list[Message]:
    """The messages without an answer that opens them."""
    start = 1 if messages and messages[0].role == "system" else 0
    kept = list(messages)
    if len(kept) > start and kept[start].role == "gpt":
        del kept[start]
    return kept


def with_image_tokens(messages: Sequence[Message], image_tokens: Sequence[int]) -> list[Message]:
    """Each <image> of a question as <img>, so many <IMG_CONTEXT>, </img>; in order.

    Raises:
        DataError: there are not as many placeholders as numbers of tokens.
    """
    placeholders = sum(m.text.count(IMAGE) for m in messages if m.role == "human")
    if placeholders != len(image_tokens):
        raise DataError(
            f"{placeholders} {IMAGE} in the questions, but visual tokens for "
            f"{len(image_tokens)} images; expected one {IMAGE} an image"
        )
    counts = iter(image_tokens)
    return [
        Message(role, "".join(_filled(text, counts)) if role == "human" else text)
        for role, text in messages
    ]


def _filled(text: str, counts: Iterator[int]) -> Iterator[str]:
    first, *others = text.split(IMAGE)
    yield first
    for piece in others:
        yield IMG + IMG_CONTEXT * next(counts) + END_IMG + piece
