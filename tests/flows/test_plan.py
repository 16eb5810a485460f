"""Recipes are the published runs, build what runs, and can be planned; so can stages."""

import dataclasses
import functools
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cpu import least_cpu_s
from vlfoundry.flows.plan import (
    DEFAULTS,
    command,
    find_job,
    gpu_hours,
    machine_of,
    make_plan,
    plan_lines,
    show_lines,
)
from vlfoundry.flows.recipes import recipes, with_profile
from vlfoundry.infra.core.config import build, load_params
from vlfoundry.infra.core.errors import ConfigError
from vlfoundry.infra.train.config import TrainConfig
from vlfoundry.models.families import flavour
from vlfoundry.models.internvl.config import internvl

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
RECIPES = recipes(ROOT)
NAMES = sorted(RECIPES)
# batch, steps, lr, betas, weight decay, warm-up (steps, or a ratio); None: not published
PUBLISHED = {
    "internvl-c": (163_840, 175_000, 1e-3, (0.9, 0.95), 0.1, 5_000),
    "internvl-g": (20_480, 80_000, 5e-5, (0.9, 0.98), 0.05, 2_000),
    "internvl-g-flickr30k": (1024, None, 1e-6, (0.9, 0.999), 0.05, 100),
    "internvl-g-coco": (1024, None, 1e-6, (0.9, 0.999), 0.05, 100),
    "chat-simple-pretrain-7b": (256, None, 1e-3, None, 0.0, 0.03),
    "chat-simple-pretrain-13b": (256, None, 1e-3, None, 0.0, 0.03),
    "chat-simple-finetune-7b": (128, None, 2e-5, None, 0.0, 0.03),
    "chat-simple-finetune-13b": (128, None, 2e-5, None, 0.0, 0.03),
    "chat-full-mlp-7b": (512, None, 2e-5, None, 0.0, 0.03),
    "chat-full-mlp-13b": (512, None, 2e-5, None, 0.0, 0.03),
    "chat-full-13b": (512, None, 2e-5, None, 0.0, 0.03),
    "chat-v1.1-pretrain": (8192, None, 2e-5, None, 0.05, None),
    "chat-v1.1-finetune": (2048, None, 2e-5, None, 0.05, None),
    "chat-v1.2-pretrain": (8192, 4800, 2e-5, None, 0.05, None),
    "chat-v1.2-finetune": (512, None, 1e-5, None, 0.05, None),
    "chat-v1.5-26b-pretrain": (2048, None, 1e-5, None, 0.05, None),
    "chat-v1.5-26b-finetune": (1024, None, 2e-5, None, 0.05, None),
    "chat-v1.5-40b-pretrain": (2048, None, 1e-4, None, 0.05, None),
    "internvl2.5-8b-stage1": (512, 100_000, 2e-4, None, 0.05, None),
    "internvl2.5-8b-stage1.5": (1024, 100_000, 1e-5, None, 0.05, None),
    "internvl2.5-8b-stage2": (512, 5_500, 4e-5, None, 0.05, None),
}
# millions of samples, drop path, conversation tokens, trained billions
RUNS = {
    "internvl-c": (28_672, 0.2, None, 12.620),
    "internvl-g": (1_638.4, 0.0, None, 1.010),
    "internvl-g-flickr30k": (1.45, 0.3, None, 13.632),
    "internvl-g-coco": (2.834, 0.3, None, 13.632),
    "chat-simple-pretrain-7b": (0.558, 0.0, 2048, 0.032),
    "chat-simple-pretrain-13b": (0.558, 0.0, 2048, 0.044),
    "chat-simple-finetune-7b": (0.665, 0.0, 2048, 6.768),
    "chat-simple-finetune-13b": (0.665, 0.0, 2048, 13.058),
    "chat-full-mlp-7b": (4.0, 0.0, 2048, 0.063),
    "chat-full-mlp-13b": (4.0, 0.0, 2048, 0.090),
    "chat-full-13b": (4.0, 0.0, 2048, 13.106),
    "chat-v1.1-pretrain": (72, 0.0, 384, 5.997),
    "chat-v1.1-finetune": (6, 0.0, 768, 19.013),
    "chat-v1.2-pretrain": (39.3, 0.2, 384, 5.680),
    "chat-v1.2-finetune": (1.267819, 0.4, 2048, 40.069),
    "chat-v1.5-26b-pretrain": (200, 0.2, 4096, 5.653),
    "chat-v1.5-26b-finetune": (5, 0.4, 4096, 25.514),
    "chat-v1.5-40b-pretrain": (3, 0.0, 4096, 0.143),
    "internvl2.5-8b-stage1": (51.2, 0.0, 16384, 0.034),
    "internvl2.5-8b-stage1.5": (102.4, 0.1, 16384, 0.338),
    "internvl2.5-8b-stage2": (2.816, 0.1, 16384, 8.075),
}


