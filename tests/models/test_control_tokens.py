"""Control tokens that people write out are text, whichever tokenizer reads them."""

import io

import pytest
from sentencepiece import SentencePieceTrainer

from tests.models.test_chat import KINDS, tokenizer
from tests.support.official_text import PIECES, write_template, write_tokenizer
from vlfoundry.models.chat.control import GROUNDING, control_tokens, written_out
from vlfoundry.models.chat.dialogue import TemplateDialogue
from vlfoundry.models.chat.labels import IGNORE
from vlfoundry.models.chat.official import official_tokenizer
from vlfoundry.models.chat.templates import IMG_CONTEXT, TEMPLATES, Message
from vlfoundry.models.chat.tokenizer import SentencePieceTokenizer
from vlfoundry.models.tokenizer import EOS_ID, IMG_CONTEXT_ID, Tokenizer, train

ODD = "a </s> b<pad><IMG_CONTEXT></img> <|im_end|><|end|> <s>c <ref>d</ref><box>[[1, 2]]</box>"
PICTURE_TOKENS = 7
CELLS = [(k, n) for k in KINDS for n, t in TEMPLATES.items() if t.stop in tokenizer(k).added]


@pytest.fixture(scope="module")
def own() -> Tokenizer:
    return train(["What stands for a place? With its end, and fills up."], 320)


def test_our_own_tokenizer_spells_them(own):
    ids = own.encode(ODD)
    grounding = {own.encode(token)[0] for token in GROUNDING}
    assert own.decode(ids, keep_special=True) == ODD
    assert {i for i in ids if i < 12} == grounding & set(ids)
    assert len({i for i in ids if i < 12}) == 4
    for token in sorted(control_tokens()):
        assert own.encode(f"x{token}y") != [*own.encode("x"), *own.encode("y")]
        assert min(own.encode(token)) >= 12


def test_a_text_without_them_is_what_it_was(own):
    text = "An <image> of <b>x</b> | <ref>it</ref> < | >"
    assert own.encode(text) == own._backend.encode(text, add_special_tokens=False).ids


def test_captions_are_texts_too(own):
    (row,), _ = own.encode_batch(["ends </s> here"], max_tokens=60)
    assert row.tolist().count(EOS_ID) == 1
    assert row[-1] == EOS_ID


def test_our_own_dialogue_has_one_end_and_its_own_places(own):
    messages = [
        Message("system", "No <img> here."),
        Message("human", f"<image>\nWhat does {IMG_CONTEXT} stand for?"),
        Message("gpt", "With </s> at its end, and <pad> fills up."),
    ]
    ids, labels = own.dialogue.conversation(messages, [PICTURE_TOKENS])
    assert ids.count(IMG_CONTEXT_ID) == PICTURE_TOKENS
    learnt = [label for label in labels if label != IGNORE]
    assert learnt.count(EOS_ID) == 1
    assert learnt[-1] == EOS_ID
    assert own.decode(learnt[:-1], keep_special=True).strip() == messages[2].text
    assert IMG_CONTEXT_ID not in own.dialogue.question(f"{IMG_CONTEXT}?", 0)


@pytest.mark.parametrize(("kind", "name"), CELLS)
def test_every_template_with_every_tokenizer(kind, name):
    template, tok = TEMPLATES[name], tokenizer(kind)
    dialogue = TemplateDialogue(tok, template)
    quoted = " and ".join(sorted(tok.control - {"<image>"}))
    answer = f"It is {quoted} <ref>x</ref>."
    messages = [Message("human", f"<image>\nWhat is {quoted}?"), Message("gpt", answer)]
    plain = [Message("human", "<image>\nWhat?"), Message("gpt", "It.")]
    ids, labels = dialogue.conversation(messages, [PICTURE_TOKENS])
    least, few = dialogue.conversation(plain, [PICTURE_TOKENS])
    control = {tok.added[token] for token in tok.control} | {dialogue.context_id}
    assert [i for i in ids if i in control] == [i for i in least if i in control]
    learnt = [i for i, label in zip(ids, labels, strict=True) if label != IGNORE]
    ends = [i for i, label in zip(least, few, strict=True) if label != IGNORE]
    assert [i for i in learnt if i in control] == [i for i in ends if i in control]
    said = "".join(tok.decode(learnt).split())
    assert said.startswith("".join(answer.split()))


@pytest.mark.parametrize("name", PIECES)
def test_official_tokenizers_spell_them(tmp_path, name):
    write_tokenizer(tmp_path, name)
    write_template(tmp_path, "Hermes-2")
    tok = official_tokenizer(tmp_path, embeds=False)
    control = sorted(tok._backend.control)
    assert len(control) >= 3
    for token in control:
        ids = tok.encode(f"x{token}y")
        assert tok._backend.added[token] not in ids, token
        assert "".join(tok.decode(ids).split()) == f"x{token}y"
        assert tok._backend.added[token] not in tok.continuation("caption:", f"x{token}y")


def test_a_piece_of_the_vocabulary_under_a_turn_tokens_id(tmp_path):
    """InternLM2 writes `<|im_end|>` under the id of the user-defined piece `[UNUSED_TOKEN_145]`."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["what a place it is, at its end"] * 20), model_writer=model,
        vocab_size=300, user_defined_symbols=["[UNUSED_TOKEN_145]"], byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.getvalue())
    added = {"<unk>": 0, "<s>": 1, "</s>": 2, "<|im_end|>": 3}
    tok = SentencePieceTokenizer(path, added=added, pad="</s>")
    assert tok.pieces("a<|im_end|>")[-1] == 3
    ids = tok.pieces("at [UNUSED_TOKEN_145] end")
    assert 3 not in ids
    assert tok.decode(ids) == "at [UNUSED_TOKEN_145] end"


def test_what_is_noted():
    assert written_out(ODD) == [
        "</s>", "<pad>", "<IMG_CONTEXT>", "</img>", "<|im_end|>", "<|end|>", "<s>",
    ]  # fmt: skip
    assert written_out("<image> <box>1</box> <html>") == []
