"""Import and export: bit for bit, every tensor accounted for, refusals with the reason."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.tiny_models import TEXTS, tiny_config
from vlfoundry.infra.core.errors import ConfigError, ModelError
from vlfoundry.models.families import read_official
from vlfoundry.models.internvl.convert import FORMATS, export_model, import_model
from vlfoundry.models.internvl.hf import config_from_official, config_to_official
from vlfoundry.models.internvl.model import build
from vlfoundry.models.internvl.predict import read_config, read_weights, save_model
from vlfoundry.models.tokenizer import train

GOLDEN = Path(__file__).parents[1] / "eval" / "golden"
FOLDERS = {
    "internvit_layer": "internvit",
    "internvit_rms": "internvit",
    "internvl_14b": "internvl_14b",
    "internvl_chat": "internvl_chat",
}


def official(name: str, folder: Path, store: str = "one", dtype=torch.float32) -> Path:
    """A folder as it is published, from the recorded one: one file, or shards with an index."""
    folder.mkdir()
    shutil.copy(GOLDEN / name / "config.json", folder)
    (folder / "tokenizer.model").write_bytes(b"pieces")
    (folder / "modeling.py").write_text("raise SystemExit\n")
    weights = load_file(GOLDEN / name / "weights.safetensors")
    weights = {n: t if t.dim() == 0 else t.to(dtype) for n, t in weights.items()}
    if store == "one":
        save_file(weights, folder / "model.safetensors")
        return folder
    save, stem = {
        "shards": (save_file, "model"),
        "bin": (torch.save, "pytorch_model"),
    }[store]
    suffix = "safetensors" if store == "shards" else "bin"
    names = {n: f"{stem}-{1 + i % 2:05d}-of-00002.{suffix}" for i, n in enumerate(sorted(weights))}
    for file in set(names.values()):
        save({n: weights[n] for n in names if names[n] == file}, folder / file)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_bits(got, wanted):
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert got[name].dtype == tensor.dtype, name
        assert got[name].shape == tensor.shape, name
        bits = [x.reshape(-1).view(torch.uint8) for x in (got[name], tensor)]
        assert torch.equal(*bits), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("store", ["one", "shards", "bin"])
@pytest.mark.parametrize("name", FOLDERS)
def test_import_and_export_is_bit_identical(name, store, dtype, tmp_path):
    source = official(name, tmp_path / "source", store, dtype)
    done = import_model(source, tmp_path / "ours")
    assert (done.format, done.left_out) == (FOLDERS[name], ())
    back = export_model(tmp_path / "ours", tmp_path / "back", FOLDERS[name])
    assert back.size == done.size
    whole = official(name, tmp_path / "whole", dtype=dtype)
    assert_same_bits(weights_of(tmp_path / "back"), weights_of(whole))
    assert {p.name for p in (tmp_path / "back").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.model"
    }  # fmt: skip
    for file in ("config.json", "tokenizer.model"):
        assert (tmp_path / "back" / file).read_bytes() == (source / file).read_bytes()


@pytest.mark.parametrize("name", FOLDERS)
def test_a_config_of_our_own_says_the_same(name):
    facts = json.loads((GOLDEN / name / "config.json").read_text())
    form = FORMATS[FOLDERS[name]]
    config = form.read(facts)
    assert form.read(config_to_official(config, form.kind)) == config


def test_a_trained_model_goes_out_and_comes_back(tmp_path):
    config = tiny_config()
    for kind, format in (("internvl_g", "internvl_14b"), ("chat_simple", "transformers")):
        ours, out, again = (tmp_path / f"{kind}-{step}" for step in ("ours", "out", "again"))
        save_model(ours, kind, config, build(kind, config, seed=5), train(TEXTS * 3, 320))
        export_model(ours, out, format)
        import_model(out, again)
        assert read_config(again)[0] == kind
        assert_same_bits(read_weights(again), read_weights(ours))


def test_transformers_own_format(tmp_path):
    """The recorded weights of transformers' class are what ours become, and the other way."""
    name = "internvl_chat_qwen2"
    recorded = load_file(GOLDEN / name / "hf_native_weights.safetensors")
    config = config_from_official(json.loads((GOLDEN / name / "config.json").read_text()))
    ours = tmp_path / "ours"
    save_model(ours, "chat_simple", config, build("chat_simple", config), train(TEXTS * 3, 320))
    export_model(ours, tmp_path / "first", "transformers")
    first = weights_of(tmp_path / "first")
    assert {n: t.shape for n, t in first.items()} == {n: t.shape for n, t in recorded.items()}

    save_file(recorded, tmp_path / "first" / "model.safetensors", {"format": "pt"})
    import_model(tmp_path / "first", tmp_path / "second")
    export_model(tmp_path / "second", tmp_path / "third", "transformers")
    assert_same_bits(weights_of(tmp_path / "third"), recorded)
    export_model(tmp_path / "second", tmp_path / "chat", "internvl_chat")
    import_model(tmp_path / "chat", tmp_path / "fourth")
    assert_same_bits(read_weights(tmp_path / "fourth"), read_weights(tmp_path / "second"))


def test_the_bias_of_the_sigmoid_loss_stays_behind(tmp_path):
    """The formats' logits go into softmaxes, where it cancels."""
    config = tiny_config().for_sigmoid()
    model, folder = build("internvl_c", config, seed=4), tmp_path / "ours"
    save_model(folder, "internvl_c", config, model, train(TEXTS * 3, 320))
    assert read_weights(folder)["logit_bias"] == -10
    done = export_model(folder, tmp_path / "out", "internvl_c_pth")
    assert done.left_out == ("logit_bias",)
    assert "logit_bias" not in torch.load(tmp_path / "out" / "model.pth")


