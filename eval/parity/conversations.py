"""Recorded conversations of the official code: prompts, ids, label masks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from vlfoundry.eval.parity.check import Check, same
from vlfoundry.infra.core.errors import UserError
from vlfoundry.models.chat.labels import Row, padded, row
from vlfoundry.models.chat.templates import (
    TEMPLATES,
    Message,
    Template,
    generation_prompt,
    named,
    prompt,
    questions_first,
    with_image_tokens,
)
from vlfoundry.models.chat.tokenizer import (
    ByteLevelTokenizer,
    ChatTokenizer,
    SentencePieceTokenizer,
    has_dummy_prefix,
)
from vlfoundry.models.internvl.prompts import IGNORE

PHI3_SWALLOWS = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
"""after these tokens the Phi-3 tokenizer drops blanks; the record does not say so itself"""


def is_conversations(folder: Path) -> bool:
    """Whether a golden folder holds conversations."""
    return (folder / "conversations.json").is_file() and (folder / "meta.json").is_file()


def check_conversations(folder: Path) -> list[Check]:
    """Every recorded template and every case of the folder against ours."""
    meta = _json(folder / "meta.json")
    tokenizers = {name: _tokenizer(folder, spec) for name, spec in meta["tokenizers"].items()}
    checks = list(_templates(folder))
    names: set[str] = set()
    for case in _json(folder / "conversations.json"):
        name = _name(case, names)
        try:
            checks += _case(name, case, tokenizers[case["tokenizer"]])
        except UserError as error:
            checks.append(Check(name=name, passed=False, note=str(error)))
    return checks


def _name(case: dict, taken: set[str]) -> str:
    """Template, dialogue, tokenizer and, where it was limited, length; numbered if taken."""
    parts = [case["template"].split()[0], case["dialogue"], case["tokenizer"]]
    if case.get("padded"):
        parts.append(f"padded to {case['model_max_length']}")
    plain = name = "/".join(parts)
    number = 1
    while name in taken:
        number += 1
        name = f"{plain}#{number}"
    taken.add(name)
    return name


def _case(name: str, case: dict, tokenizer: ChatTokenizer) -> Iterator[Check]:
    template = named(case["template"].split()[0])
    messages = [Message(turn["from"], turn["value"]) for turn in case["conversation"]]
    yield from _prompts(name, case, template, messages, tokenizer)
    if case.get("input_ids") is None:
        return
    got, note = _row(case, template, messages, tokenizer), ""
    if case.get("warning") and set(case["labels"]) == {IGNORE}:
        got = replace(got, labels=np.full_like(got.labels, IGNORE))
        note = f"recorded defect, the official code masks the whole sample: {case['warning']}"
    yield same(f"{name}: input_ids", got.ids.tolist(), case["input_ids"])
    yield same(f"{name}: labels", got.labels.tolist(), case["labels"], note)
    if case.get("attention_mask") is not None:
        yield same(f"{name}: attention_mask", got.mask.tolist(), case["attention_mask"])
    if case.get("trained_segments") is not None:
        yield _segments(f"{name}: trained_segments", got, case, tokenizer)


def _row(case: dict, template: Template, messages: list[Message], tokenizer: ChatTokenizer) -> Row:
    limit = case.get("model_max_length")
    got = row(
        tokenizer,
        template,
        messages,
        image_tokens=case.get("num_image_token_list") or (),
        max_tokens=limit,
        compat=True,
    )
    if limit is not None and case.get("padded"):
        return padded(got, limit, tokenizer.pad_id)
    return got


def _prompts(
    name: str, case: dict, template: Template, messages: list[Message], tokenizer: ChatTokenizer
) -> Iterator[Check]:
    """What is recorded of the texts, with the answers and open for the last one."""
    question = questions_first(messages)
    if question and question[-1].role == "gpt":
        question.pop()
    key = "get_prompt_with_answer"
    if case.get(key) is not None:
        yield same(f"{name}: {key}", prompt(template, messages), case[key])
    key = "prompt_for_generation"
    if case.get(key) is not None:
        yield same(f"{name}: {key}", generation_prompt(template, question), case[key])
    key = "prompt_for_generation_with_image_tokens"
    if case.get(key) is not None:
        filled = with_image_tokens(question, case.get("num_image_token_list") or ())
        text = generation_prompt(template, filled)
        yield same(f"{name}: {key}", text, case[key])
        if case.get("generation_ids") is not None:
            ids = tokenizer.encode(text)
            yield same(f"{name}: generation_ids", ids, case["generation_ids"])


def _segments(name: str, got: Row, case: dict, tokenizer: ChatTokenizer) -> Check:
    """The texts that are learnt, blanks aside: the recorded decoder moves them."""
    learnt = ["".join(tokenizer.decode(run).split()) for run in got.learnt_runs()]
    wanted = ["".join(text.split()) for text in case["trained_segments"]]
    return same(name, learnt, wanted, note="compared without blanks")


def _templates(folder: Path) -> Iterator[Check]:
    """The recorded fields of each registered template, as far as they shape a text."""
    path = folder / "templates.json"
    for name, recorded in (_json(path) if path.is_file() else {}).items():
        if name in TEMPLATES:
            got, wanted = _as_text(TEMPLATES[name]), _recorded_text(recorded)
            yield same(f"template {name}", got, wanted)
        else:
            note = f"unknown template; there are: {', '.join(TEMPLATES)}"
            yield Check(name=f"template {name}", passed=False, note=note)


def _as_text(template: Template) -> dict[str, object]:
    turns = [Message("human", "Q"), Message("gpt", "A"), Message("human", "Q"), Message("gpt", "A")]
    return {
        "text": prompt(template, turns),
        "system_message": template.system,
        "stop": template.stop,
        "also_stops_on": template.also_stops_on,
    }


def _recorded_text(recorded: dict) -> dict[str, object]:
    """Two exchanges, written as the recorded separators say."""
    system = recorded["system_template"].format(system_message=recorded["system_message"])
    user, assistant = recorded["roles"]
    if recorded["sep_style"] == "MPT":
        lead, after_system, ends = "", recorded["sep"], (recorded["sep"], recorded["sep"])
    else:
        lead, after_system = ": ", recorded["sep2"]
        ends = (recorded["sep2"], recorded["sep"])
    exchange = f"{user}{lead}Q{ends[0]}{assistant}{lead}A{ends[1]}"
    return {
        "text": system + after_system + exchange * 2,
        "system_message": recorded["system_message"],
        "stop": recorded["sep"].strip(),
        "also_stops_on": recorded["stop_str"],
    }


def _tokenizer(folder: Path, spec: dict) -> ChatTokenizer:
    """The tokenizer that the record describes, from the file of its kind."""
    added = {token: index for index, token in spec["added"]}
    begin = spec["bos"] if spec["add_bos"] else None
    if spec["cls"].endswith("Fast"):
        path = _only(folder, (p for p in folder.glob("*.json") if "model" in _json(p)))
        return ByteLevelTokenizer(path, added=added, pad=spec["pad"], begin=begin)
    dummy_prefix = not spec["cls"].startswith("InternLM2")
    path = _only(folder, (p for p in folder.glob("*.model") if has_dummy_prefix(p) == dummy_prefix))
    once = spec["legacy"] is False
    return SentencePieceTokenizer(
        path,
        added=added,
        pad=spec["pad"],
        begin=begin,
        blank_once=once,
        swallow_blanks_after=[token for token in PHI3_SWALLOWS if once and token in added],
        no_blank_before=[spec["bos"], spec["eos"], spec["pad"], "<unk>"],
    )


def _only(folder: Path, paths: Iterator[Path]) -> Path:
    found = sorted(paths)
    if len(found) != 1:
        raise ValueError(f"{folder} holds {len(found)} tokenizers of one kind, expected 1")
    return found[0]


def _json(path: Path):
    return json.loads(path.read_text("utf-8"))
