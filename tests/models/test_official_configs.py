"""Options of official configs: taken, or refused by name; what is left out has its default."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from vlfoundry.infra.core.errors import ConfigError, ModelError
from vlfoundry.models.families import families
from vlfoundry.models.internvl.convert import import_model
from vlfoundry.models.internvl.hf import config_from_native, config_from_official
from vlfoundry.models.internvl.predict import read_config
from vlfoundry.models.official.configs import CHAT, DUAL, NATIVE, NATIVE_VISION, VISION

CASES = Path(__file__).parents[1] / "cases"
OPTIONS = CASES / "config-options-ignored"
CHAT_FOLDER = OPTIONS / "weights_chat"
NATIVE_FOLDER = CASES / "hf-saved-names" / "live"
GOLDEN = Path(__file__).parents[1] / "eval" / "golden"


def facts_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text("utf-8"))


def changed(facts: dict, address: str, value) -> dict:
    """A copy with one field set; "llm_config.hidden_act" is in the part `llm_config`."""
    facts = json.loads(json.dumps(facts))
    *parts, name = address.split(".")
    target = facts
    for part in parts:
        target = target[part]
    target[name] = value
    return facts


def copy(source: Path, target: Path, facts: dict) -> Path:
    target.mkdir()
    shutil.copyfile(source / "model.safetensors", target / "model.safetensors")
    (target / "config.json").write_text(json.dumps(facts))
    return target


def refused(source: Path, tmp_path: Path, address: str, value, match: str = "") -> None:
    folder = copy(source, tmp_path / "source", changed(facts_of(source), address, value))
    with pytest.raises(ConfigError) as caught:
        import_model(folder, tmp_path / "ours")
    message = str(caught.value)
    assert message.startswith(f"{folder / 'config.json'}: {address} is ")
    assert "expected" in message
    assert match in message
    assert len(message) < 500
    assert "\n" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("address", "value"),
    [
        ("vision_config.hidden_act", "quick_gelu"),
        ("vision_config.norm_type", "batch_norm"),
        ("vision_config.num_channels", 4),
        ("vision_config.dropout", 0.1),
        ("vision_config.attention_dropout", 0.1),
        ("llm_config.hidden_act", "gelu"),
        ("llm_config.attention_bias", True),
        ("llm_config.mlp_bias", True),
        ("llm_config.use_sliding_window", True),
        ("llm_config.layer_types", ["sliding_attention"]),
        ("llm_config.rope_scaling", {"type": "yarn", "factor": 2.0}),
        (
            "llm_config.rope_scaling",
            {"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
        ),
        ("llm_config.rope_scaling", {"type": "dynamic"}),
        ("llm_config.head_dim", 15),
        ("llm_config.quantization_config", {"bits": 4}),
        ("llm_config.attention_dropout", 0.5),
        ("ps_version", "v3"),
        ("select_layer", -3),
        ("select_layer", 2),
        ("force_image_size", 56),
        ("downsample_ratio", 0.3),
        ("downsample_ratio", 0.25),
        ("quantization_config", {"quant_method": "awq"}),
    ],
)
def test_an_option_that_changes_the_maths_is_refused(address, value, tmp_path):
    folder = copy(CHAT_FOLDER, tmp_path / "source", changed(facts_of(CHAT_FOLDER), address, value))
    with pytest.raises(ConfigError) as caught:
        import_model(folder, tmp_path / "ours")
    assert str(caught.value).startswith(f"{folder / 'config.json'}: {address}")
    assert " is " in str(caught.value)
    assert "expected" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("address", "value"),
    [
        ("projector_hidden_act", "relu"),
        ("vision_feature_select_strategy", "full"),
        ("vision_feature_layer", [-2, -1]),
        ("vision_feature_layer", -3),
        ("vision_config.use_absolute_position_embeddings", False),
        ("vision_config.use_mask_token", True),
        ("vision_config.use_mean_pooling", False),
        ("vision_config.hidden_act", "relu"),
        ("vision_config.norm_type", "none"),
        ("vision_config.num_channels", 1),
        ("vision_config.image_size", [28, 42]),
        ("vision_config.hidden_dropout_prob", 0.1),
        ("vision_config.projection_dropout", 0.1),
        ("text_config.attention_dropout", 0.1),
        ("text_config.use_sliding_window", True),
        ("text_config.model_type", "gemma3"),
        ("text_config.rope_parameters", {"rope_type": "longrope", "rope_theta": 1e6}),
    ],
)
def test_an_option_of_transformers_own_class_is_refused(address, value, tmp_path):
    facts = facts_of(NATIVE_FOLDER)
    if address == "text_config.model_type":
        del facts["text_config"]["architectures"]
    folder = copy(NATIVE_FOLDER, tmp_path / "source", changed(facts, address, value))
    with pytest.raises(ConfigError) as caught:
        import_model(folder, tmp_path / "ours")
    assert str(caught.value).startswith(f"{folder / 'config.json'}: {address} is ")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_norms_of_q_and_k_have_their_own_eps_in_transformers():
    facts = changed(facts_of(NATIVE_FOLDER), "vision_config.use_qk_norm", True)
    assert config_from_native(facts).vision.qk_norm
    with pytest.raises(
        ConfigError, match=r"vision_config\.layer_norm_eps is 1e-05, expected 1e-06"
    ):
        config_from_native(changed(facts, "vision_config.layer_norm_eps", 1e-5))


@pytest.mark.parametrize("case", ["vision_quick_gelu", "native_projector_relu",
                                  "select_layer_beyond", "ps_version_v3"])  # fmt: skip
def test_the_cases_of_ignored_options(case, tmp_path):
    source = NATIVE_FOLDER if case.startswith("native") else CHAT_FOLDER
    folder = copy(source, tmp_path / "source", facts_of(OPTIONS / case))
    with pytest.raises(ConfigError, match="expected"):
        import_model(folder, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


NONSENSE = (None, "abc", [8], {"a": 1}, True, 2.5, -8, 0, 10**9, 10**400, float("nan"))


@pytest.mark.parametrize("value", NONSENSE, ids=lambda v: str(v)[:12])
@pytest.mark.parametrize(
    "address",
    [
        "llm_config.hidden_size", "llm_config.num_hidden_layers", "llm_config.num_attention_heads",
        "llm_config.intermediate_size", "llm_config.vocab_size",
        "llm_config.max_position_embeddings",
        "vision_config.hidden_size", "vision_config.num_hidden_layers",
        "vision_config.num_attention_heads", "vision_config.intermediate_size",
        "vision_config.patch_size", "vision_config.image_size",
    ],
)  # fmt: skip
def test_sizes_that_cannot_be_are_named(address, value):
    if (address, value) == ("llm_config.max_position_embeddings", 10**9):
        return
    with pytest.raises(ConfigError) as caught:
        config_from_official(changed(facts_of(CHAT_FOLDER), address, value))
    assert str(caught.value).startswith(f"{address} is ")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("address", "value"),
    [
        ("vision_config.layer_norm_eps", float("nan")),
        ("vision_config.layer_norm_eps", float("inf")),
        ("vision_config.layer_norm_eps", 0),
        ("vision_config.qkv_bias", "yes"),
        ("vision_config.qk_normalization", 1),
        ("vision_config.drop_path_rate", -0.1),
        ("vision_config.initializer_factor", "0.1"),
        ("llm_config.rms_norm_eps", float("nan")),
        ("llm_config.tie_word_embeddings", "yes"),
        ("llm_config.rope_theta", "big"),
        ("llm_config.rope_theta", -1.0),
        ("llm_config.num_key_value_heads", 3),
        ("vision_config", "x"),
        ("vision_config", []),
        ("llm_config", None),
        ("llm_config", "x"),
        ("use_llm_lora", -4),
        ("use_llm_lora", "16"),
        ("downsample_ratio", 0),
        ("downsample_ratio", 1e-320),
        ("downsample_ratio", float("nan")),
        ("template", 7),
    ],
)
def test_values_that_cannot_be_are_named(address, value):
    with pytest.raises(ConfigError, match="expected"):
        config_from_official(changed(facts_of(CHAT_FOLDER), address, value))


def test_more_layers_than_tensors_are_refused_by_what_the_file_holds(tmp_path):
    refused(
        CHAT_FOLDER, tmp_path, "llm_config.num_hidden_layers", 4001,
        "expected at most 39, for ",
    )  # fmt: skip


def test_an_internvl_14b(tmp_path):
    facts = facts_of(GOLDEN / "internvl_14b")
    for address, value in (
        ("attn_pool_num_heads", 7),
        ("num_query_token", 0),
        ("cross_attention_frequency", "2"),
        ("force_image_size", 57),
        ("qllama_config.num_hidden_layers", 10**9),
        ("qllama_config", []),
    ):
        with pytest.raises(ConfigError, match=rf"^{address} is "):
            config_from_official(changed(facts, address, value))
    # The class makes its position embedding of that size, and its own field goes before qllama's.
    config = config_from_official(facts | {"force_image_size": 70, "cross_attention_frequency": 3})
    assert (config.vision.image_px, config.queries.cross_attention_frequency) == (70, 3)
    bare = {k: v for k, v in facts.items() if k != "num_query_token"}
    del bare["qllama_config"]["cross_attention_frequency"]
    config = config_from_official(bare)
    assert config.queries.num_queries == 96
    assert config.queries.cross_attention_frequency == 2


def test_what_is_left_out_has_the_official_default(tmp_path):
    case = CASES / "config-defaults-left-out"
    import_model(case / "model", tmp_path / "out")
    import_model(case / "whole", tmp_path / "whole")
    for file in ("config.json", "weights.safetensors"):
        got, wanted = (tmp_path / name / file for name in ("out", "whole"))
        assert got.read_bytes() == wanted.read_bytes()

    facts = facts_of(case / "whole")
    del facts["ps_version"]
    import_model(copy(case / "whole", tmp_path / "source", facts), tmp_path / "v1")
    assert read_config(tmp_path / "v1")[1].connector.ps_version == "v1"


@pytest.mark.parametrize("field", ["hidden_size", "vocab_size", "num_key_value_heads"])
def test_a_size_that_is_left_out_and_does_not_fit_is_named(field, tmp_path):
    facts = facts_of(CHAT_FOLDER)
    del facts["llm_config"][field]
    folder = copy(CHAT_FOLDER, tmp_path / "source", facts)
    with pytest.raises((ConfigError, ModelError), match=rf"llm_config\.{field}"):
        import_model(folder, tmp_path / "ours")


INSTALLED = {
    "InternVLConfig": NATIVE,
    "InternVLVisionConfig": NATIVE_VISION,
}
"""the tables of classes that transformers has; the others' are in no package"""
INSTALLED |= {
    family.architecture.replace("ForCausalLM", "Config"): family.table
    for family in families().values()
    if family.in_transformers
}


