"""Imported models speak as the official code does: their tokenizers, templates and prompts."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.fake_models import write_concept_set
from tests.support.official_text import GOLDEN, RECORDED, ROWS, write_template, write_tokenizer
from tests.support.tiny_models import TEXTS, tiny_config
from vlfoundry.eval.runner import evaluate_folder
from vlfoundry.infra.core.errors import ConfigError, DataError, ModelError
from vlfoundry.models.chat.official import EMBEDDED_TOKENS, official_tokenizer
from vlfoundry.models.chat.templates import IMG_CONTEXT, Message
from vlfoundry.models.connector.config import ConnectorConfig
from vlfoundry.models.internvl.config import InternVLConfig
from vlfoundry.models.internvl.convert import FORMATS, export_model, import_model
from vlfoundry.models.internvl.model import build
from vlfoundry.models.internvl.predict import load_model, load_tokenizer, read_config, save_model
from vlfoundry.models.internvl.prompts import IGNORE, SUMMARIZE, caption_rows
from vlfoundry.models.layers.config import DecoderConfig
from vlfoundry.models.tokenizer import train

pytestmark = pytest.mark.slow

CASES = json.loads((GOLDEN / "conversations.json").read_text("utf-8"))
TALK = (
    Message("human", "<image>\nWhat is it?"),
    Message("gpt", "A cat."),
    Message("human", "And <image>?"),
    Message("gpt", "A dog."),
)


def kept(folder: Path, name: str, template: str | None = None) -> Path:
    write_tokenizer(folder, name)
    write_template(folder, template)
    return folder


def dialogue(folder: Path, name: str, template: str):
    return official_tokenizer(kept(folder, name, template), embeds=False).dialogue


def recorded(case: dict) -> tuple[str, str, list[Message]]:
    messages = [Message(turn["from"], turn["value"]) for turn in case["conversation"]]
    return case["tokenizer"], case["template"].split()[0], messages


# --- what the official code does -------------------------------------------------------------


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_conversations_from_the_official_files(name, tmp_path):
    """Ids and labels of training, read with nothing but the files of the folder."""
    seen = 0
    for number, case in enumerate(CASES):
        tokenizer, template, messages = recorded(case)
        if tokenizer != name or template == "vicuna_v1" or case.get("model_max_length"):
            continue
        spoken = dialogue(tmp_path / str(number), name, template)
        ids, labels = spoken.conversation(messages, case.get("num_image_token_list") or ())
        assert ids == case["input_ids"], (template, case["dialogue"])
        if not case.get("warning"):  # then the official code learns nothing, by mistake
            assert labels == case["labels"], (template, case["dialogue"])
        seen += 1
    assert seen


@pytest.mark.parametrize("name", ["internlm2", "llama_bos_phi3", "qwen_like"])
def test_recorded_questions_from_the_official_files(name, tmp_path):
    seen = 0
    for number, case in enumerate(CASES):
        tokenizer, template, messages = recorded(case)
        asked = [text for role, text in messages if role == "human"]
        image = "<image>\n"
        plain = len(asked) == 1 and messages[0].role == "human" and asked[0].count("<image>") < 2
        if tokenizer != name or not plain or case.get("generation_ids") is None:
            continue
        counts = case.get("num_image_token_list") or []
        if counts and not asked[0].startswith(image):
            continue
        spoken = dialogue(tmp_path / str(number), name, template)
        ids = spoken.question(asked[0].removeprefix(image), sum(counts))
        assert ids == case["generation_ids"], (template, case["dialogue"])
        seen += 1
    assert seen


def test_vicuna_has_its_own_id_in_each_place(tmp_path):
    cases = [case for case in CASES if case["template"].split()[0] == "vicuna_v1"]
    spoken = dialogue(tmp_path, "llama_bos", "vicuna_v1")
    assert spoken.context_id < 0
    for case in cases:
        _, _, messages = recorded(case)
        once = [1] * sum(m.text.count("<image>") for m in messages)
        ids, labels = spoken.conversation(messages, once)
        assert (ids, labels) == (case["input_ids"], case["labels"])
    assert cases
    ids, labels = spoken.conversation(TALK, [3, 2])
    runs = np.flatnonzero(np.diff([0, *(np.array(ids) == spoken.context_id), 0]))
    assert np.diff(runs)[::2].tolist() == [3, 2]
    assert {labels[i] for i, found in enumerate(ids) if found == spoken.context_id} == {IGNORE}
    with pytest.raises(DataError, match=r"2 <image> in the conversation, but .* 1 images"):
        spoken.conversation(TALK, [3])


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("llama_bos", "vicuna_v1"),
        ("llama_bos", "internvl_zh"),
        ("llama_bos_phi3", "phi3-chat"),
        ("internlm2", "internlm2-chat"),
        ("qwen_like", "Hermes-2"),
        ("qwen_like", "internvl2_5"),
    ],
)
def test_a_model_is_asked_as_it_was_trained(name, template, tmp_path):
    spoken = dialogue(tmp_path, name, template)
    for tokens in (0, 4):
        given, learnt = spoken.exchange("What is it?", "A cat.", tokens)
        assert given.count(spoken.context_id) == tokens
        assert learnt[-1] == spoken.stop_id
        opened = spoken.question("What is it?", tokens)
        assert (given + learnt)[: len(opened)] == opened
        ids, labels = spoken.conversation(
            [Message("human", "<image>\nWhat is it?" if tokens else "What is it?"), TALK[1]],
            [tokens] if tokens else [],
        )
        assert ids[: len(given + learnt)] == given + learnt
        assert [i for i in labels if i != IGNORE] == learnt


def test_texts_are_embedded_as_officially(tmp_path):
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(GOLDEN / "tiny_spm.model"))
    folder = kept(tmp_path, "llama_bos")
    told = json.loads((folder / "special_tokens_map.json").read_text())
    told["pad_token"] = "</s>"  # whatever the tokenizer says: officially it is 0
    (folder / "special_tokens_map.json").write_text(json.dumps(told))
    tokenizer = official_tokenizer(folder, embeds=True)
    texts = ["", "a red apple", "word " * 200]
    ids, mask = tokenizer.encode_batch(texts, prefix=SUMMARIZE, max_tokens=EMBEDDED_TOKENS)
    for text, row, real in zip(texts, ids, mask, strict=True):
        inner = pieces.encode(SUMMARIZE + text)[: EMBEDDED_TOKENS - 2]
        assert row[real == 1].tolist() == [1, *inner, 2]
        assert not row[real == 0].any()
    assert mask.sum(1).tolist()[2] == tokenizer.embedded_tokens == 80
    with pytest.raises(ModelError, match=r'names no conversation template.* add "template"'):
        _ = tokenizer.dialogue


def test_a_caption_follows_its_prompt_without_a_blank(tmp_path):
    """The pieces of the whole text, not the caption's own, which would begin with a blank."""
    tokenizer = official_tokenizer(kept(tmp_path, "llama_bos"), embeds=True)
    ids, _, labels = caption_rows(tokenizer, ["red apple"], ["en"], max_tokens=60)
    learnt = labels[0] != IGNORE
    assert ids[0].tolist() == [1, *tokenizer.encode("English caption:red apple"), 2]
    assert tokenizer.decode(ids[0][~learnt]) == "English caption:"
    assert tokenizer.decode(labels[0][learnt]) == "red apple"
    assert labels[0][-1] == tokenizer.eos_id


