"""Every profile and recipe takes one batch, there and back, at its true pictures and a tiny width.

What is true: the side of a picture and of a patch, which patches are left out, the tiling, the
connector, the options of all towers. What is small: widths, depths, vocabulary, batches.
"""

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlfoundry.flows.recipes import find_recipe, recipes, with_profile
from vlfoundry.infra.core.config import build, load_params, to_dict
from vlfoundry.infra.core.stage import Context
from vlfoundry.models.internvl.config import InternVLConfig
from vlfoundry.models.layers.config import DecoderConfig

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PROFILES = sorted(path.stem for path in (ROOT / "profiles").glob("*.yaml"))
STAGES = ("pretrain_text", "contrastive", "generative", "sft@simple", "sft@full")
"""that a profile without a recipe is for"""
PHOTO_PX = (640, 480)
"""a picture that a chat model with 12 tiles sees in 13"""
TALK = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A photo."}]


def runs() -> list[tuple[str, str]]:
    """(profile, stage) of all there are, and of params.yaml, which is called default."""
    known = recipes(ROOT)
    pairs = [("default", stage) for stage in STAGES]
    for name in PROFILES:
        pairs += [(name, s) for s in ([known[name].stage] if name in known else STAGES)]
    return pairs


def resolved(profile: str) -> dict[str, Any]:
    params = load_params(ROOT / "params.yaml")
    return params if profile == "default" else with_profile(params, ROOT, profile)


def small_decoder(config: DecoderConfig) -> DecoderConfig:
    grouped = config.key_value_heads not in (None, config.heads)
    sizes = {"vocab_size": 400, "width": 16, "depth": 2, "heads": 4, "mlp_hidden": 12}
    return dataclasses.replace(config, **sizes, key_value_heads=2 if grouped else None)


def small(config: InternVLConfig) -> InternVLConfig:
    """The same pictures and options, at a width at which they cost nothing."""
    vision = {"width": 16, "depth": max(2, -config.connector.select_layer), "heads": 4}
    return dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, mlp_hidden=20, **vision),
        text=small_decoder(config.text),
        language=None if config.language is None else small_decoder(config.language),
        queries=dataclasses.replace(config.queries, num_queries=3),
        embed_dim=8,
        pool_heads=2,
    )


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of drawings, and a chat file with a photo."""
    from tests.support.tiny_project import drawings_with_captions
    from vlfoundry.infra.data.shards.write import write_shards

    root = tmp_path_factory.mktemp("material")
    samples = [s for s in drawings_with_captions(3) if s.meta["kind"] == "name"]
    for stage in ("stage1", "stage2"):
        write_shards(root / "artifacts/shard" / stage, samples, samples_per_shard=20)
    chat = root / "data/chat"
    chat.mkdir(parents=True)
    photo = np.random.default_rng(0).integers(0, 256, (*PHOTO_PX[::-1], 3), np.uint8)
    Image.fromarray(photo).save(chat / "photo.png")
    (chat / "photo.jsonl").write_text(json.dumps({"image": "photo.png", "conversations": TALK}))
    return root


def tiny_params(profile: str, stage: str) -> dict[str, Any]:
    """The profile's parameters, of which all that decides on pictures is left as it is."""
    params = resolved(profile)
    model = small(build(InternVLConfig, params["model"], "model"))
    name, _, variant = stage.partition("@")
    section = dict(params[name]) if name in params else {}
    train = {"steps": 100, "batch_samples": 2, "warmup_steps": 1, "lr": 1e-3}
    section["train"] = {"simple": train, "full": train} if variant else train
    if name == "sft":
        section |= {"sources": {"photo": {"weight": 1}}, "max_tokens": 9000}
    return {**params, "languages": ["en", "it"], "model": to_dict(model), name: section}


def make_starts(root: Path, stage: str, config: Any, folders: tuple[str, ...]) -> None:
    """What the stage starts from: models with fresh weights and one tokenizer."""
    from vlfoundry.models import tokenizer as tokenizers
    from vlfoundry.models.internvl.init_from import RULES
    from vlfoundry.models.internvl.model import build as build_model
    from vlfoundry.models.internvl.predict import save_model

    tokenizer = tokenizers.train(["a photo", "what is it?", "una foto"], 400)
    kinds = {
        "artifacts/pretrain_text/model": "text", "artifacts/contrastive/model": "internvl_c",
        "artifacts/generative/model": "internvl_g", "artifacts/sft/simple/model": "chat_simple",
    }  # fmt: skip
    if stage == "sft@simple" and config.model.language is not None:
        kinds["artifacts/pretrain_text/model"] = "chat_simple"  # the only kind that has one
    assert stage in RULES
    for folder in folders:
        model = build_model(kinds[folder], config.model, seed=1)
        save_model(root / folder, kinds[folder], config.model, model, tokenizer)


