"""Conversation templates, tokenizers and label masks."""

from pathlib import Path

import pytest

from vlfoundry.infra.core.errors import ConfigError, DataError, ModelError
from vlfoundry.models.chat.labels import padded, row
from vlfoundry.models.chat.templates import (
    TEMPLATES,
    Message,
    generation_prompt,
    named,
    prompt,
    with_image_tokens,
)
from vlfoundry.models.chat.tokenizer import (
    ByteLevelTokenizer,
    ChatTokenizer,
    SentencePieceTokenizer,
)
from vlfoundry.models.internvl.prompts import IGNORE

FOLDER = Path(__file__).parents[1] / "eval" / "golden" / "conversations"
TAGS = ("<|im_start|>", "<|im_end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
PHI3 = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
TURNS = (
    Message("human", "<image>\nWhere is it?"),
    Message("gpt", "Here."),
    Message("human", "  And <image>? "),
    Message("gpt", " There.\n"),
)


def special(first: int, opening: tuple[str, ...]) -> dict[str, int]:
    added = (*TAGS, "<img>", "</img>", "<IMG_CONTEXT>")
    ids = {token: index for index, token in enumerate(opening)}
    return ids | {token: first + i for i, token in enumerate(t for t in added if t not in ids)}


def tokenizer(kind: str) -> ChatTokenizer:
    if kind == "byte-level":
        added = special(500, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
        path = FOLDER / "tiny_bytelevel_bpe.json"
        return ByteLevelTokenizer(path, added=added, pad="<|endoftext|>")
    name = "tiny_spm_nodummy.model" if kind == "no prefix" else "tiny_spm.model"
    return SentencePieceTokenizer(
        FOLDER / name,
        added=special(620, ("<unk>", "<s>", "</s>")),
        pad="<unk>",
        blank_once=kind == "blank once",
        swallow_blanks_after=PHI3 if kind == "blank once" else (),
        no_blank_before=("<s>",),
    )


KINDS = ("byte-level", "dummy prefix", "no prefix", "blank once")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_and_their_ends_are_learnt_and_nothing_else(kind, name):
    template, tok = TEMPLATES[name], tokenizer(kind)

    got = row(tok, template, TURNS, image_tokens=(2, 3))

    learnt = [tok.decode(run).split() for run in got.learnt_runs()]
    end = template.answer_end
    expected = [f"Here.{end}", f"There. {end}" if not template.strips else f"There.{end}"]
    assert ["".join(words) for words in learnt] == ["".join(text.split()) for text in expected]
    at = got.labels != IGNORE
    assert (got.labels[at] == got.ids[at]).all()
    assert got.mask.all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["Hermes-2", "internvl2_5", "phi3-chat"])
def test_a_row_is_the_prompt_that_generation_would_see(kind, name):
    template, tok = TEMPLATES[name], tokenizer(kind)

    got = row(tok, template, TURNS, image_tokens=(2, 3))
    filled = with_image_tokens(TURNS, (2, 3))

    assert got.ids.tolist() == tok.encode(prompt(template, filled))
    asked = tok.encode(generation_prompt(template, filled[:-1]))
    assert got.ids[: len(asked)].tolist() == asked
    assert got.labels[len(asked)] != IGNORE


def test_compat_learns_nothing_where_the_official_code_does():
    for name, template in TEMPLATES.items():
        got = row(tokenizer("dummy prefix"), template, TURNS, image_tokens=(1, 1), compat=True)
        assert (len(got.learnt_runs()) == 0) == (name == "internvl_zh")


def test_a_message_of_the_conversation_replaces_the_system_message():
    turns = [Message("system", "Be brief."), *TURNS]

    text = prompt(named("internvl2_5"), turns)

    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>")


@pytest.mark.parametrize(("name", "learnt"), [("Hermes-2", 1), ("internvl2_5", 2)])
def test_an_answer_to_no_question(name, learnt):
    turns = [Message("gpt", "Hello."), Message("human", "Who?"), Message("gpt", "Me.")]

    got = row(tokenizer("byte-level"), named(name), turns)

    assert len(got.learnt_runs()) == learnt
    assert "Hello." not in prompt(named(name), turns)


def test_cut_and_padded_rows():
    tok = tokenizer("no prefix")
    whole = row(tok, named("internvl2_5"), TURNS, image_tokens=(2, 3))
    length = len(whole.ids)

    cut = row(tok, named("internvl2_5"), TURNS, image_tokens=(2, 3), max_tokens=length - 5)
    more = padded(whole, length + 3, tok.pad_id)

    assert cut.labels.tolist() == whole.labels[: length - 5].tolist()
    assert more.ids[length:].tolist() == [tok.pad_id] * 3
    assert more.labels[length:].tolist() == [IGNORE] * 3
    assert more.mask.sum() == length
    assert padded(cut, 4, tok.pad_id).ids.tolist() == cut.ids.tolist()


def test_vicuna_gives_a_picture_one_id():
    got = row(tokenizer("dummy prefix"), named("vicuna_v1"), TURNS)

    assert (got.ids == -200).sum() == 2
    assert not (got.labels == -200).any()


def test_mistakes_are_named():
    tok = tokenizer("byte-level")
    with pytest.raises(ConfigError, match="unknown conversation template 'robin'; there are: vic"):
        named("robin")
    with pytest.raises(DataError, match=r"2 <image> in the questions, but .* for 1 images"):
        row(tok, named("Hermes-2"), TURNS, image_tokens=(1,))
    with pytest.raises(DataError, match="a system message can only be the first"):
        row(tok, named("Hermes-2"), [*TURNS, Message("system", "?")], image_tokens=(1, 1))
    with pytest.raises(DataError, match="ends in a human message, got gpt"):
        generation_prompt(named("Hermes-2"), TURNS)
    with pytest.raises(ModelError, match="does not exist"):
        ByteLevelTokenizer(FOLDER / "none.json", added={}, pad="")
    with pytest.raises(ModelError, match="'<b>' got id 500, expected 7"):
        ByteLevelTokenizer(FOLDER / "tiny_bytelevel_bpe.json", added={"<b>": 7}, pad="<b>")
