"""Control tokens that somebody wrote out in a text are text.

Begin, end, padding and turn tokens and those of pictures steer a model, and only a template or the
code that builds a prompt may put them into its ids. In what people write (questions, answers,
captions) they are encoded letter by letter, as any other word: an answer that quotes `</s>` does
not end there. `<ref>`, `<box>` and `<quad>` with their ends stay tokens, as the official data use
them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from vlfoundry.models.chat.templates import END_IMG, IMG, IMG_CONTEXT, TEMPLATES

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

GROUNDING = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")
"""tokens that texts may hold"""
GUARD = "\ufdd0"
"""stands inside of a control token that is text: a code point that Unicode gives no character"""
_COMMON = ("<s>", "</s>", "<pad>", "<unk>", "<bos>", "<eos>", "<|endoftext|>")
_TURN = re.compile(r"<\|[^|<>]+\|>")


@functools.cache
def control_tokens() -> frozenset[str]:
    """Those of our own tokenizer and of every conversation template."""
    texts = [
        value
        for template in TEMPLATES.values()
        for value in dataclasses.astuple(template)
        if isinstance(value, str)
    ]
    turns = {token for text in texts for token in _TURN.findall(text)}
    return frozenset({*turns, *_COMMON, IMG, END_IMG, IMG_CONTEXT})


@functools.cache
def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """A pattern for any of the tokens, as its one group; a longer one before its beginning."""
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")


def written_out(text: str) -> list[str]:
    """The control tokens in a text, each once, in order."""
    return list(dict.fromkeys(any_of(control_tokens()).findall(text)))


def guarded(text: str, tokens: frozenset[str]) -> str:
    """The text with a guard inside of each of the `tokens`, so that nobody takes it for one."""
    return any_of(tokens).sub(lambda found: found[0][0] + GUARD + found[0][1:], text)


def without_added(backend: Backend) -> Backend:
    """The same tokenizer, for which no token that was added to its vocabulary is one."""
    from tokenizers import Tokenizer

    facts = json.loads(backend.to_str())
    return Tokenizer.from_str(json.dumps({**facts, "added_tokens": []}))
