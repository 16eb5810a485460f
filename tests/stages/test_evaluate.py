"""The evaluation stage with models that need no training, on a small set."""

import errno
import json
import sys
import types
from pathlib import Path

import pytest

from tests.support.fake_models import LANGUAGES, Guesser, Oracle, write_concept_set
from tests.support.tiny_project import write_model
from vlfoundry.eval.compare.scores import read_document, read_scores
from vlfoundry.eval.datasets.folders import read_concept_set
from vlfoundry.eval.outputs import OUTPUTS
from vlfoundry.eval.questions import KINDS, ask
from vlfoundry.eval.runner import evaluate_folder
from vlfoundry.eval.suites import suites
from vlfoundry.infra.core.config import build
from vlfoundry.infra.core.errors import ConfigError, DataError, ModelError, UserError
from vlfoundry.infra.core.stage import Context
from vlfoundry.infra.core.tables import write_table
from vlfoundry.stages.evaluate import STAGE, Config

pytestmark = pytest.mark.slow

FOLDERS = {name: output.folder for name, output in OUTPUTS.items()}

SCENES = 30
EARLIER = "data/start/earlier"


@pytest.fixture(autouse=True)
def fewer_training_scenes(monkeypatch):
    """The reference answers of scenes cost most of the time here and need no large pool."""
    monkeypatch.setattr("vlfoundry.eval.questions.TRAINING_SCENES", 60)


@pytest.fixture
def root(tmp_path):
    write_concept_set(tmp_path / "data", 20, ("test", "train"))
    concepts = [f"c{i:02d}" for i in range(16)]
    splits = ["held_out" if i in (3, 5) else "train" for i in range(16)]
    write_table(
        tmp_path / "artifacts/ingest/classes.parquet", {"concept": concepts, "split": splits}
    )
    write_table(tmp_path / "artifacts/ingest/records.parquet", {"source": ["train", "train"]})
    for kind, folder in (*FOLDERS.items(), ("internvl_g", EARLIER)):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text(json.dumps({"kind": kind}))
    return tmp_path


@pytest.fixture
def models(monkeypatch, root):
    """Replaces loading: the trained model knows everything, the untrained one guesses."""

    def load_model(folder, *, untrained_seed=None):
        if folder == root / EARLIER:
            return Guesser("internvl_g")
        kind = next(kind for kind, path in FOLDERS.items() if folder == root / path)
        if untrained_seed is not None:
            return Guesser(kind)
        data = read_concept_set(root / "data", sources=["test"])
        data = data.only([f"c{i:02d}" for i in range(16)])
        asked = [q for k in KINDS for q in ask(data, k, languages=LANGUAGES, count=SCENES, seed=7)]
        return Oracle(data, asked, kind)

    module = types.SimpleNamespace(load_model=load_model)
    monkeypatch.setitem(sys.modules, "vlfoundry.models.internvl.predict", module)


def config(**changes):
    evaluate = {"test_source": "test", "scenes": SCENES} | changes
    return build(Config, {"seed": 7, "languages": list(LANGUAGES), "evaluate": evaluate})


def run(root, variant, **changes):
    STAGE.run(config(**changes), Context(STAGE.bind(variant), root, "key"))
    return root / f"artifacts/evaluate/{variant}/scores.json"


@pytest.mark.parametrize("variant", list(OUTPUTS))
def test_every_suite_is_scored_or_has_a_reason(root, models, variant):
    file = run(root, variant)
    document, scores = read_document(file), read_scores(file)
    done = {score.suite for score in scores}
    assert done | set(document["not_applicable"]) == set(suites())
    assert not done & set(document["not_applicable"])
    assert document["model"]["folder"] == OUTPUTS[variant].folder
    assert document["data"]["pictures"] == 16
    for score in scores:
        assert score.untrained is not None
        assert (file.parent / score.items).is_file()
    if variant.startswith("chat"):
        assert {s.key: s.value for s in scores}["box/accuracy_iou50"] == 1.0
    else:
        assert {s.key: s.value for s in scores}["zero_shot/top1_held_out/en"] == 1.0


def test_outputs_are_the_same_bytes_each_time(root, models):
    from vlfoundry.infra.core.fingerprint import fingerprint

    first = fingerprint(run(root, "internvl_g").parent)
    assert fingerprint(run(root, "internvl_g").parent) == first


