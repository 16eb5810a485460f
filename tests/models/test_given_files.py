"""Model folders from outside: files that are something else, lead elsewhere, or are spoilt."""

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.official_text import write_tokenizer
from tests.support.tiny_models import TEXTS, tiny_config
from vlfoundry.flows.cli import main
from vlfoundry.infra.core.errors import ModelError, UserError
from vlfoundry.models.chat.official import official_tokenizer
from vlfoundry.models.internvl.convert import export_model, import_model
from vlfoundry.models.internvl.model import build
from vlfoundry.models.internvl.predict import load_model, read_weights, save_model
from vlfoundry.models.layers.config import DecoderConfig
from vlfoundry.models.tokenizer import train

pytestmark = pytest.mark.slow

CASES = Path(__file__).parents[1] / "cases"
CHAT = CASES / "config-options-ignored" / "weights_chat"
SPOILT = [
    *(CASES / "import_broken_pickle").iterdir(),
    *(CASES / "import_hostile_config").iterdir(),
    *(CASES / "import_hostile_index").iterdir(),
]
INSTEAD = {
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n",
    "a web page": b"<!DOCTYPE html><html><body>404</body></html>\n",
    "empty": b"",
}


def chat_folder(target: Path) -> Path:
    """An official chat model with tokenizer files, and LICENSE and README beside it."""
    target.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(CHAT / name, target / name)
    write_tokenizer(target, "qwen_like")
    (target / "LICENSE").write_text("<html> may be in a licence")
    return target


