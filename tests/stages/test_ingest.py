"""Ingest: stable classes, held-out concepts that nothing leaks, noise that is what it says."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest

from vlfoundry.infra.core.config import build
from vlfoundry.infra.core.errors import ConfigError, DataError
from vlfoundry.infra.core.fingerprint import fingerprint
from vlfoundry.infra.core.tables import read_table
from vlfoundry.infra.data.images.bulk import decode_rgba
from vlfoundry.infra.data.images.phash import colour_grid
from vlfoundry.infra.data.rules.quality import effective_side
from vlfoundry.infra.data.sources.concept_set import (
    Concept,
    keyword_caption,
    read_artwork,
    read_concepts,
)
from vlfoundry.stages.ingest import STAGE, Config, choose_classes, identical_pairs

pytestmark = pytest.mark.slow

OUT = "artifacts/ingest"


@pytest.fixture(scope="module")
def tables(funnel):
    names = ("records", "truth", "classes", "images")
    return {name: read_table(funnel / OUT / f"{name}.parquet").to_pylist() for name in names}


@pytest.fixture(scope="module")
def inputs():
    names = ("noto", "fluent", "fluent_flat", "fxemoji", "twemoji")
    return read_concepts("data"), {name: read_artwork(f"data/{name}.parquet") for name in names}


def chosen(params, inputs, **changes):
    values = {key: params[key] for key in STAGE.parameters}
    values["ingest"] = values["ingest"] | changes
    return choose_classes(build(Config, values), *inputs)


def test_more_classes_contain_fewer_with_the_same_held_out(funnel_params, inputs):
    few = chosen(funnel_params, inputs, classes=30)
    many = chosen(funnel_params, inputs, classes=200)
    everything = chosen(funnel_params, inputs, classes=None)
    assert list(many)[:30] == list(few)
    assert all(many[concept] == split for concept, split in few.items())
    assert 0.08 < Counter(everything.values())["held_out"] / len(everything) < 0.22


def test_every_class_is_drawn_tested_and_named(funnel_params, inputs):
    concepts, sources = inputs
    for concept in chosen(funnel_params, inputs):
        assert sum(any(d.concept == concept for d in sources[s]) for s in sources) == 5
        assert {"en", "zh", "it"} <= set(concepts[concept].names)


def test_too_many_classes_are_refused_with_the_number_there_is(funnel_params, inputs):
    with pytest.raises(DataError, match=r"\d+ concepts have 4 training drawings.*asks for 5000"):
        chosen(funnel_params, inputs, classes=5000)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_source": "noto"}, "also in train_sources"),
        ({"test_source": "nota"}, "is unknown; known: emojitwo"),
        ({"held_out": 1.5}, "held_out is a share"),
        ({"noise": {"shuffled": 0.9, "overlay": 0.2}}, "add up to at most 1"),
    ],
)
def test_mistakes_in_parameters_are_named(funnel_params, inputs, changes, message):
    with pytest.raises(ConfigError, match=message):
        chosen(funnel_params, inputs, **changes)


def test_no_drawing_of_a_held_out_concept_is_in_the_records(tables):
    held_out = {row["concept"] for row in tables["classes"] if row["split"] == "held_out"}
    assert len(held_out) >= 2
    assert not held_out & {row["concept"] for row in tables["records"]}


def test_the_test_source_is_in_no_record(tables):
    test_pictures = {d.image_bytes for d in read_artwork("data/twemoji.parquet")}
    assert "twemoji" not in {row["source"] for row in tables["records"]}
    assert not test_pictures & {row["bytes"] for row in tables["images"]}


def test_noise_comes_at_its_rates(tables):
    counts = Counter(row["noise"] for row in tables["truth"])
    clean = len(tables["truth"]) - counts["duplicate"]
    expected = {
        "shuffled": 0.2, "low_resolution": 0.1, "duplicate": 0.1, "overlay": 0.05,
        "wrong_lang": 0.05,
    }  # fmt: skip
    for noise, rate in expected.items():
        assert abs(counts[noise] / clean - rate) < 4 * np.sqrt(rate / clean), noise


def test_noise_is_what_the_truth_says(tables):
    concepts = read_concepts("data")
    pictures = {row["image_id"]: decode_rgba(row["bytes"]) for row in tables["images"]}
    for record, truth in zip(tables["records"], tables["truth"], strict=True):
        lang = truth["detail"][3:] if truth["noise"] == "wrong_lang" else record["lang"]
        concept = concepts[record["concept"]]
        own = {concept.names[lang], keyword_caption(concept, lang)}
        assert (record["caption"] in own) == (truth["noise"] != "shuffled")
        assert (record["lang"] == lang) == (truth["noise"] != "wrong_lang")
        if truth["noise"] == "low_resolution":
            assert effective_side(pictures[record["image_id"]][None])[0] < 40
        if truth["noise"] == "duplicate":
            original = tables["records"][truth["original"]]
            pair = np.stack([pictures[r["image_id"]] for r in (record, original)])
            a, b = colour_grid(pair)
            assert record["image_id"] != original["image_id"]
            assert (record["caption"], record["lang"]) == (original["caption"], original["lang"])
            assert np.abs(a - b).mean() < 6


def test_rows_are_mixed_and_numbered(tables):
    assert [row["row"] for row in tables["records"]] == list(range(len(tables["records"])))
    sources = [row["source"] for row in tables["records"]]
    changes = sum(a != b for a, b in itertools.pairwise(sources))
    assert changes > len(sources) / 2


def test_identical_drawings_of_two_concepts_are_listed(funnel):
    pairs = json.loads((funnel / OUT / "identical.json").read_text("utf-8"))["pairs"]
    pictures = {d.concept: decode_rgba(d.image_bytes) for d in read_artwork("data/twemoji.parquet")}
    assert len(pairs) > 10
    for a, b in pairs:
        visible = pictures[a][..., 3] > 0
        assert np.array_equal(pictures[a][visible], pictures[b][visible])
    drawings = read_artwork("data/twemoji.parquet")[:200]
    assert len(identical_pairs(drawings)) < len(pairs)


def test_the_same_seed_gives_the_same_bytes(funnel, funnel_params, run_one, tmp_path):
    (tmp_path / "data").symlink_to((funnel / "data").resolve())
    run_one(STAGE, tmp_path, funnel_params)
    assert fingerprint(tmp_path / OUT) == fingerprint(funnel / OUT)


def test_chinese_keywords_leave_the_name_out():
    concept = Concept(
        id="x", group="", subgroup="", names={"zh": "猫", "en": "cat"},
        keywords={"zh": ("猫", "宠物"), "en": ("cat", "pet"), "ja": ()},
    )  # fmt: skip
    assert keyword_caption(concept, "zh") == "宠物"
    assert keyword_caption(concept, "en") == "cat, pet"
    assert keyword_caption(concept, "ja") == ""