def test_a_part_of_a_model(tmp_path):
    source = official("internvl_14b", tmp_path / "source")
    done = import_model(source, tmp_path / "c", kind="internvl_c")
    assert "qllama.lm_head.weight" in done.left_out
    assert "query_tokens" in done.left_out
    assert not [n for n in done.left_out if n.startswith(("vision_model.", "clip_projector."))]
    with pytest.raises(
        ModelError, match=r"lacks queries, text_head; formats for a internvl_c: internvl_c_pth"
    ):
        export_model(tmp_path / "c", tmp_path / "out", "internvl_14b")

    import_model(source, tmp_path / "vision", kind="vision")
    export_model(tmp_path / "vision", tmp_path / "vit", "internvit")
    vision = {
        n.removeprefix("vision_model."): t
        for n, t in weights_of(source).items()
        if n.startswith("vision_model.")
    }
    assert_same_bits(weights_of(tmp_path / "vit"), vision)
    with pytest.raises(ModelError, match="a chat_simple cannot be had from the source"):
        import_model(source, tmp_path / "chat", kind="chat_simple")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("itm_head.bias"), "1 missing: itm_head.bias"),
        (lambda w: w.update(new=torch.ones(1)), "1 surplus: new"),
        (
            lambda w: w.update(query_tokens=torch.ones(1, 6, 63)),
            r"query_tokens \[1, 6, 63\] \(expected \[1, 6, 64\]\)",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(change, message, tmp_path):
    source = official("internvl_14b", tmp_path / "source")
    weights = weights_of(source)
    change(weights)
    save_file(weights, source / "model.safetensors")
    with pytest.raises(ModelError, match=message):
        import_model(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_buffers_of_old_files_are_left_out(tmp_path):
    source = official("internvl_14b", tmp_path / "source")
    name = "qllama.model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file(weights_of(source) | {name: torch.ones(8)}, source / "model.safetensors")
    assert import_model(source, tmp_path / "ours").left_out == (name,)


def test_what_cannot_be_held_is_refused(tmp_path):
    import_model(official("internvl_chat", tmp_path / "source"), tmp_path / "ours")
    with pytest.raises(ModelError, match="the pixel shuffle is 'v1'"):
        export_model(tmp_path / "ours", tmp_path / "out", "transformers")
    with pytest.raises(ModelError, match="no place for connector, language; formats for a chat"):
        export_model(tmp_path / "ours", tmp_path / "out", "internvit")
    with pytest.raises(ModelError, match="format 'onnx' does not exist; known: internvit"):
        export_model(tmp_path / "ours", tmp_path / "out", "onnx")
    with pytest.raises(ModelError, match="is there already"):
        export_model(tmp_path / "ours", tmp_path / "source", "internvl_chat")


def test_a_folder_of_no_known_format_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json does not exist"):
        import_model(tmp_path, tmp_path / "ours")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ModelError, match="model_type 'bert'; what is read: an InternViT folder"):
        import_model(tmp_path, tmp_path / "ours")
    (tmp_path / "config.json").write_text('{"model_type": "intern_vit_6b"}')
    with pytest.raises(ModelError, match="holds no weights"):
        import_model(tmp_path, tmp_path / "ours")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_parameters": {"rope_type": "yarn"}}, "expected the type default, linear, dynamic"),
        ({"head_dim": 15}, r"head_dim is 15, expected an even number"),
        ({"attention_bias": True}, "attention_bias is True, expected False"),
    ],
)
def test_a_language_model_of_another_shape_is_refused(change, message):
    text = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}
    with pytest.raises(ConfigError, match=message):
        read_official(text | change)


@pytest.mark.parametrize(
    ("name", "kind", "format"),
    [
        ("internvit_rms", "vision", "internvit_pth"),
        ("internvl_14b", "internvl_c", "internvl_c_pth"),
    ],
)
def test_timm_style_files(name, kind, format, tmp_path):
    import_model(official(name, tmp_path / "source"), tmp_path / "ours", kind=kind)
    export_model(tmp_path / "ours", tmp_path / "pth", format)
    path = tmp_path / "pth" / "model.pth"
    weights = torch.load(path, weights_only=True)
    assert {"cls_token", "pos_embed", "patch_embed.proj.bias", "blocks.0.ls1.gamma"} <= set(weights)
    if kind == "internvl_c":
        assert "transformer.layers.0.self_attn.q_proj.weight" in weights
        assert not [n for n in weights if "cross_attn.q_proj" in n or "lm_head" in n]
    done = import_model(path, tmp_path / "again")
    assert (done.format, done.kind, done.left_out) == (format, kind, ())
    assert_same_bits(read_weights(tmp_path / "again"), read_weights(tmp_path / "ours"))

    config = path.with_name("config.json").rename(tmp_path / "config.json")
    with pytest.raises(ModelError, match=r"config\.json does not exist"):
        import_model(path, tmp_path / "third")
    torch.save({"module": weights | {"clip_projector.new": torch.ones(1)}}, path)
    if kind == "internvl_c":
        with pytest.raises(ModelError, match=r"1 surplus: clip_projector\.new"):
            import_model(path, tmp_path / "third", config_file=config)
    else:
        done = import_model(path, tmp_path / "third", config_file=config)
        assert done.left_out == ("clip_projector.new",)


@pytest.mark.parametrize("options", [{"qkv_bias": True}, {"qk_norm": True, "head_dim": 6}])
def test_a_text_tower_that_is_no_llama_has_no_official_names(options):
    config = tiny_config()
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, **options))
    for kind in ("internvl_c", "internvl_g"):
        with pytest.raises(ModelError, match=r"tower is of the family qwen\d; InternVL-14B"):
            config_to_official(config, kind)
