"""What each stage takes of which folder, what begins from nothing, and what is refused."""

import dataclasses
from pathlib import Path

import pytest

from tests.support.start_models import CONFIG, make_folder
from vlfoundry.infra.core.errors import ModelError
from vlfoundry.models.connector.config import ConnectorConfig
from vlfoundry.models.estimate.weights import weights
from vlfoundry.models.internvl.config import PARTS, InternVLConfig
from vlfoundry.models.internvl.init_from import RULES, InitPlan, plan_init
from vlfoundry.models.layers.config import DecoderConfig, LoraConfig
from vlfoundry.models.qllama.config import QLlamaConfig

CONTRAST = {"clip_projector", "text_projection", "logit_scale"}
QUERIES = {
    "text.query_tokens",
    "text.decoder.layers.*.cross_attention",
    "clip_projector2",
    "itm_head",
}


def plan(root: Path, address: str, config: InternVLConfig = CONFIG, **folders: str) -> InitPlan:
    """Of folders that are made when nothing is there, each of the kind that is its name."""
    for folder in set(folders.values()):
        if not (root / folder).exists():
            make_folder(root / folder, folder)
    return plan_init(address, config, folders, root)


def taken(start: InitPlan) -> dict[str, dict[str, str]]:
    return {part_source.folder: part_source.parts for part_source in start.part_sources}


def same(*parts: str) -> dict[str, str]:
    return {part: part for part in parts}


BOTH = same("vision", "text", *CONTRAST)


@pytest.mark.parametrize(
    ("address", "folders", "parts", "new"),
    [
        ("contrastive", {"model": "text"}, {"text": same("text")}, {"vision", *CONTRAST}),
        ("contrastive", {"model": "internvl_c"}, {"internvl_c": BOTH}, set()),
        ("contrastive", {"model": "internvl_g"}, {"internvl_g": BOTH}, set()),
        (
            "contrastive",
            {"model": "chat_full"},
            {"chat_full": same("vision", "text")},
            CONTRAST,
        ),
        (
            "generative",
            {"model": "internvl_c", "head": "text"},
            {"internvl_c": BOTH, "text": same("text.head")},
            QUERIES,
        ),
        (
            "generative",
            {"model": "internvl_g", "head": "internvl_g"},
            {"internvl_g": BOTH | same("clip_projector2", "itm_head")},
            set(),
        ),
        (
            "sft@simple",
            {"vision": "internvl_c", "language": "text"},
            {"internvl_c": same("vision"), "text": {"language": "text"}},
            {"connector"},
        ),
        (
            "sft@simple",
            {"vision": "vision", "language": "chat_simple"},
            {"vision": same("vision"), "chat_simple": same("language", "connector")},
            set(),
        ),
        (
            "sft@simple",
            {"vision": "internvl_g", "language": "internvl_g"},
            {"internvl_g": {"language": "text"}},
            {"connector"},
        ),
        (
            "sft@full",
            {"qllama": "internvl_g", "chat": "chat_simple"},
            {
                "internvl_g": same("text"),
                "chat_simple": same("vision", "connector", "language"),
            },
            {"query_connector"},
        ),
        (
            "sft@full",
            {"qllama": "chat_full", "chat": "chat_full"},
            {"chat_full": same("vision", "connector", "query_connector", "language")},
            set(),
        ),
    ],
)
def test_every_part_that_a_folder_has_goes_on(
    tmp_path: Path, address: str, folders: dict, parts: dict, new: set
) -> None:
    start = plan(tmp_path, address, **folders)
    assert taken(start) == parts  # of a folder that is named twice: what is taken last
    assert set(start.new) == new


def test_every_weight_comes_from_somewhere(tmp_path: Path) -> None:
    """A kind that goes on from itself begins with nothing new, in every stage."""
    for address, rule in RULES.items():
        start = plan(tmp_path, address, **dict.fromkeys(rule.takes, rule.kind))
        assert start.new == ()
        targets = {target for part_source in start.part_sources for target in part_source.parts}
        for weight in weights(rule.kind, CONFIG):
            assert any(f"{weight.name}.".startswith(f"{target}.") for target in targets), weight