def test_special_tokens_come_back_when_asked_for(tmp_path):
    tokenizer = official_tokenizer(kept(tmp_path, "internlm2"), embeds=False)
    text = "<ref>a</ref><box>[[1, 2]]</box>"
    ids = [*tokenizer.begin, *tokenizer.encode(text), tokenizer.eos_id]
    assert tokenizer.decode(ids, keep_special=True) == text
    assert tokenizer.decode(ids) == "a[[1, 2]]"


# --- files -----------------------------------------------------------------------------------


def test_qwen2_without_a_tokenizer_json(tmp_path):
    """vocab.json and merges.txt, as Qwen2's class in transformers reads them."""
    from transformers import Qwen2Tokenizer

    folder = kept(tmp_path, "qwen_like", "Hermes-2")
    model = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), "utf-8")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", "utf-8")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "Qwen2Tokenizer"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ours = official_tokenizer(folder, embeds=False)
    theirs = Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(m.split(" ")) for m in merges])
    for text in (*TEXTS, "It's 12345 x\r\n\n  y  ", "e\u0301 I'LL  go", "\tA-b_c!?\n"):
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], text
    assert ours.dialogue.stop_id == 2

    config["tokenizer_class"] = "GPT2Tokenizer"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"of a GPT2Tokenizer; .* give a tokenizer.json"):
        official_tokenizer(folder, embeds=False)