def dry_run(root: Path, profile: str, stage: str) -> list[dict[str, Any]]:
    """First and last batch of a run: shapes, and gradients that are numbers."""
    import torch

    from vlfoundry.infra.backend import Layout
    from vlfoundry.infra.backend.parallel import parallel
    from vlfoundry.infra.train.session import DataParallelSlice

    name, _, variant = stage.partition("@")
    module = importlib.import_module(f"vlfoundry.stages.{name}")
    params = tiny_params(profile, stage)
    config = build(module.Config, {key: params[key] for key in module.STAGE.parameters})
    context = Context(module.STAGE.bind(variant or None), root, "key")
    place = DataParallelSlice(rank=0, ranks=1)
    with parallel(Layout(), seed=0):
        if name == "pretrain_text":
            lines = ["a photo", "una foto"]
            job = module.job(config, lines, [("en", "photo"), ("it", "foto")], place)
        else:
            make_starts(root, stage, config, context.bound.starts(config))
            make = getattr(module, "job", None) or module._job
            job = make(config, context, place)
        return [there_and_back(job, step, torch) for step in (0, 99)]


def there_and_back(job: Any, step: int, torch: Any) -> dict[str, Any]:
    batch = job.finish(job.batch_at(step))
    job.model.zero_grad()
    loss, _ = job.objective(job.model, batch)
    loss.backward()
    grads = [p.grad for p in job.model.parameters() if p.requires_grad and p.grad is not None]
    assert grads
    assert all(torch.isfinite(grad).all() for grad in grads)
    kept = batch.get("kept")
    return {
        "loss": loss.item(),
        "pixels": tuple(batch["pixels"].shape) if "pixels" in batch else None,
        "kept": None if kept is None else kept.numpy(),
    }


@pytest.mark.parametrize(("profile", "stage"), [r for r in runs() if r[1] != "retrieval"])
def test_one_batch_at_true_size(
    profile: str, stage: str, material: Path, warm, run_ranks, tmp_path: Path
) -> None:
    for name in ("artifacts/shard", "data"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(material / name)
    ((first, last),) = run_ranks(dry_run, tmp_path, profile, stage, ranks=1)
    params = resolved(profile)
    model = build(InternVLConfig, params["model"], "model")
    side, patch = model.vision.image_px, model.vision.patch_px
    assert np.isfinite([first["loss"], last["loss"]]).all()
    if stage == "pretrain_text":
        assert first["pixels"] is None
    elif stage == "contrastive":
        masked = params["contrastive"].get("masked_px") or side
        assert first["pixels"][-2:] == (masked, masked)
        assert last["pixels"][-2:] == (side, side)
        patches = (masked // patch) ** 2
        assert first["kept"].shape[1] == round(patches * (1 - params["contrastive"]["mask_ratio"]))
        assert last["kept"] is None
    elif stage == "generative":
        assert first["pixels"] == (2, 3, side, side)
    else:
        from vlfoundry.models.preprocess.tiling import plan

        tiles = plan(*PHOTO_PX, model.pictures.tiling(side)).tiles
        assert first["pixels"] == (2 * tiles, 3, side, side)


@pytest.mark.parametrize("profile", [name for name, stage in runs() if stage == "retrieval"])
def test_one_batch_of_a_recipe_without_a_stage(profile: str, warm, run_ranks) -> None:
    config = small(build(InternVLConfig, resolved(profile)["model"], "model"))

    def work() -> float:
        import torch

        from vlfoundry.infra.backend import Layout
        from vlfoundry.infra.backend.parallel import parallel
        from vlfoundry.models.internvl.model import build as build_model
        from vlfoundry.models.objectives.retrieval import Retrieval

        ids = torch.arange(2 * 5).view(2, 5) + 7
        texts = {f"{name}_ids": ids for name in ("negative", "positive", "summary")}
        masks = {f"{name}_mask": torch.ones_like(ids) for name in texts.fromkeys(
            ("negative", "positive", "summary"))}  # fmt: skip
        side = config.vision.image_px
        with parallel(Layout(), seed=0):
            model = build_model("internvl_g", config, seed=1)
            batch = {"pixels": torch.randn(2, 3, side, side), **texts, **masks}
            loss, _ = Retrieval()(model, batch)
            loss.backward()
            return loss.item()

    (loss,) = run_ranks(work, ranks=1)
    assert np.isfinite(loss)


@pytest.mark.parametrize("profile", ["default", *PROFILES])
def test_every_patch_can_be_kept(profile: str) -> None:
    """FLIP leaves out patches of the pictures that are trained on, everywhere alike."""
    from vlfoundry.stages.contrastive import kept_patches

    params = resolved(profile)
    recipe = None if profile == "default" else find_recipe(ROOT, profile)
    if recipe is not None and recipe.stage != "contrastive":
        return
    vision, options = params["model"]["vision"], params["contrastive"]
    side = options.get("masked_px") or vision["image_px"]
    patches = (side // vision["patch_px"]) ** 2
    kept = kept_patches(5, [(0, i) for i in range(60)], patches, options["mask_ratio"])
    counts = np.bincount(kept.ravel(), minlength=patches)
    assert len(counts) == patches
    assert counts.min() > 0


def test_what_recipes_lists_is_run() -> None:
    assert {name for name, _ in runs()} == {"default", *PROFILES}
    assert set(recipes(ROOT)) <= set(PROFILES)
    assert {stage for _, stage in runs()} == {*STAGES, "retrieval"}