@pytest.mark.parametrize(
    ("address", "folders", "message"),
    [
        (
            "contrastive",
            {"model": "vision"},
            r"vision \(vision\) has no 'text\.embedding\.weight'.* must not begin from nothing; "
            r"set contrastive\.start\.model to a folder of one of the kinds \['text', 'internvl_c'",
        ),
        (
            "generative",
            {"model": "text", "head": "text"},
            r"text \(text\) has no 'vision\.class_embedding'.*set generative\.start\.model",
        ),
        (
            "generative",
            {"model": "chat_full", "head": "text"},
            r"chat_full \(chat_full\) has no 'clip_projector\.",
        ),
        (
            "generative",
            {"model": "internvl_c", "head": "internvl_c"},
            r"internvl_c \(internvl_c\) has no 'text\.head\.weight'.*set generative\.start\.head "
            r"to a folder of one of the kinds \['text', 'internvl_g'\]",
        ),
        (
            "sft@simple",
            {"vision": "text", "language": "text"},
            r"text \(text\) has no 'vision\..*set sft\.start\.simple\.vision",
        ),
        (
            "sft@simple",
            {"vision": "internvl_c", "language": "internvl_c"},
            r"has no 'language\.head\.weight' or 'text\.head\.weight'.*"
            r"kinds \['text', 'internvl_g', 'chat_simple', 'chat_full'\]",
        ),
        (
            "sft@simple",
            {"vision": "vision", "language": "vision"},
            r"vision \(vision\) has no 'language\.embedding\.weight' or 'text\.embedding\.weight'",
        ),
        (
            "sft@full",
            {"qllama": "internvl_c", "chat": "chat_simple"},
            r"has no 'text\.query_tokens'.*kinds \['internvl_g', 'chat_full'\]",
        ),
        (
            "sft@full",
            {"qllama": "internvl_g", "chat": "internvl_g"},
            r"internvl_g \(internvl_g\) has no 'language\.embedding\.weight'.*"
            r"set sft\.start\.full\.chat",
        ),
        (
            "generative",
            {"model": "internvl_g", "head": "text"},
            r"text and internvl_g both have 'text\.head\.weight'.*in generative\.start",
        ),
    ],
)
def test_what_must_not_begin_from_nothing(
    tmp_path: Path, address: str, folders: dict, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        plan(tmp_path, address, **folders)


def changed(part: str, **values: object) -> InternVLConfig:
    tower = dataclasses.replace(getattr(CONFIG, part), **values)
    return dataclasses.replace(CONFIG, **{part: tower})


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        (
            "internvl_g",
            changed("vision", heads=1, mlp_hidden=32),
            r"vision\.heads is 1 there and 2 in the parameters; vision\.mlp_hidden is "
            r"32 there and 64 in the parameters\. Start from another folder, or",
        ),
        ("internvl_g", changed("vision", norm="layer"), r"vision\.norm is 'layer' there"),
        ("internvl_g", changed("text", rope_base=5e5), r"text\.rope_base is 500000\.0 there"),
        (
            "internvl_g",
            changed("queries", cross_attention_frequency=3),
            r"queries\.cross_attention_frequency is 3 there",
        ),
        (
            "internvl_g",
            dataclasses.replace(CONFIG, embed_dim=16, pool_heads=4),
            r"embed_dim is 16 there and 32 in the parameters; pool_heads is 4 there",
        ),
        (
            "internvl_g",
            changed("text", width=64, heads=4, depth=3, mlp_hidden=32, vocab_size=300),
            r"; and 2 more\. Start",
        ),
    ],
)
def test_another_architecture_is_refused_by_its_fields(
    tmp_path: Path, kind: str, config: InternVLConfig, message: str
) -> None:
    make_folder(tmp_path / "there", kind, config)
    with pytest.raises(
        ModelError, match=rf"there \({kind}\) has another architecture: .*{message}"
    ):
        plan(tmp_path, "generative", model="there", head="there")


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("connector", ConnectorConfig(ps_version="v1"), r"connector\.ps_version is 'v1' there"),
        (
            "language",
            dataclasses.replace(CONFIG.text, mlp_hidden=96),
            r"language\.mlp_hidden is 96 there and text\.mlp_hidden 64 in the parameters",
        ),
    ],
)
def test_a_chat_model_of_another_architecture(
    tmp_path: Path, part: str, value: object, message: str
) -> None:
    make_folder(tmp_path / "there", "chat_simple", dataclasses.replace(CONFIG, **{part: value}))
    with pytest.raises(ModelError, match=message):
        plan(tmp_path, "sft@simple", vision="there", language="there")


def test_what_says_how_a_model_begins_or_is_trained_may_differ(tmp_path: Path) -> None:
    config = dataclasses.replace(
        changed("vision", drop_path=0.2, init_std=0.5, layerscale_init=0.3),
        text=dataclasses.replace(CONFIG.text, max_tokens=40, key_value_heads=CONFIG.text.heads),
        queries=QLlamaConfig(num_queries=2, init_std=0.5),
        temperature=0.3,
    )
    make_folder(tmp_path / "there", "internvl_g", config)
    assert plan(tmp_path, "generative", model="there", head="there").new == ()


