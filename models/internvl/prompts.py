"""The texts that models are given: prefixes, caption prompts, and rows with their labels.

Conversations are in `models.chat.dialogue`.

Letters: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlfoundry.models.chat.labels import IGNORE
from vlfoundry.models.tokenizer import TextTokenizer, pad

SUMMARIZE = "summarize:"
"""in front of every text that is embedded, without a space"""
CAPTION_PROMPTS = {
    "en": "English caption:",
    "zh": "Chinese caption:",
    "ja": "Japanese caption:",
    "ar": "Arabic caption:",
    "it": "Italian caption:",
}


def caption_prompt(lang: str) -> str:
    """The captioning prompt of InternVL-G for a language."""
    return CAPTION_PROMPTS.get(lang, f"{lang} caption:")


def caption_rows(
    tokenizer: TextTokenizer, captions: Sequence[str], langs: Sequence[str], *, max_tokens: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Texts of the generative task: prompt, caption, end; only caption and end are learnt.

    (The official code also learns the prompt's last token, by an off-by-one.)

    Returns:
        ids, mask and labels, each int64 [B, T].
    """
    rows = []
    for caption, lang in zip(captions, langs, strict=True):
        text = caption_prompt(lang)
        prompt = [*tokenizer.begin, *tokenizer.encode(text)]
        room = max_tokens - len(prompt) - 1
        learnt = tokenizer.continuation(text, caption)[:room]
        rows.append((prompt, [*learnt, tokenizer.eos_id]))
    return labelled_rows(rows, tokenizer.pad_id)


def labelled_rows(
    rows: Sequence[tuple[list[int], list[int]]], pad_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(given, learnt) ids of each row, padded on the right.

    Returns:
        ids, mask and labels, each int64 [B, T]; labels are -100 but on what is learnt.
    """
    ids, mask = pad([prompt + answer for prompt, answer in rows], pad_id)
    labels = np.full_like(ids, IGNORE)
    for i, (prompt, answer) in enumerate(rows):
        labels[i, len(prompt) : len(prompt) + len(answer)] = answer
    return ids, mask, labels
