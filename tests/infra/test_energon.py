"""A data set that megatron-energon 7.4.1 prepared (golden/energon), read without it."""

import importlib.util
import shutil
from pathlib import Path

import pytest

from vlfoundry.infra.core.config import canonical_json
from vlfoundry.infra.core.errors import DataError
from vlfoundry.infra.data.shards.read import ShardSet
from vlfoundry.infra.data.shards.write import Sample
from vlfoundry.infra.data.sources.energon import index_energon

GOLDEN = Path(__file__).parent / "golden" / "energon"
spec = importlib.util.spec_from_file_location("make_energon", GOLDEN / "make.py")
made = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made)


@pytest.fixture
def folder(tmp_path) -> Path:
    return shutil.copytree(GOLDEN / "set", tmp_path / "set")


def opened(folder: Path, split: str = "train") -> ShardSet:
    (folder / "index.json").write_text(canonical_json(index_energon(folder, split)))
    return ShardSet(folder)


def sample(number: int) -> Sample:
    picture = made.parts(number)["jpg"]
    return Sample(key=f"{number:04d}", image_bytes=picture, meta={"caption": f"picture {number}"})


@pytest.mark.parametrize(("split", "numbers"), [("train", range(6)), ("val", range(6, 9))])
def test_the_samples_of_a_split(folder, split, numbers):
    assert list(opened(folder, split)) == [sample(number) for number in numbers]


def test_what_is_excluded_stays_out(folder):
    path = folder / ".nv-meta" / "split.yaml"
    text = path.read_text().replace("exclude: []", "exclude: [part_000.tar, part_001.tar/0004]")
    path.write_text(text)
    assert list(opened(folder)) == [sample(3), sample(5)]


def test_an_unknown_split_is_refused(folder):
    with pytest.raises(DataError, match=r"has no split 'test'; it has \['train', 'val'\]"):
        index_energon(folder, "test")


def test_a_folder_that_was_not_prepared_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"\.info\.json does not exist; run `energon prepare`"):
        index_energon(tmp_path)


def test_a_split_of_unknown_shards_is_refused(folder):
    path = folder / ".nv-meta" / "split.yaml"
    path.write_text(path.read_text().replace("..001}", "..005}"))
    with pytest.raises(DataError, match=r"does not fit its split: .*part_003\.tar"):
        index_energon(folder)


def test_a_sample_without_a_picture_is_refused(folder, monkeypatch):
    monkeypatch.setattr("vlfoundry.infra.data.sources.energon.PICTURES", ("png",))
    with pytest.raises(DataError, match=r"part_000\.tar: sample '0000' has the parts \['jpg', 'js"):
        index_energon(folder)