@functools.cache
def parameters(name: str) -> dict:
    return with_profile(load_params(ROOT / "params.yaml"), ROOT, name)


job_of = functools.cache(functools.partial(find_job, ROOT))


def train_of(name: str) -> TrainConfig:
    stage, _, variant = RECIPES[name].stage.partition("@")
    train = parameters(name)[stage]["train"]
    return build(TrainConfig, train[variant] if variant else train)


def test_every_recipe_is_held_against_the_published_numbers():
    assert set(NAMES) == set(PUBLISHED) == set(RUNS)


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_builds_what_its_stage_reads(name):
    stage, _, _ = RECIPES[name].stage.partition("@")
    if stage == "retrieval":
        assert "none yet" in command(name, RECIPES[name])
        return
    config = importlib.import_module(f"vlfoundry.stages.{stage}").STAGE.config
    known = {field.name for field in dataclasses.fields(config)}
    built = build(config, {k: v for k, v in parameters(name).items() if k in known})
    assert build(TrainConfig, dataclasses.asdict(train_of(name)))
    assert built.model == job_of(name).heaviest.config


@pytest.mark.parametrize("name", NAMES)
def test_numbers_of_the_optimizer_are_the_published_ones(name):
    batch, steps, lr, betas, decay, warmup = PUBLISHED[name]
    train = train_of(name)
    assert train.batch_samples == batch
    assert train.lr == lr
    assert train.weight_decay == decay
    assert train.schedule == "cosine"
    assert steps is None or train.steps == steps
    assert betas is None or (train.beta1, train.beta2) == betas
    if warmup is not None:
        expected = warmup if warmup > 1 else round(warmup * train.steps)
        assert train.warmup == expected


@pytest.mark.parametrize("name", NAMES)
def test_size_and_length_of_the_run_are_the_published_ones(name):
    millions, drop_path, tokens, billions = RUNS[name]
    work, train = job_of(name).heaviest, train_of(name)
    assert train.samples / 1e6 == pytest.approx(millions, rel=0.001)
    assert work.config.vision.drop_path == drop_path
    assert tokens is None or work.text_tokens == tokens
    trained = sum(weight.elements for weight in work.weights(1) if weight.name in work.names)
    assert round(trained / 1e9, 3) == billions


def test_stage_1_masks_half_of_196_px_and_ends_with_half_a_billion_samples_at_224_px():
    masked, rest = job_of("internvl-c").parts
    assert (masked.config.vision.image_px, masked.vision_tokens) == (196, 1 + 98)
    assert (rest.config.vision.image_px, rest.vision_tokens) == (224, 257)
    assert rest.steps * rest.batch_samples == pytest.approx(0.5e9, rel=0.001)
    assert masked.steps + rest.steps == 175_000
    assert rest.config == internvl("paper", vision=rest.config.vision)
    assert train_of("internvl-c").lr_scale["text"] == 0.1


def test_a_recipe_s_model_is_its_flavour_s_and_not_that_of_params_yaml():
    config = job_of("chat-v1.5-40b-pretrain").heaviest.config
    assert config.chat == flavour("yi-34b")
    assert config.connector == internvl("chat-v1.5-26b").connector
    generative = parameters("internvl-g")["generative"]
    assert generative.keys() == {"start", "max_tokens", "trainable", "train"}  # see flows.recipes
    assert parameters("internvl-g")["ingest"] == load_params(ROOT / "params.yaml")["ingest"]


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_fits_the_machine_that_it_names(name):
    job = job_of(name)
    machine = machine_of(job.recipe.machine.gpus, job.recipe.machine.memory, 0.4, 989.0)
    best = make_plan(job, machine).best
    assert best is not None
    assert best.layout.ranks == job.recipe.machine.gpus


@pytest.mark.parametrize("name", ["internvl-g-flickr30k", "internvl-g-coco"])
def test_retrieval_fine_tuning_decays_the_rate_from_layer_to_layer(name):
    assert train_of(name).layer_decay == {"vision": 0.9, "text": 0.9}