def code_and_line(capsys, monkeypatch, *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["vlfoundry", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code or 0, capsys.readouterr().err


@pytest.mark.parametrize("folder", [d for d in SPOILT if d.is_dir()], ids=lambda d: d.name)
def test_spoilt_folders_are_refused_in_one_line(folder, tmp_path, capsys, monkeypatch):
    target = tmp_path / "out"
    code, error = code_and_line(capsys, monkeypatch, "import", str(folder), str(target))
    if folder.name == "ok_control":
        assert (code, error) == (0, "")
        return
    assert code == 2
    assert error.startswith(f"vlfoundry: {folder}") or f" of {folder}" in error
    assert error.count("\n") == 1
    assert len(error) < 600
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", INSTEAD)
@pytest.mark.parametrize(
    "file",
    ["config.json", "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json",
     "model-1.safetensors", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"],
)  # fmt: skip
def test_a_file_that_is_something_else_is_named(file, what, tmp_path):
    source = chat_folder(tmp_path / "source")
    if file in ("pytorch_model.bin", "model-1.safetensors", "model.safetensors.index.json"):
        names = list(load_file(source / "model.safetensors"))
        (source / "model.safetensors").unlink()
        if file != "pytorch_model.bin":
            index = {"weight_map": dict.fromkeys(names, "model-1.safetensors")}
            (source / "model.safetensors.index.json").write_text(json.dumps(index))
    (source / file).write_bytes(INSTEAD[what])
    with pytest.raises(ModelError, match=rf"{file} is {what}") as caught:
        import_model(source, tmp_path / "ours")
    assert "running what is in it" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "LICENSE")


@pytest.mark.parametrize("file", FILES)
def test_a_link_out_of_the_folder_is_refused(file, tmp_path):
    source = chat_folder(tmp_path / "source")
    (source / file).rename(tmp_path / "secret")
    (source / file).symlink_to("../secret")
    with pytest.raises(ModelError, match=rf"{file} is a link to \.\./secret, outside of"):
        import_model(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()

    # One that stays inside is only another name.
    (source / file).unlink()
    (tmp_path / "secret").rename(source / "inside")
    (source / file).symlink_to("inside")
    import_model(source, tmp_path / "ours")
    if file == "LICENSE":
        assert not (tmp_path / "ours" / "official" / file).is_symlink()


def test_the_hub_cache_is_made_of_links_and_is_read(tmp_path):
    model = tmp_path / "models--OpenGVLab--X"
    snapshot = chat_folder(model / "snapshots" / "0123")
    (model / "blobs").mkdir()
    for path in list(snapshot.iterdir()):
        path.rename(model / "blobs" / f"hash-of-{path.name}")
        path.symlink_to(f"../../blobs/hash-of-{path.name}")
    import_model(snapshot, tmp_path / "ours")
    (snapshot / "LICENSE").unlink()
    (snapshot / "LICENSE").symlink_to("/etc/hostname")
    with pytest.raises(ModelError, match="LICENSE is a link to /etc/hostname, outside"):
        import_model(snapshot, tmp_path / "again")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_pipe_or_a_device_is_refused(file, tmp_path):
    source = chat_folder(tmp_path / "source")
    (source / file).unlink()
    os.mkfifo(source / file)
    with pytest.raises(ModelError, match=rf"{file} is a named pipe, expected a file"):
        import_model(source, tmp_path / "ours")
    (source / file).unlink()
    (source / file).symlink_to("/dev/zero")
    with pytest.raises(ModelError, match="is a link to /dev/zero, outside of"):
        import_model(source, tmp_path / "ours")


def test_a_shard_and_a_pth_that_lead_out_are_refused(tmp_path):
    source = chat_folder(tmp_path / "source")
    names = list(load_file(source / "model.safetensors"))
    index = {"weight_map": dict.fromkeys(names, "model-1.safetensors")}
    (source / "model.safetensors").rename(tmp_path / "elsewhere")
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    (source / "model-1.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=r"model-1\.safetensors is a link to .*elsewhere"):
        import_model(source, tmp_path / "ours")
    torch.save({}, tmp_path / "elsewhere.pth")
    (source / "vit.pth").symlink_to(tmp_path / "elsewhere.pth")
    (source / "config.json").write_text('{"model_type": "intern_vit_6b"}')
    with pytest.raises(ModelError, match=r"vit\.pth is a link to .*elsewhere\.pth"):
        import_model(source / "vit.pth", tmp_path / "ours")


def test_official_files_of_a_model_folder_are_not_followed_either(tmp_path):
    import_model(chat_folder(tmp_path / "source"), tmp_path / "ours")
    kept = tmp_path / "ours" / "official" / "tokenizer_config.json"
    kept.rename(tmp_path / "secret")
    kept.symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match="outside of"):
        export_model(tmp_path / "ours", tmp_path / "out", "internvl_chat")
    assert not (tmp_path / "out").exists()


def test_pytorchs_old_format_is_read(tmp_path):
    import_model(CASES / "bin-of-old-pytorch" / "model", tmp_path / "old")
    weights = torch.load(
        CASES / "bin-of-old-pytorch" / "model" / "pytorch_model.bin", weights_only=True
    )
    new = tmp_path / "new"
    new.mkdir()
    shutil.copy(CASES / "bin-of-old-pytorch" / "model" / "config.json", new)
    torch.save(weights, new / "pytorch_model.bin")
    import_model(new, tmp_path / "again")
    got, wanted = (read_weights(tmp_path / name) for name in ("old", "again"))
    assert len(got) == 34
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_a_failed_import_can_be_tried_again(tmp_path):
    source = chat_folder(tmp_path / "source")
    good = (source / "model.safetensors").read_bytes()
    weights = load_file(source / "model.safetensors")
    weights["mlp1.3.bias"] = weights["mlp1.3.bias"] * float("nan")
    save_file(weights, source / "model.safetensors")
    with pytest.raises(ModelError, match="NaN"):
        import_model(source, tmp_path / "ours")
    (source / "model.safetensors").write_bytes(good)
    (tmp_path / "ours").mkdir()  # an empty folder may be there
    import_model(source, tmp_path / "ours")
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE(source.stat().st_mode)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "source"]


def test_a_target_that_cannot_be_made(tmp_path):
    source = chat_folder(tmp_path / "source")
    for target in (source / "config.json" / "x", Path("/proc/vlfoundry")):
        with pytest.raises(ModelError, match="cannot be written"):
            import_model(source, target)


# --- our own folders --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ours") / "model"
    config = tiny_config(text=DecoderConfig(vocab_size=320, width=24, heads=4))
    save_model(folder, "internvl_c", config, build("internvl_c", config), train(TEXTS * 3, 320))
    load_model(folder)
    return folder


def spoil(folder: Path, path: str, value) -> None:
    facts = json.loads((folder / "config.json").read_text())
    *parts, name = path.split(".")
    target = facts["model"]
    for part in parts:
        target = target[part]
    target[name] = value
    (folder / "config.json").write_text(json.dumps(facts))


@pytest.mark.parametrize("case", sorted(d.name for d in (CASES / "broken_model_folder").iterdir()))
def test_a_spoilt_file_of_our_own_folder_is_named(case, ours, tmp_path):
    if case == "README.md":
        return
    shutil.copytree(ours, tmp_path / "m")
    for path in (CASES / "broken_model_folder" / case).iterdir():
        shutil.copyfile(path, tmp_path / "m" / path.name)
        file = path.name
    with pytest.raises(UserError, match=rf"{file}.* again" if case != "config_list" else file):
        load_model(tmp_path / "m")


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("vision.depth", 10**9, r"config\.json: model\.vision: depth is 1000000000, expected"),
        ("text.depth", 10**9, r"model\.text: depth is 1000000000, expected a whole number"),
        ("vision.depth", 4001, r"config\.json: vision\.depth is 4001, expected at most"),
        ("vision.width", 10**7 * 5, r"'vision\.class_embedding' .* asks for \[50000000\]"),
        ("text.vocab_size", 10**9, r"'text\.embedding\.weight' .* asks for \[1000000000, 24\]"),
        ("text.mlp_hidden", 10**8, r"linear_fc1"),
        ("embed_dim", 10**9, "asks for"),
        ("text.depth", -2, r"config\.json: model\.text: depth is -2, expected"),
        ("text.heads", 0, r"heads is 0, expected a whole number from 1"),
        ("vision.eps", float("nan"), r"eps: got nan, expected a finite number"),
        ("vision.qkv_bias", "yes", r"qkv_bias: got 'yes', expected true or false"),
        ("vision", None, r"model\.vision: got None, expected a mapping"),
    ],
)
def test_a_number_of_our_own_config_that_cannot_be(field, value, match, ours, tmp_path):
    shutil.copytree(ours, tmp_path / "m")
    spoil(tmp_path / "m", field, value)
    with pytest.raises(UserError, match=match):
        load_model(tmp_path / "m")


