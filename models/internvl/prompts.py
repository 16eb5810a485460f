"""The texts that models are given: prefixes, caption prompts, conversations with their labels.

Letters: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from models.tokenizer import (
    BOS_ID,
    END_IMG_ID,
    EOS_ID,
    IMG_CONTEXT_ID,
    IMG_ID,
    Tokenizer,
    pad,
)

SUMMARIZE = "summarize:"
"""in front of every text that is embedded, without a space"""
CAPTION_PROMPTS = {
    "en": "English caption:",
    "zh": "Chinese caption:",
    "ja": "Japanese caption:",
    "ar": "Arabic caption:",
    "it": "Italian caption:",
}
IGNORE = -100
"""label of a token that is not learnt"""


def caption_prompt(lang: str) -> str:
    """The captioning prompt of InternVL-G for a language."""
    return CAPTION_PROMPTS.get(lang, f"{lang} caption:")


def caption_rows(
    tokenizer: Tokenizer, captions: Sequence[str], langs: Sequence[str], *, max_tokens: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Texts of the generative task: prompt, caption, end; only caption and end are learnt.

    (The official code also learns the prompt's last token, by an off-by-one.)

    Returns:
        ids, mask and labels, each int64 [B, T].
    """
    rows = []
    for caption, lang in zip(captions, langs, strict=True):
        prompt = [BOS_ID, *tokenizer.encode(caption_prompt(lang))]
        room = max_tokens - len(prompt) - 1
        rows.append((prompt, [*tokenizer.encode(caption)[:room], EOS_ID]))
    return labelled_rows(rows)


def chat_prompt(tokenizer: Tokenizer, question: str, visual_tokens: int) -> list[int]:
    """<s><img>...</img> User: question / Assistant: as ids, ready to be continued."""
    image = [IMG_ID, *[IMG_CONTEXT_ID] * visual_tokens, END_IMG_ID] if visual_tokens else []
    return [BOS_ID, *image, *tokenizer.encode(f"\nUser: {question}\nAssistant:")]


def chat_row(
    tokenizer: Tokenizer, question: str, answer: str, *, visual_tokens: int
) -> tuple[list[int], list[int]]:
    """Ids of a conversation's prompt, and those of what is learnt: the answer and the end."""
    prompt = chat_prompt(tokenizer, question, visual_tokens)
    return prompt, [*tokenizer.encode(f" {answer}"), EOS_ID]


def labelled_rows(
    rows: Sequence[tuple[list[int], list[int]]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(given, learnt) ids of each row, padded on the right.

    Returns:
        ids, mask and labels, each int64 [B, T]; labels are -100 but on what is learnt.
    """
    ids, mask = pad([prompt + answer for prompt, answer in rows])
    labels = np.full_like(ids, IGNORE)
    for i, (prompt, answer) in enumerate(rows):
        labels[i, len(prompt) : len(prompt) + len(answer)] = answer
    return ids, mask, labels