def test_the_defaults_are_those_of_the_classes_that_are_installed():
    import transformers

    for name_of_class, table in INSTALLED.items():
        config = getattr(transformers, name_of_class)()
        official = config.to_dict()
        for name, field in table.fields.items():
            if name in official and field.default is not None and isinstance(field.default, int):
                wanted = official[name]
                wanted = wanted[0] if isinstance(wanted, list | tuple) else wanted
                assert field.default == wanted, (name_of_class, name)


def test_every_field_of_the_classes_that_are_installed_is_in_a_table():
    import transformers

    for name_of_class, table in INSTALLED.items():
        config = getattr(transformers, name_of_class)()
        assert not set(config.to_dict()) - {*table.fields, *table.harmless}
    for table in (VISION, CHAT, DUAL):
        assert not set(table.fields) & table.harmless


def test_fields_that_nobody_knows_are_told(tmp_path):
    facts = facts_of(CHAT_FOLDER) | {"new_trick": 3}
    facts["llm_config"]["other"] = 1
    done = import_model(copy(CHAT_FOLDER, tmp_path / "source", facts), tmp_path / "ours")
    assert done.unknown == ("new_trick", "llm_config.other")


def test_a_weight_that_is_no_number_is_named(tmp_path):
    weights = load_file(CHAT_FOLDER / "model.safetensors")
    for number, bad in enumerate((float("nan"), float("-inf"))):
        broken = {n: t.clone() for n, t in weights.items()}
        broken["mlp1.1.weight"][3, 5] = bad
        folder = tmp_path / f"source-{number}"
        folder.mkdir()
        shutil.copyfile(CHAT_FOLDER / "config.json", folder / "config.json")
        for half in (False, True):
            stored = {n: t.bfloat16() if half else t for n, t in broken.items()}
            save_file(stored, folder / "model.safetensors")
            with pytest.raises(ModelError, match=r"tensor 'mlp1\.1\.weight' of .* NaN or inf"):
                import_model(folder, tmp_path / "ours")
        assert not (tmp_path / "ours").exists()
    assert len(list(tmp_path.iterdir())) == 2


