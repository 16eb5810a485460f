"""`import vlfoundry` is cheap, and `vlfoundry.load` finds a model by every name that it has."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import vlfoundry
from tests.support.tiny_models import TEXTS, tiny_config
from tests.support.toy_project import commit_all, sh
from vlfoundry.infra.core.code import closure
from vlfoundry.infra.core.errors import ModelError
from vlfoundry.infra.registry.gto import register_model
from vlfoundry.models.internvl.model import build
from vlfoundry.models.internvl.predict import load_model, save_model
from vlfoundry.models.layers.config import DecoderConfig
from vlfoundry.models.tokenizer import train

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
DVC_YAML = """\
stages:
  train:
    cmd: mkdir -p artifacts && cp -r given artifacts/model
    deps: [given]
    outs: [artifacts/model]
"""
IMPORT = """\
import sys, time
began = time.process_time()
import vlfoundry
spent = time.process_time() - began
vlfoundry.load
print(spent, sorted({"torch", "numpy", "megatron", "dvc"} & set(sys.modules)))
"""


def model_folder(folder: Path, seed: int) -> Path:
    tokenizer = train(TEXTS * 3, 320)
    text = DecoderConfig(
        vocab_size=tokenizer.vocab_size, width=16, depth=2, heads=2, mlp_hidden=12, max_tokens=40
    )
    config = tiny_config(text=text)
    model = build("internvl_g", config, seed=seed)
    save_model(folder, "internvl_g", config, model, tokenizer)
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two registered versions of one kind; the older is the champion."""
    root = tmp_path_factory.mktemp("api") / "project"
    root.mkdir()
    (root / "dvc.yaml").write_text(DVC_YAML)
    (root / "params.yaml").write_text("seed: 1\n")
    (root / ".gitignore").write_text("/artifacts/\n/given/\n/work/\n")
    sh(root, "git", "init", "--quiet")
    sh(root, sys.executable, "-m", "dvc", "init", "--quiet")
    sh(root, "git", "config", "user.name", "Api")
    sh(root, "git", "config", "user.email", "api@localhost")
    for seed, stage in ((3, "champion"), (8, None)):
        model_folder(root / "given", seed)
        sh(root, sys.executable, "-m", "dvc", "repro", "--quiet")
        commit_all(root)
        register_model(root, Path("artifacts/model"), promote=stage)
    return root


def seen(model) -> np.ndarray:
    return model.embed_texts(TEXTS[:3])


def test_import_is_cheap_and_imports_nothing() -> None:
    tries = [
        subprocess.run(
            [sys.executable, "-c", IMPORT], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split(maxsplit=1)
        for _ in range(3)
    ]
    assert [found for _, found in tries] == ["[]\n"] * 3
    assert min(float(spent) for spent, _ in tries) < 0.05


def test_no_stage_reaches_the_api() -> None:
    for stage in ("ingest", "contrastive", "report"):
        names = closure(f"vlfoundry.stages.{stage}")
        assert "vlfoundry" in names
        assert "vlfoundry.api" not in names
    assert list(closure("vlfoundry")) == ["vlfoundry"]


def test_what_is_not_offered_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'vlfoundry' has no attribute 'lode'"):
        vlfoundry.lode  # noqa: B018
    assert vlfoundry.caption_prompt("it") == "Italian caption:"


def test_every_form_of_a_name(project: Path, tmp_path: Path, monkeypatch) -> None:
    older, newer = (model_folder(tmp_path / str(seed), seed) for seed in (3, 8))
    first, second = seen(load_model(older)), seen(load_model(newer))
    assert not np.allclose(first, second)
    monkeypatch.chdir(project)
    for ref in ("champion", "internvl_g", "internvl_g@v0.1.0", "internvl_g#champion", older):
        np.testing.assert_array_equal(seen(vlfoundry.load(ref)), first)
    for ref in ("internvl_g@v0.2.0", str(newer), "artifacts/model"):
        np.testing.assert_array_equal(seen(vlfoundry.load(ref)), second)
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(seen(vlfoundry.load("champion", root=project)), first)
    with pytest.raises(ModelError, match="registered names need a project"):
        vlfoundry.load("champion")
    with pytest.raises(ModelError, match="no model 'internvl_h'"):
        vlfoundry.load("internvl_h", root=project)


def test_shapes_are_those_of_the_docstring(project: Path) -> None:
    model = vlfoundry.load("champion", root=project)
    drawn = np.random.default_rng(5).integers(0, 256, (2, 21, 34, 3), dtype=np.uint8)
    pictures, names = list(drawn), TEXTS[:5]
    images, texts = model.embed_images(pictures), model.embed_texts(names)
    width = model.config.embed_dim
    assert (images.shape, texts.shape) == ((2, width), (5, width))
    for embedded in (images, texts):
        assert embedded.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(embedded, axis=1), 1, rtol=1e-5)
    assert (images @ texts.T).argmax(1).shape == (2,)
    found = model.match(pictures, names[:2])
    assert found.shape == (2,)
    assert ((found > 0) & (found < 1)).all()
    assert model.image_features(pictures).shape == (2, model.config.vision.width)
    prompts = [vlfoundry.caption_prompt(lang) for lang in ("en", "zh")]
    captions = model.generate(pictures, prompts, max_new_tokens=3)
    assert [type(caption) for caption in captions] == [str, str]