def test_a_tokenizer_json_says_itself_whether_it_begins_texts(tmp_path):
    folder = kept(tmp_path, "qwen_like", "Hermes-2")
    path = folder / "tokenizer.json"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config | {"bos_token": "<|endoftext|>"})
    )
    assert official_tokenizer(folder, embeds=False).begin == []
    facts = json.loads(path.read_text("utf-8"))
    facts["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
        },
    }
    path.write_text(json.dumps(facts), "utf-8")
    assert official_tokenizer(folder, embeds=False).begin == [0]


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"looked for .*official for tokenizer.model.* copy"):
        official_tokenizer(tmp_path / "official", embeds=False)
    unknown = official_tokenizer(kept(tmp_path / "a", "llama_bos", "vicuna_v9"), embeds=False)
    with pytest.raises(ConfigError, match="unknown conversation template 'vicuna_v9'; there are"):
        _ = unknown.dialogue
    other = official_tokenizer(kept(tmp_path / "b", "llama_bos", "internvl2_5"), embeds=False)
    with pytest.raises(ModelError, match=r"has no '<\|im_end\|>', which the model's template"):
        _ = other.dialogue


# --- imported folders ------------------------------------------------------------------------

SPOKEN = {
    "internvl_14b": ("llama_bos", None),
    "internvl_chat": ("internlm2", "internlm2-chat"),
    "transformers": ("qwen_like", None),
    "llava": ("llama_bos", None),
    "llava_full": ("llama_bos", None),
}
"""formats of models with text: a tokenizer that such a model may have, and its template"""


def config_of(format: str, rows: int = ROWS) -> InternVLConfig:
    text = DecoderConfig(
        vocab_size=rows, width=16, depth=2, heads=2, mlp_hidden=12, max_tokens=400, init_std=0.3
    )
    kind = "mlp2x" if format.startswith("llava") else "pixel_shuffle"
    connector = ConnectorConfig(kind=kind, ps_version="v2", select_layer=-1, init_std=0.3)
    return tiny_config(text=text, language=text, connector=connector)


def imported(folder: Path, format: str, rows: int = ROWS) -> Path:
    """An official folder of random weights, imported."""
    kind, (name, template) = FORMATS[format].kind, SPOKEN[format]
    own = train(TEXTS, 300)
    config = config_of(format, rows)
    save_model(folder / "made", kind, config, build(kind, config, seed=3), own)
    export_model(folder / "made", folder / "published", format)
    kept(folder / "published", name, template)
    import_model(folder / "published", folder / "ours")
    return folder / "ours"


def test_every_format_with_text_is_tried():
    assert set(SPOKEN) == {
        name for name, form in FORMATS.items() if form.kind != "vision" and "pth" not in name
    }