def test_parts_that_are_not_taken_may_be_anything(tmp_path: Path) -> None:
    make_folder(tmp_path / "there", "internvl_g", changed("vision", depth=3))
    start = plan(tmp_path, "sft@full", qllama="there", chat="chat_simple")
    assert taken(start)["there"] == {"text": "text"}
    other = dataclasses.replace(CONFIG, text=DecoderConfig(width=64))
    make_folder(tmp_path / "seen", "internvl_c", other)
    assert plan(tmp_path, "sft@simple", vision="seen", language="text").new == ("connector",)


def test_the_sigmoid_loss_s_bias(tmp_path: Path) -> None:
    with_bias = CONFIG.for_sigmoid()
    make_folder(tmp_path / "learnt", "internvl_c", with_bias)
    assert plan(tmp_path, "contrastive", with_bias, model="learnt").new == ()
    assert plan(tmp_path, "contrastive", with_bias, model="internvl_c").new == ("logit_bias",)
    assert plan(tmp_path, "contrastive", model="learnt").new == ()


def test_adapters_go_on_or_begin(tmp_path: Path) -> None:
    adapted = CONFIG.with_lora(language=LoraConfig(rank=2))
    make_folder(tmp_path / "adapted", "chat_simple", adapted)
    both = {"vision": "adapted", "language": "adapted"}
    assert plan(tmp_path, "sft@simple", adapted, **both).new == ()
    more = CONFIG.with_lora(language=LoraConfig(rank=2), vision=LoraConfig(rank=2))
    assert plan(tmp_path, "sft@simple", more, **both).new == ("vision.*.lora",)
    with pytest.raises(ModelError, match="fold them in with `vlfoundry merge`"):
        plan(tmp_path, "sft@simple", **both)


def test_a_head_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    """After new data pretrain_text has other tokens than last week's model."""
    folders = {"model": "internvl_c", "head": "text"}
    plan(tmp_path, "generative", **folders)
    for folder, content in (("internvl_c", "{}"), ("text", "{} ")):
        (tmp_path / folder / "tokenizer.json").write_text(content, "utf-8")
    with pytest.raises(ModelError, match=r"text have different tokenizers; set generative\.start"):
        plan(tmp_path, "generative", **folders)
    (tmp_path / "text/tokenizer.json").write_text("{}", "utf-8")
    assert set(plan(tmp_path, "generative", **folders).new) == QUERIES
    (tmp_path / "text/tokenizer.json").unlink()
    (tmp_path / "text/official").mkdir()
    (tmp_path / "text/official/tokenizer.model").write_bytes(b"pieces")
    with pytest.raises(ModelError, match="text have different tokenizers"):
        plan(tmp_path, "generative", **folders)


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    make_folder(tmp_path / "half", "internvl_c", without="vision.decoder.layers.1")
    with pytest.raises(ModelError, match=r"only a part of 'vision'; make the folder again"):
        plan(tmp_path, "contrastive", model="half")
    make_folder(tmp_path / "none", "internvl_c")
    (tmp_path / "none/weights.safetensors").write_bytes(b"short")
    with pytest.raises(ModelError, match="is damaged: it has no header"):
        plan(tmp_path, "contrastive", model="none")
    (tmp_path / "none/weights.safetensors").unlink()
    with pytest.raises(ModelError, match="is not a complete model folder"):
        plan(tmp_path, "contrastive", model="none")
    make_folder(tmp_path / "lying", "internvl_c", changed("vision", mlp_hidden=32))
    text = (make_folder(tmp_path / "honest", "internvl_c") / "config.json").read_text("utf-8")
    (tmp_path / "lying/config.json").write_text(text, "utf-8")
    with pytest.raises(ModelError, match=r"in lying, whose config promises \[64, 32\]"):
        plan(tmp_path, "contrastive", model="lying")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="is not a model folder"):
        plan(tmp_path, "contrastive", model="empty")


def test_it_is_printed_and_recorded(tmp_path: Path) -> None:
    lines: list[str] = []
    facts: dict = {}
    start = plan(tmp_path, "sft@simple", vision="internvl_c", language="text")
    start.announce(lines.append, facts.update)
    assert lines == [
        "from internvl_c (internvl_c): vision",
        "from text (text): language (its text)",
        "new: connector",
    ]
    assert facts["start"]["new"] == ["connector"]
    assert [entry["folder"] for entry in facts["start"]["from"]] == ["internvl_c", "text"]


def test_every_kind_can_start_something(tmp_path: Path) -> None:
    """The table of profiles (flows.start) is checked against this one there."""
    started = set()
    for kind in PARTS:
        for address, rule in RULES.items():
            for slot in rule.takes:
                folders = dict.fromkeys(rule.takes, rule.kind) | {slot: kind}
                try:
                    plan(tmp_path, address, **folders)
                except ModelError:
                    continue
                started.add(kind)
    assert started == set(PARTS)