def test_showing_a_recipe_says_command_cost_memory_and_what_is_ours():
    shown = "\n".join(show_lines(ROOT, "internvl-g"))
    assert "vlfoundry run --profile internvl-g --stage generative" in shown
    assert "GPU-hours at 40%" in shown
    assert "memory plan for 160 GPUs of 80 GiB: tensor" in shown
    assert "ours: generative.train.clip_grad: not published" in shown


def test_cost_is_flops_over_what_the_machine_does():
    job = job_of("internvl-g")
    one, other = (gpu_hours(job, machine_of(1, 80, mfu, 989.0)) for mfu in (0.4, 0.2))
    assert one == pytest.approx(job.flops / (0.4 * 989e12) / 3600)
    assert other == pytest.approx(2 * one)


@pytest.mark.parametrize("stage", ["contrastive", "generative", "sft"])
def test_defaults_of_the_planner_are_the_stages(stage):
    module = importlib.import_module(f"vlfoundry.stages.{stage}")
    options = getattr(module, f"{stage.capitalize()}StageConfig")
    fields = {field.name: field.default for field in dataclasses.fields(options)}
    assert DEFAULTS[stage] == {name: fields[name] for name in DEFAULTS[stage]}


@pytest.mark.parametrize(
    "address", ["pretrain_text", "contrastive", "generative", "sft@simple", "sft@full"]
)
def test_every_training_stage_of_params_yaml_can_be_planned(address):
    job, machine = find_job(ROOT, address), machine_of(2, 4, 0.5, 0.1, fp32=True, reserve=1)
    lines = list(plan_lines(job, make_plan(job, machine), machine))
    assert lines[-1].startswith("recommended: tensor 1, pipeline 1, data 2")


def test_profile_and_assignments_change_the_plan():
    plain = job_of("contrastive")
    changed = find_job(ROOT, "contrastive", profile="base", overrides=("contrastive.captions=1",))
    assert changed.heaviest.config.vision.width == 384
    assert (plain.heaviest.captions, changed.heaviest.captions) == (4, 1)


def test_a_stage_with_adapters_trains_them_alone():
    overrides = ("sft={lora: {language: {rank: 4}}, trainable: [lora], train: {simple: "
                 "{steps: 1, batch_samples: 2, lr: 1.0e-3}}}",)  # fmt: skip
    work = find_job(ROOT, "sft@simple", overrides=overrides).heaviest
    assert work.config.chat.lora.rank == 4
    assert {name.rsplit(".", 2)[1] for name in work.names} == {"lora"}


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: find_job(ROOT, "stage1"), "expected a recipe \\(.*internvl-c.*training stage"),
        (lambda: machine_of(8, 3, 0.4, 989), "got 8 GPUs of 3 GiB"),
        (lambda: list(show_lines(ROOT, "contrastive")), "is a stage, not a recipe"),
        (lambda: find_job(ROOT, "contrastive", profile="none"), "no profile 'none'"),
    ],
)
def test_refusals_say_what_was_expected(ask, message):
    with pytest.raises(ConfigError, match=message):
        ask()


def test_a_recipe_with_an_unknown_key_is_refused(tmp_path):
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "._base.yaml").write_bytes(b"\0\5\x16\7 Mac OS X \xb0")
    assert recipes(tmp_path) == recipes(ROOT)  # those that VLFoundry has
    (tmp_path / "profiles" / "wrong.yaml").write_text("recipe: {titel: x}\n")
    with pytest.raises(ConfigError, match="unknown key 'titel'; did you mean 'title'"):
        recipes(tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "internvl-c", "--gpus", "64", "--memory", "80"],
        ["plan", "--help"],
        ["recipes", "internvl-g"],
    ],
)
def test_planning_is_quick_and_needs_no_torch(arguments):
    code = "import sys; from vlfoundry.flows.cli import app"
    code += f"; app({arguments!r}, standalone_mode=False)"
    code += "; sys.exit('torch' in sys.modules)"

    def ask() -> None:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr

    assert least_cpu_s(ask, enough=2) < 2


def test_what_plan_prints():
    done = subprocess.run(
        [sys.executable, "-m", "vlfoundry.flows.cli", "plan", "internvl-c", "--gpus", "64",
         "--memory", "80"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "12,620,029,697 parameters" in done
    assert "recompute" in done
    assert "do not: internvl_c: vision: 48 layers for more pipeline stages" in done
    assert done.splitlines()[-1].startswith("recommended: ")