# --- one thing said twice ---------------------------------------------------------------------


LINEAR = {"type": "linear", "factor": 4.0}
DEFAULT = {"rope_type": "default"}


@pytest.mark.parametrize(
    ("fields", "base", "factor"),
    [
        ({"rope_parameters": DEFAULT, "rope_scaling": LINEAR}, 10000.0, 4.0),
        ({"rope_parameters": DEFAULT, "rope_scaling": LINEAR, "rope_theta": 777.0}, 777.0, 4.0),
        (
            {
                "rope_parameters": DEFAULT | {"rope_theta": 777.0},
                "rope_scaling": LINEAR,
                "rope_theta": 777.0,
            },
            777.0,
            4.0,
        ),
        (
            {
                "rope_parameters": DEFAULT | {"rope_theta": 777.0},
                "rope_scaling": LINEAR | {"rope_theta": 777.0},
            },
            777.0,
            4.0,
        ),
        ({"rope_parameters": DEFAULT | {"rope_theta": 777.0}, "rope_scaling": None}, 777.0, None),
        ({"rope_parameters": LINEAR, "rope_scaling": {}, "rope_theta": 777.0}, 777.0, 4.0),
        ({"rope_parameters": LINEAR, "rope_scaling": LINEAR, "rope_theta": None}, None, None),
    ],
)
@pytest.mark.parametrize("part", ["llm_config", "text_config"])
def test_old_and_new_names_of_rotary_positions_are_read_as_by_transformers(
    part, fields, base, factor
):
    """The expected values are also those of transformers itself."""
    from transformers import Qwen2Config

    chat = part == "llm_config"
    facts = facts_of(CHAT_FOLDER if chat else NATIVE_FOLDER)
    for name in ("rope_theta", "rope_scaling", "rope_parameters"):
        facts[part].pop(name, None)
    facts[part] |= fields
    read = config_from_official if chat else config_from_native
    if base is None:
        with pytest.raises(ConfigError, match=rf"{part}\.rope_theta is None, expected a number"):
            read(facts)
        return
    language = read(json.loads(json.dumps(facts))).language
    theirs = Qwen2Config(**json.loads(json.dumps(fields))).rope_parameters
    assert (language.rope_base, base) == (base, theirs["rope_theta"])
    scaling = language.rope_scaling
    assert (scaling and scaling.factor, factor) == (factor, theirs.get("factor"))