def test_weights_that_are_cut(ours, tmp_path):
    shutil.copytree(ours, tmp_path / "m")
    path = tmp_path / "m" / "weights.safetensors"
    whole = path.read_bytes()
    for content in (whole[:-1000], whole[:100], whole[:3], b"", os.urandom(4000), whole + b"0"):
        path.write_bytes(content)
        with pytest.raises(ModelError, match=r"weights\.safetensors is .* again"):
            load_model(tmp_path / "m")


# --- whatever stands in a JSON file -----------------------------------------------------------


def said(do) -> str:
    """What a user's mistake is told as; nothing where all is well."""
    try:
        do()
    except UserError as error:
        return str(error)
    return ""


ANYTHING = (None, True, -1, 10**30, float("nan"), "", "abc", [1], {"a": 1})


def places(value, path: tuple = ()):
    """Where something stands in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:2])
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))


def with_anything(path: Path):
    """Write a JSON file anew with each place taken by each of `ANYTHING`."""
    text = path.read_text("utf-8")
    for place in list(places(json.loads(text))):
        for value in ANYTHING:
            facts = json.loads(text)
            target = facts
            for key in place[:-1]:
                target = target[key]
            target[place[-1]] = value
            path.write_text(json.dumps(facts), "utf-8")
            yield place, value
    path.write_text(text, "utf-8")


@pytest.mark.parametrize(
    "source",
    [CHAT, CASES / "hf-saved-names" / "saved", CASES.parent / "eval" / "golden" / "internvl_14b"],
    ids=lambda path: path.name,
)
def test_whatever_stands_in_an_official_config(source, tmp_path):
    """It is taken or refused in one line, and nothing is left behind."""
    folder, target = tmp_path / "source", tmp_path / "ours"
    folder.mkdir()
    weights = next(source.glob("[mw]*.safetensors"))
    shutil.copyfile(weights, folder / "model.safetensors")
    shutil.copyfile(source / "config.json", folder / "config.json")
    refused = 0
    for place, value in with_anything(folder / "config.json"):
        message = said(lambda: import_model(folder, target))
        assert "\n" not in message, (place, value)
        assert bool(message) != target.exists(), (place, value)
        refused += bool(message)
        shutil.rmtree(target, ignore_errors=True)
        assert [path.name for path in tmp_path.iterdir()] == ["source"], (place, value)
    assert refused > 100


@pytest.mark.parametrize("name", ["llama_bos", "internlm2", "qwen_like"])
def test_whatever_stands_in_tokenizer_files(name, tmp_path):
    write_tokenizer(tmp_path, name)
    (tmp_path / "config.json").write_text('{"template": "internvl2_5"}')
    for path in sorted(tmp_path.glob("*.json")):
        if path.name != "tokenizer.json":
            for _ in with_anything(path):
                assert "\n" not in said(lambda: official_tokenizer(tmp_path, embeds=False))


def test_whatever_stands_in_our_own_config(ours, tmp_path):
    shutil.copytree(ours, tmp_path / "m")
    for _ in with_anything(tmp_path / "m" / "config.json"):
        assert "\n" not in said(lambda: load_model(tmp_path / "m"))


# --- names, sizes and codes that stand in files -----------------------------------------------


def refused_line(source: Path, tmp_path: Path) -> str:
    with pytest.raises(UserError) as caught:
        import_model(source, tmp_path / "ours")
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 1500
    assert not (tmp_path / "ours").exists()
    return message


@pytest.mark.parametrize(
    "name",
    ["x" * 5000, "x" * 300 + ".safetensors", "\u4e2d" * 100, "a\nb", "\ud800", "\x1b[31m", "."],
    ids=["long", "long_ending", "long_in_bytes", "line_end", "surrogate", "escape", "dot"],
)
def test_a_shard_of_a_name_that_cannot_be(name, tmp_path):
    source = chat_folder(tmp_path / "source")
    names = list(load_file(source / "model.safetensors"))
    (source / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(names, name)}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    line = refused_line(source, tmp_path)
    assert "index.json names the shard" in line
    assert "expected a file beside the index" in line


def test_names_of_tensors_are_escaped_and_cut(tmp_path):
    source = chat_folder(tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    bias = weights.pop("mlp1.3.bias")
    weights |= {"mlp1.3.bias\n\x1b[31mred": bias, "y" * 3000: bias.clone()}
    save_file(weights, source / "model.safetensors")
    line = refused_line(source, tmp_path)
    assert r"mlp1.3.bias\n\x1b[31mred" in line
    assert "yyy..." in line


def test_names_that_are_told_after_an_import_are_escaped(tmp_path, capsys, monkeypatch):
    source = chat_folder(tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    weights["a\n\x1b[31m.rotary_emb.inv_freq"] = torch.ones(3)
    save_file(weights, source / "model.safetensors")
    facts = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(facts | {"field\n\x1b[31m": 1}))
    monkeypatch.setattr("sys.argv", ["vlfoundry", "import", str(source), str(tmp_path / "ours")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert r"left out: a\n\x1b[31m.rotary_emb.inv_freq" in out
    assert r"field\n\x1b[31m" in out


@pytest.mark.parametrize(
    ("file", "mib"),
    [("config.json", 16), ("model.safetensors.index.json", 16), ("tokenizer_config.json", 256),
     ("tokenizer.json", 256), ("README.md", 256), ("other.model", 256)],
)  # fmt: skip
def test_a_file_that_is_too_large_is_refused_before_it_is_read(file, mib, tmp_path):
    source = chat_folder(tmp_path / "source")
    with (source / file).open("ab") as stream:
        stream.truncate(mib * 1024 * 1024 + 1)
    assert f"{file} has {mib * 1024 * 1024 + 1:,} bytes, expected at most" in refused_line(
        source, tmp_path
    )


def test_a_field_that_comes_twice_is_refused(tmp_path):
    source = chat_folder(tmp_path / "source")
    text = (source / "config.json").read_text()
    (source / "config.json").write_text(text.rstrip()[:-1] + ', "select_layer": -2}')
    assert "'select_layer' comes twice" in refused_line(source, tmp_path)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_a_folder_in_place_of_a_file(file, tmp_path):
    source = chat_folder(tmp_path / "source")
    (source / file).unlink()
    (source / file).mkdir()
    assert f"{source / file} is a directory, expected a file" in refused_line(source, tmp_path)


def test_the_file_of_the_source_is_named_and_not_its_copy(tmp_path):
    source = chat_folder(tmp_path / "source")
    for path in source.glob("tokenizer*"):
        path.unlink()
    for spoilt in ("[1]", "{"):
        (source / "tokenizer.json").write_text(spoilt)
        line = refused_line(source, tmp_path)
        assert line.startswith(f"{source / 'tokenizer.json'} is damaged")
        assert ".part" not in line


def test_types_that_differ_within_one_matrix(tmp_path):
    source = chat_folder(tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    name = next(n for n in weights if n.endswith("0.self_attn.k_proj.weight"))
    weights[name] = weights[name].to(torch.float64)
    save_file(weights, source / "model.safetensors")
    line = refused_line(source, tmp_path)
    assert line.startswith(f"{source}: ")
    assert f"{name} is torch.float64" in line
    assert "save the model in one type" in line


@pytest.mark.parametrize("field", ["use_llm_lora", "use_backbone_lora"])
def test_ranks_of_adapters_that_are_not_there(field, tmp_path):
    source = chat_folder(tmp_path / "source")
    facts = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(facts | {field: 16}))
    line = refused_line(source, tmp_path)
    assert line.startswith(f"{source / 'config.json'}: {field} is 16, but the weights in")
    assert "have no adapters" in line
    assert "set it to 0" in line


def test_links_of_caches(tmp_path):
    """A model in a folder of a snapshot is read; of what is not known, it is said what to do."""
    model = tmp_path / "models--OpenGVLab--X"
    below = chat_folder(model / "snapshots" / "0123" / "tower")
    elsewhere = tmp_path / "disk"
    elsewhere.mkdir()
    (model / "blobs").symlink_to(elsewhere)
    for path in list(below.iterdir()):
        path.rename(elsewhere / f"hash-of-{path.name}")
        path.symlink_to(f"../../../blobs/hash-of-{path.name}")
    import_model(below, tmp_path / "ours")
    shutil.rmtree(tmp_path / "ours")

    copied = tmp_path / "mine"
    copied.mkdir()
    for path in elsewhere.iterdir():
        (copied / path.name.removeprefix("hash-of-")).symlink_to(path)
    assert f"`cp -rL {copied} NEW`" in refused_line(copied, tmp_path)
