"""Shards are read, and files written, tensor by tensor."""

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlfoundry.infra.core.errors import ModelError
from vlfoundry.infra.core.tensorfiles import TensorFacts, TensorFiles, write_tensors

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.tensor(3.5, dtype=torch.bfloat16),
    "c": torch.tensor([1.0, float("nan")], dtype=torch.float16),
}


def sharded(folder, kind="safetensors"):
    save = save_file if kind == "safetensors" else torch.save
    stem = "model" if kind == "safetensors" else "pytorch_model"
    names = {name: f"{stem}-0000{i}.{kind}" for i, name in enumerate(TENSORS)}
    for name, file in names.items():
        save({name: TENSORS[name]}, folder / file)
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


def same_bits(got, wanted):
    return got.dtype == wanted.dtype and torch.equal(
        got.reshape(-1).view(torch.uint8), wanted.reshape(-1).view(torch.uint8)
    )


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards(kind, tmp_path):
    with TensorFiles(sharded(tmp_path, kind)) as files:
        assert files.facts["a"] == TensorFacts(shape=(2, 3), dtype=torch.float32)
        assert files.facts.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert same_bits(files.read(name), tensor)


@pytest.mark.parametrize("wrapper", [None, "module"])
def test_one_pytorch_file(wrapper, tmp_path):
    path = tmp_path / "tower.pth"
    torch.save({wrapper: TENSORS} if wrapper else TENSORS, path)
    with TensorFiles(path) as files:
        assert same_bits(files.read("c"), TENSORS["c"])


def test_written_and_read_again(tmp_path):
    path = tmp_path / "new" / "model.safetensors"
    facts = {n: TensorFacts(shape=tuple(t.shape), dtype=t.dtype) for n, t in TENSORS.items()}
    write_tensors(path, facts, TENSORS.items(), {"format": "pt"})
    read = load_file(path)
    assert read.keys() == TENSORS.keys()
    assert all(same_bits(read[name], tensor) for name, tensor in TENSORS.items())
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]


class Shell:
    def __reduce__(self):
        return (os.system, ("true",))


class Called:
    """Rebuilt by a function that PyTorch knows, which is not what it would call."""

    def __reduce__(self):
        return (torch.nn.Linear, (2, 3))


@pytest.mark.parametrize("made", [Shell, Called])
def test_what_a_pickle_would_run_is_said_without_advice_to_run_it(made, tmp_path):
    torch.save({"a": made()}, tmp_path / "a.bin")
    with pytest.raises(ModelError, match=r"a\.bin holds code \(\w+.*(system|Linear)\)") as caught:
        TensorFiles(tmp_path / "a.bin")
    for advice in ("weights_only", "Re-running", "add_safe_globals", "likely", "trust"):
        assert advice not in str(caught.value)


@pytest.mark.parametrize("is_archive", [True, False])
def test_a_pytorch_file_that_is_cut_or_overwritten(is_archive, tmp_path):
    path = tmp_path / "a.bin"
    torch.save({"a": torch.randn(300, 7)}, path, _use_new_zipfile_serialization=is_archive)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[90 if is_archive else 3] ^= 0xFF  # in a pickle
    parts = [whole[:end] for end in (-1000, len(whole) // 2, 100, 30, 7, 3)]
    for content in (*parts, flipped, b"hello world", bytes(range(1, 200))):
        path.write_bytes(content)
        with pytest.raises(ModelError) as caught:
            TensorFiles(path)
        assert "a.bin is cut or damaged, or not a PyTorch file; download it again" in str(
            caught.value
        )


class Mischief:
    def __reduce__(self):
        return (print, ("code of a pickle ran",))


def test_code_in_a_pickle_is_not_run(tmp_path, capsys):
    for save, name in (
        (torch.save, "a.bin"),
        (lambda x, p: p.write_bytes(pickle.dumps(x)), "b.bin"),
    ):
        save({"a": Mischief()}, tmp_path / name)
        with pytest.raises(ModelError, match="without running what is in it"):
            TensorFiles(tmp_path / name)
    assert "ran" not in capsys.readouterr().out


def test_what_is_wrong_with_shards_is_said(tmp_path):
    with pytest.raises(ModelError, match="holds no weights"):
        TensorFiles(tmp_path)
    sharded(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_text())["weight_map"]

    def refuse(weight_map, match):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ModelError, match=match):
            TensorFiles(tmp_path)

    refuse(good | {"d": good["a"]}, "promises 1 tensors that no shard holds, the first is 'd'")
    refuse(good | {"d": "gone.safetensors"}, "gone.safetensors does not exist")
    refuse(good | {"d": "../outside.safetensors"}, "expected a file beside the index")
    (tmp_path / good["a"]).write_bytes((tmp_path / good["a"]).read_bytes()[:-1])
    refuse(good, "no complete safetensors file")
    save_file({"b": TENSORS["b"]}, tmp_path / good["a"])
    refuse(good, "tensor 'b' of .* comes again")


def test_other_content_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "list.bin")
    with pytest.raises(ModelError, match="holds a list"):
        TensorFiles(tmp_path / "list.bin")
    torch.save({"a": 3}, tmp_path / "number.bin")
    with pytest.raises(ModelError, match=r"'a' in .* is a int, not a tensor"):
        TensorFiles(tmp_path / "number.bin")
    save_file({"a": torch.ones(2, dtype=torch.int64)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="is of type I64"):
        TensorFiles(tmp_path / "x.safetensors")


def test_long_names_are_cut_in_messages(tmp_path):
    long = "layers." + "x" * 5000
    save_file({long: torch.ones(2, dtype=torch.int64)}, tmp_path / "x.safetensors")
    torch.save({long: 3}, tmp_path / "x.bin")
    for name in ("x.safetensors", "x.bin"):
        with pytest.raises(ModelError, match=r"'layers\.xx.*\.\.\.x") as caught:
            TensorFiles(tmp_path / name)
        assert len(str(caught.value)) < 600