@pytest.mark.parametrize(
    ("parameters", "scaling"),
    [
        (DEFAULT | {"rope_theta": 777.0}, LINEAR),  # transformers would fall back to 10000
        (LINEAR, LINEAR | {"factor": 3.0}),
        (LINEAR, {"type": "dynamic", "factor": 4.0}),
        (LINEAR, {"type": "default"}),
    ],
)
def test_old_and_new_names_of_rotary_positions_that_disagree(parameters, scaling, tmp_path):
    facts = facts_of(NATIVE_FOLDER)
    facts["text_config"].pop("rope_theta", None)
    facts["text_config"] |= {"rope_parameters": parameters, "rope_scaling": scaling}
    with pytest.raises(ConfigError, match=r"^text_config\.rope_parameters is .*rope_scaling = "):
        config_from_native(facts)


@pytest.mark.parametrize(
    ("source", "address", "value", "match"),
    [
        (CHAT_FOLDER, "llm_config.rope_scaling", {"type": "linear", "rope_type": "dynamic",
                                                  "factor": 2.0}, "rope_type"),
        (CHAT_FOLDER, "llm_config.rope_theta", None, "a number above 0"),
        (NATIVE_FOLDER, "text_config.rope_parameters", {"rope_theta": None}, ""),
        (NATIVE_FOLDER, "image_token_id", 100000, "an id below text_config.vocab_size"),
        (CHAT_FOLDER, "img_context_token_id", 100000, "an id below llm_config.vocab_size"),
        (NATIVE_FOLDER, "vision_config.patch_size", [7, 7, 7], "or two that are equal"),
        (NATIVE_FOLDER, "vision_config.image_size", [28], "or two that are equal"),
        (CHAT_FOLDER, "llm_config.layer_types", ["full_attention"] * 9, "for each of the"),
        (NATIVE_FOLDER, "text_config.layer_types", [], "for each of the"),
        (NATIVE_FOLDER, "vision_config.model_type", "siglip", "internvl_vision"),
        (CHAT_FOLDER, "vision_config.model_type", "siglip", "intern_vit_6b"),
        (NATIVE_FOLDER, "text_config.model_type", "gemma3", "architectures"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_is_refused_by_name(source, address, value, match, tmp_path):
    facts = facts_of(source)
    if address == "text_config.model_type":
        facts["text_config"]["architectures"] = ["Qwen2ForCausalLM"]
    folder = copy(source, tmp_path / "source", changed(facts, address, value))
    with pytest.raises(ConfigError) as caught:
        import_model(folder, tmp_path / "ours")
    message = str(caught.value)
    assert message.startswith(f"{folder / 'config.json'}: {address}")
    assert "expected" in message
    assert match in message


def test_two_language_models_are_refused(tmp_path):
    facts = facts_of(NATIVE_FOLDER)
    facts["llm_config"] = facts["text_config"] | {"rope_theta": 5.0}
    folder = copy(NATIVE_FOLDER, tmp_path / "source", facts)
    with pytest.raises(ModelError, match=r"config\.json has llm_config and text_config, expected"):
        import_model(folder, tmp_path / "ours")