def test_a_baseline_is_scored_on_the_same_items(root, models):
    without = run(root, "internvl_g").read_bytes()
    file = run(root, "internvl_g", baseline={"internvl_g": EARLIER})
    baseline = read_document(file)["baseline"]
    assert (baseline["folder"], baseline["name"]) == (EARLIER, EARLIER)
    for score in read_scores(file):
        assert score.baseline == score.untrained  # both guess
        assert score.baseline_lead_stderr is not None
        assert (file.parent / "items" / "baseline" / Path(score.items).name).is_file()
    (root / EARLIER / "origin.json").write_text('{"ref": "internvl_g@v0.1.0"}')
    file = run(root, "internvl_g", baseline={"internvl_g": EARLIER})
    assert read_document(file)["baseline"]["name"] == "internvl_g@v0.1.0"
    file = run(root, "internvl_g", baseline={"internvl_c": EARLIER})
    assert file.read_bytes() == without
    assert not (file.parent / "items" / "baseline").exists()
    with pytest.raises(ConfigError, match="a model of kind internvl_g; expected one of the"):
        run(root, "chat_full", baseline={"chat_full": EARLIER})


def test_a_baseline_is_an_input_of_its_variant_alone():
    compared = config(baseline={"internvl_g": EARLIER})
    assert EARLIER in STAGE.bind("internvl_g").inputs(compared)
    assert STAGE.bind("internvl_g").starts(compared) == (EARLIER,)
    assert STAGE.bind("internvl_c").starts(compared) == ()
    with pytest.raises(ConfigError, match=r"evaluate\.baseline\.chat_full is '/x'"):
        config(baseline={"chat_full": "/x"})


def test_the_source_under_test_must_not_have_been_trained_on(root, models):
    with pytest.raises(ConfigError, match="'train' is among the sources that training read"):
        run(root, "internvl_c", test_source="train")
    with pytest.raises(ConfigError, match=r"unknown suites \['colours'\]"):
        config(suites=["colours"])


@pytest.fixture
def resolved(monkeypatch, models, root):
    """What is named is looked at as it lies there, before any model is loaded."""
    import vlfoundry.infra.registry.gto

    write_model(root / OUTPUTS["internvl_c"].folder, "internvl_c")
    monkeypatch.setattr(
        vlfoundry.infra.registry.gto, "resolve_model", lambda ref: root / OUTPUTS[ref].folder
    )


def test_any_folder_can_be_scored(root, resolved, tmp_path, models):
    said = []
    out = tmp_path / "out" / "scores.json"
    scores = evaluate_folder(
        "internvl_c", root / "data", "zero_shot", out, sources=["test"], log=said.append
    )
    assert read_scores(out) == scores
    assert (out.parent / scores[0].items).is_file()
    assert scores[0].reference is None
    assert "20 pictures" in said[-1]
    with_reference = evaluate_folder(
        "internvl_c", root / "data", "zero_shot", out, sources=["test"], train_sources=["train"],
        log=said.append,
    )  # fmt: skip
    assert with_reference[0].reference == 1.0


def test_what_cannot_be_scored_is_said(root, resolved, tmp_path):
    out = tmp_path / "scores.json"
    with pytest.raises(ModelError, match="unknown suite 'zeroshot'"):
        evaluate_folder("internvl_c", root / "data", "zeroshot", out)
    with pytest.raises(ModelError, match="box needs a model that can chat"):
        evaluate_folder("internvl_c", root / "data", "box", out)
    with pytest.raises(DataError, match=r"\['test'\] are both under test and training"):
        evaluate_folder("internvl_c", root / "data", "zero_shot", out, train_sources=["test"])
    with pytest.raises(DataError, match="needs a concept set and pictures to fit on"):
        evaluate_folder("internvl_c", root / "data", "linear_probe", out)
    assert not out.exists()


def test_scores_that_cannot_be_stored_after_all_are_said(root, resolved, monkeypatch, tmp_path):
    """A disk that is full at the end: nothing asks for space beforehand."""
    said: list[str] = []

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vlfoundry.eval.runner.write_scores", full)
    out = tmp_path / "x.json"
    with pytest.raises(UserError, match=r"cannot write the scores to .*x\.json: no space left"):
        evaluate_folder("internvl_c", root / "data", "zero_shot", out, log=said.append)
    assert [line for line in said if line.startswith("zero_shot/top1")]


@pytest.mark.parametrize("place", ["folder", "file/x.json", "locked/x.json"])
def test_a_place_that_cannot_be_written_is_said_before_the_model_is_read(
    root, tmp_path, monkeypatch, place
):
    """As root everything may be written, so the third is a folder whose items are a file."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked" / "x.items").touch()
    import vlfoundry.infra.registry.gto

    def too_late(ref):
        raise AssertionError("the model was looked for first")

    monkeypatch.setattr(vlfoundry.infra.registry.gto, "resolve_model", too_late)
    with pytest.raises(UserError, match=r"(is a directory; name a file|is not a directory)"):
        evaluate_folder("internvl_c", root / "data", "zero_shot", tmp_path / place)
