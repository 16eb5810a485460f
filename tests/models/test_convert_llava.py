"""InternVL-Chat 1.0 in LLaVA's form, with QLLaMA and without.

No such checkpoint is recorded, so the names below are written out from the specification (section
10.4) and the official LLaVA fork, and what the layers compute is shown by parts whose numbers are
recorded: the vision tower and QLLaMA are taken over from the recorded InternVL-14B.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlfoundry.infra.core.errors import ConfigError, ModelError
from vlfoundry.infra.train.weights import load_weights
from vlfoundry.models.internvl.convert import export_model, import_model
from vlfoundry.models.internvl.hf import TOWER
from vlfoundry.models.internvl.model import build
from vlfoundry.models.internvl.predict import read_config, read_weights

GOLDEN = Path(__file__).parents[1] / "eval" / "golden" / "internvl_14b"
WIDTH, VOCAB, HIDDEN, DEPTH = 32, 70, 24, 2
VISION, TEXT = 80, 64  # of the recorded InternVL-14B
FOUND = "model.vision_tower.vision_tower."
LLAVA = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava",
    "hidden_act": "silu",
    "hidden_size": WIDTH,
    "image_aspect_ratio": "pad",
    "initializer_range": 0.02,
    "intermediate_size": HIDDEN,
    "max_position_embeddings": 64,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "num_attention_heads": 4,
    "num_hidden_layers": DEPTH,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "vocab_size": VOCAB,
}


def mlp(prefix: str, inner: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}0.weight": (WIDTH, inner),
        f"{prefix}0.bias": (WIDTH,),
        f"{prefix}2.weight": (WIDTH, WIDTH),
        f"{prefix}2.bias": (WIDTH,),
    }


def language() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, WIDTH),
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": (VOCAB, WIDTH),
    }
    for index in range(DEPTH):
        layer = f"model.layers.{index}."
        shapes |= {f"{layer}self_attn.{p}_proj.weight": (WIDTH, WIDTH) for p in "qkvo"}
        shapes |= {f"{layer}mlp.{p}_proj.weight": (HIDDEN, WIDTH) for p in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (WIDTH, HIDDEN)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{layer}{norm}.weight"] = (WIDTH,)
    return shapes


def llava(folder: Path, *, full: bool) -> tuple[Path, Path]:
    """A folder as it would be published, and the config.json of its tower."""
    folder.mkdir()
    tower = json.loads((GOLDEN / "config.json").read_text())
    projector = "model.mm_projector."
    shapes = language()
    if full:
        name, kind = "pretrained/internvl_14b_224px", "two_mlp"
        shapes |= mlp(f"{projector}mlp1.", VISION) | mlp(f"{projector}mlp2.", TEXT)
    else:
        name, kind, tower = "OpenGVLab/InternViT-6B-224px", "mlp2x_gelu", tower["vision_config"]
        shapes |= mlp(projector, VISION)
    config = LLAVA | {"mm_vision_tower": name, "mm_projector_type": kind}
    config["mm_hidden_size"] = TEXT if full else VISION
    (folder / "config.json").write_text(json.dumps(config))
    tower_file = folder.with_name(f"{folder.name}-tower.json")
    tower_file.write_text(json.dumps(tower))
    generator = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(s, generator=generator) * 0.3 for n, s in shapes.items()}
    for name, tensor in load_file(GOLDEN / "weights.safetensors").items():
        part = name.partition(".")[0]
        if full and part in ("vision_model", "qllama", "query_tokens"):
            weights[FOUND + name] = tensor
        if not full and part == "vision_model":
            weights[FOUND + name.removeprefix("vision_model.")] = tensor
    save_file(weights, folder / "model.safetensors")
    return folder, tower_file


@pytest.mark.parametrize("full", [False, True])
def test_import_and_export(full, tmp_path):
    source, tower = llava(tmp_path / "source", full=full)
    done = import_model(source, tmp_path / "ours", tower_config=tower)
    format = "llava_full" if full else "llava"
    assert (done.format, done.kind) == (format, "chat_full" if full else "chat_simple")
    # Chat full asks QLLaMA for no text.
    unused = (f"{FOUND}qllama.lm_head.weight",) if full else ()
    assert done.left_out == unused

    export_model(tmp_path / "ours", tmp_path / "back", format)
    weights, back = (load_file(f / "model.safetensors") for f in (source, tmp_path / "back"))
    assert set(weights) - set(back) == set(unused)
    assert set(back) <= set(weights)
    for name, tensor in back.items():
        assert torch.equal(tensor, weights[name]), name
    published, ours = (
        json.loads((f / "config.json").read_text()) for f in (source, tmp_path / "back")
    )
    assert ours.pop(TOWER) == json.loads(tower.read_text())
    assert ours == published
    import_model(tmp_path / "back", tmp_path / "again")
    assert read_config(tmp_path / "again") == read_config(tmp_path / "ours")


def test_a_config_of_our_own_says_the_same(tmp_path):
    for full in (False, True):
        source, tower = llava(tmp_path / f"source-{full}", full=full)
        folder = tmp_path / f"ours-{full}"
        import_model(source, folder, tower_config=tower)
        (folder / "official" / "config.json").unlink()
        export_model(folder, tmp_path / f"back-{full}", "llava_full" if full else "llava")
        import_model(tmp_path / f"back-{full}", tmp_path / f"again-{full}")
        assert read_config(tmp_path / f"again-{full}") == read_config(folder)


def test_chat_full_computes_with_the_parts_where_they_belong(tmp_path):
    """Queries by mlp2 first, then patches of the selected layer by mlp1."""
    source, tower = llava(tmp_path / "source", full=True)
    import_model(source, tmp_path / "ours", tower_config=tower)
    kind, config = read_config(tmp_path / "ours")
    model = build(kind, config).eval()
    load_weights(model, read_weights(tmp_path / "ours"))
    dual_folder = tmp_path / "dual"
    import_model(GOLDEN, dual_folder)
    dual = build(*read_config(dual_folder)).eval()
    load_weights(dual, read_weights(dual_folder))

    weights = load_file(source / "model.safetensors")

    def project(name, x):
        w = {n: weights[f"model.mm_projector.{name}.{n}"] for n in mlp("", 1)}
        inner = torch.nn.functional.gelu(x @ w["0.weight"].T + w["0.bias"])
        return inner @ w["2.weight"].T + w["2.bias"]

    images = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        states = dual.vision.hidden_states(images)
        queries = project("mlp2", dual.text.encode_image(states[-1]))
        patches = project("mlp1", states[-2][:, 1:])
        got = model.visual_tokens(images)
    wanted = torch.cat([queries, patches], 1)
    assert got.shape == (2, 6 + 16, WIDTH)
    assert torch.allclose(got, wanted, atol=1e-4, rtol=1e-4)


def test_what_the_tower_is_has_to_be_said(tmp_path):
    source, tower = llava(tmp_path / "source", full=False)
    with pytest.raises(ConfigError, match=r"InternViT-6B-224px'; give .* with --tower-config"):
        import_model(source, tmp_path / "ours")
    with pytest.raises(ModelError, match=r"none\.json does not exist"):
        import_model(source, tmp_path / "ours", tower_config=tmp_path / "none.json")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"mm_projector_type": "linear"}))
    with pytest.raises(ConfigError, match="mm_projector_type is 'linear', expected one of"):
        import_model(source, tmp_path / "ours", tower_config=tower)


def test_formats_that_cannot_hold_them_say_why(tmp_path):
    for full in (False, True):
        source, tower = llava(tmp_path / f"source-{full}", full=full)
        import_model(source, tmp_path / f"ours-{full}", tower_config=tower)
    simple, whole = tmp_path / "ours-False", tmp_path / "ours-True"
    for format in ("internvl_chat", "transformers"):
        with pytest.raises(ModelError, match=r"connector is of kind 'mlp2x'; .* have 'pixel_sh"):
            export_model(simple, tmp_path / "out", format)
        with pytest.raises(
            ModelError, match="no place for queries, text; formats for a chat_full: llava_full"
        ):
            export_model(whole, tmp_path / "out", format)
    with pytest.raises(ModelError, match="the model lacks queries, text"):
        export_model(simple, tmp_path / "out", "llava_full")
    with pytest.raises(ModelError, match="a internvl_c cannot be had from the source"):
        import_model(
            tmp_path / "source-True", tmp_path / "c", kind="internvl_c", tower_config=tower
        )
    assert not (tmp_path / "out").exists()