@pytest.mark.parametrize("format", SPOKEN)
def test_imported_models_are_evaluated_and_exported_again(format, tmp_path):
    folder = imported(tmp_path, format)
    data = write_concept_set(tmp_path / "set", 6, ("test",))
    suites = {"internvl_14b": ("zero_shot", "retrieval", "caption")}.get(
        format, ("caption", "colour", "box")
    )
    for suite in suites:
        out = tmp_path / f"{suite}.json"
        scores = evaluate_folder(folder, data, suite, out, scenes=4, log=lambda _: None)
        assert {score.suite for score in scores} == {suite}
        assert all(math.isfinite(score.value) for score in scores)

    model = load_model(folder)
    kind, config = read_config(folder)
    save_model(tmp_path / "tuned", kind, config, model.module, model.tokenizer)
    assert not (tmp_path / "tuned/tokenizer.json").exists()
    export_model(tmp_path / "tuned", tmp_path / "back", format)
    files = {p.name for p in (tmp_path / "published").iterdir()}
    assert {p.name for p in (tmp_path / "back").iterdir()} == files
    for name in files - {"model.safetensors"}:
        there = (tmp_path / "published" / name).read_bytes()
        assert (tmp_path / "tuned/official" / name).read_bytes() == there
        assert (tmp_path / "back" / name).read_bytes() == there


@pytest.mark.parametrize("format", ["internvl_chat", "llava"])
def test_a_picture_changes_what_an_imported_chat_model_says(format, tmp_path):
    """Visual tokens go where the prompt has places for them."""
    model = load_model(imported(tmp_path, format))
    spoken = model.dialogue
    ids = torch.tensor([spoken.question("What?", model.config.visual_tokens(model.kind))])
    pixels = torch.randn(2, 1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        first, second = (
            model.module.chat_hidden(ids, one, context_id=spoken.context_id) for one in pixels
        )
    changed = (first != second).any(-1)[0]
    start = ids[0].tolist().index(spoken.context_id)
    assert not changed[:start].any()
    assert changed[start:].all()


def test_the_template_stays_when_a_trained_model_has_another_config(tmp_path):
    folder = imported(tmp_path, "internvl_chat")
    facts = json.loads((folder / "config.json").read_text())
    facts["model"]["vision"]["drop_path"] = 0.1
    (folder / "config.json").write_text(json.dumps(facts))
    export_model(folder, tmp_path / "back", "internvl_chat")
    written = json.loads((tmp_path / "back/config.json").read_text())
    assert written["template"] == "internlm2-chat"
    assert written["vision_config"]["drop_path_rate"] == 0.1


def test_a_model_folder_has_one_tokenizer(tmp_path):
    """Whatever lay in the folder before: that of the model that was saved last."""
    loaded = load_model(imported(tmp_path, "internvl_14b"))
    own = train(TEXTS, 300)
    for tokenizer in (own, loaded.tokenizer, own):
        save_model(tmp_path / "it", loaded.kind, loaded.config, loaded.module, tokenizer)
        found = load_tokenizer(tmp_path / "it")
        assert found.vocab_size == tokenizer.vocab_size
        assert (tmp_path / "it/official").exists() == (tokenizer is not own)


def test_tokens_beyond_the_embedding_matrix_are_refused(tmp_path):
    beyond = imported(tmp_path / "a", "internvl_chat", rows=625)
    with pytest.raises(ModelError, match=r"'<quad>': 625.* beyond the embedding .* has 625 rows"):
        load_model(beyond)
    smaller = imported(tmp_path / "b", "internvl_14b", rows=600)
    (smaller / "official/added_tokens.json").unlink()
    with pytest.raises(ModelError, match="has 620 tokens, and the embedding matrix 600 rows"):
        load_tokenizer(smaller)


def test_a_folder_without_tokenizer_files_says_what_to_do(tmp_path):
    folder = imported(tmp_path, "internvl_chat")
    shutil.rmtree(folder / "official")
    with pytest.raises(ModelError, match=r"no tokenizer: looked for .* copy the tokenizer files"):
        load_model(folder)
    kept(folder / "official", "internlm2")
    with pytest.raises(ModelError, match="names no conversation template"):
        load_model(folder)
    write_template(folder / "official", "internlm2-chat")
    assert (
        load_model(folder).dialogue.context_id
        == {token: index for index, token in RECORDED["internlm2"]["added"]}[IMG_CONTEXT]
    )
