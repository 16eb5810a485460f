"""`vlfoundry plan` and `vlfoundry recipes`: from parameters to workloads, and what to print."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlfoundry.flows.recipes import Recipe, find_recipe, profile_path, recipes, with_profile
from vlfoundry.infra.core.config import PARAMS_FILE, apply_overrides, build, load_params
from vlfoundry.infra.core.errors import ConfigError
from vlfoundry.infra.train.config import TrainConfig
from vlfoundry.models.estimate.compute import sample_flops
from vlfoundry.models.estimate.memory import GIB
from vlfoundry.models.estimate.search import Fit, Machine, Plan, search
from vlfoundry.models.estimate.workload import Workload
from vlfoundry.models.internvl.config import InternVLConfig
from vlfoundry.models.layers.config import LoraConfig

MOST_GPUS = 1_000_000
SCENE_TEXT_TOKENS = 48
"""room for a question about a scene and its answer, beside the visual tokens"""
DEFAULTS: dict[str, dict[str, Any]] = {
    "contrastive": {
        "captions": 4, "max_tokens": 32, "mask_ratio": 0.5, "unmasked_share": 0.1,
        "masked_px": None,
    },
    "generative": {"max_tokens": 32, "trainable": ("stage2",)},
    "sft": {"trainable": ("sft", "vision")},
    "retrieval": {"max_tokens": 80, "trainable": ("all",)},
}  # fmt: skip
"""of the stages' own options; their classes import PyTorch, and a plan takes no second"""
ADDRESSES = ("pretrain_text", "contrastive", "generative", "sft@simple", "sft@full")
SHOWN = 10


@dataclasses.dataclass(frozen=True)
class Job:
    """A run to be planned: its parts in the order in which they are trained."""

    name: str
    parts: tuple[Workload, ...]
    recipe: Recipe | None

    @functools.cached_property
    def heaviest(self) -> Workload:
        """The part whose samples take most; the layout must fit it."""
        return max(self.parts, key=lambda part: sample_flops(part).total)

    @property
    def flops(self) -> float:
        """Of the whole run: model FLOPs, nothing computed twice."""
        return sum(p.steps * p.batch_samples * sample_flops(p).total for p in self.parts)


def find_job(
    root: Path, name: str, *, profile: str | None = None, overrides: tuple[str, ...] = ()
) -> Job:
    """The run that `name` means: a recipe, or the address of a stage.

    Raises:
        ConfigError: there is neither, or its parameters are wrong.
    """
    recipe, address = None, name
    if name not in ADDRESSES:
        recipe = find_recipe(root, name)
        if recipe is None:
            raise ConfigError(
                f"nothing to plan is called {name!r}; expected a recipe "
                f"({', '.join(recipes(root))}) or a training stage ({', '.join(ADDRESSES)})"
            )
        address, profile = recipe.stage, profile or name
    params = load_params(root / PARAMS_FILE)
    if profile:
        params = with_profile(params, root, profile)
    params = apply_overrides(params, overrides)
    return Job(name, tuple(_parts(params, address, recipe)), recipe)


def _parts(params: Mapping[str, Any], address: str, recipe: Recipe | None) -> Iterator[Workload]:
    stage, _, variant = address.partition("@")
    model = build(InternVLConfig, params["model"], "model")
    options = DEFAULTS.get(stage, {}) | dict(params[stage])
    given = options["train"][variant] if variant else options["train"]
    train = build(TrainConfig, given, f"{address}.train")
    common: dict[str, Any] = {
        "config": model,
        "batch_samples": train.batch_samples,
        "steps": train.steps,
        "moments": train.moments,
        "gradients": train.gradients,
    }
    if stage == "contrastive":
        yield from _contrastive(options, common)
    elif stage == "pretrain_text":
        yield Workload(kind="text", objective="text", text_tokens=model.text.max_tokens, **common)
    elif stage == "sft":
        kind = f"chat_{variant}"
        adapters = options.get("lora", {})
        lora = {tower: build(LoraConfig, given) for tower, given in adapters.items()}
        common["config"] = model.with_lora(**lora) if lora else model
        tokens = recipe.text_tokens if recipe else None
        yield Workload(
            kind=kind,
            objective="chat",
            text_tokens=tokens or model.visual_tokens(kind) + SCENE_TEXT_TOKENS,
            images=recipe.images if recipe else 1,
            trained=tuple(options["trainable"]),
            **common,
        )
    else:
        hard_negatives = options.get("objective", {}).get("negatives") == "hard"
        yield Workload(
            kind="internvl_g",
            objective="generative" if stage == "generative" else "retrieval",
            text_tokens=options["max_tokens"],
            trained=tuple(options["trainable"]),
            hard_negatives=stage == "generative" and hard_negatives,
            **common,
        )


def _contrastive(options: Mapping[str, Any], common: dict[str, Any]) -> Iterator[Workload]:
    """The masked part of stage 1, and the last one without a mask."""
    steps, model = common["steps"], common["config"]
    masked_steps = round(steps * (1 - options["unmasked_share"])) if options["mask_ratio"] else 0
    texts = {"text_tokens": options["max_tokens"], "captions": options["captions"]}
    about: dict[str, Any] = {"kind": "internvl_c", "objective": "contrastive", **texts, **common}
    if masked_steps:
        side = options["masked_px"] or model.vision.image_px
        vision = dataclasses.replace(model.vision, image_px=side)
        kept = max(1, round(vision.patches * (1 - options["mask_ratio"])))
        masked = dataclasses.replace(model, vision=vision)
        yield Workload(**(about | {"steps": masked_steps, "config": masked}), kept_patches=kept)
    if steps > masked_steps:
        yield Workload(**(about | {"steps": steps - masked_steps}))


def make_plan(job: Job, machine: Machine) -> Plan:
    """Layouts for the heaviest part."""
    return search(job.heaviest, machine)


def plan_lines(job: Job, plan: Plan, machine: Machine) -> Iterator[str]:
    """What `vlfoundry plan` prints."""
    work = job.heaviest
    parameters = sum(weight.elements for weight in work.weights(1))
    trained = sum(w.elements for w in work.weights(1) if w.name in work.names)
    yield (
        f"{job.name}: {work.kind}, {parameters:,} parameters, {trained:,} trained; "
        f"{work.batch_samples} samples a step"
    )
    for part in job.parts:
        flops = sample_flops(part)
        yield (
            f"  {part.steps} steps of {_tokens(part)}: {flops.forward / 1e12:.4g} TFLOP forwards, "
            f"{flops.backward / 1e12:.4g} backwards a sample"
        )
    yield f"  {cost_line(job, machine)}"
    yield ""
    if plan.best is None:
        yield "no layout fits; more GPUs, more memory, or a smaller batch?"
    else:
        yield from _table(plan.fits[:SHOWN], work)
        if len(plan.fits) > SHOWN:
            yield f"  and {len(plan.fits) - SHOWN} more that fit"
    for reason, count in plan.refused.most_common():
        yield f"  {count} do not: {reason}"
    if plan.best is not None:
        yield ""
        yield f"recommended: {describe(plan.best)}"


def cost_line(job: Job, machine: Machine) -> str:
    """The whole run's cost."""
    hours = gpu_hours(job, machine)
    return (
        f"{job.flops:.3g} FLOP in all: {hours:,.4g} GPU-hours at {machine.mfu:.0%} of "
        f"{machine.flops_per_s / 1e12:g} TFLOP/s"
    )


def gpu_hours(job: Job, machine: Machine) -> float:
    """Of the whole run, nothing computed twice."""
    return job.flops / (machine.mfu * machine.flops_per_s) / 3600


def describe(fit: Fit) -> str:
    """A layout in words."""
    layout = fit.layout
    words = [f"tensor {layout.tensor}"]
    if layout.sequence_parallel:
        words[0] += " with sequence parallelism"
    words.append(f"pipeline {layout.pipeline}")
    if layout.virtual_pipeline:
        words[1] += f" x {layout.virtual_pipeline} chunks"
    words += [f"data {layout.data}", f"micro-batch {layout.micro_batch_samples}"]
    words.append("full recomputation" if layout.recompute else "no recomputation")
    return f"{', '.join(words)}: {fit.memory.total / GIB:.1f} GiB, {fit.seconds:.3g} s a step"


def _tokens(part: Workload) -> str:
    texts = f"{part.captions} x {part.text_tokens}" if part.captions > 1 else f"{part.text_tokens}"
    if "vision" not in part.parts:
        return f"{texts} text tokens"
    return f"{part.images:g} x {part.vision_tokens} vision and {texts} text tokens"


def _table(fits: list[Fit], work: Workload) -> Iterator[str]:
    """Sizes in GiB of the pipeline rank that needs most."""
    yield (
        "    TP SP  PP  VP    DP  recompute  micro   params   grads  optim.    acts   total  step s"
    )
    for number, fit in enumerate(fits):
        layout, need = fit.layout, fit.memory
        sizes = (need.parameters, need.gradients, need.optimizer, need.activations, need.total)
        yield (
            f"  {'*' if number == 0 else ' '} {layout.tensor:2d} "
            f"{'yes' if layout.sequence_parallel else ' no'} {layout.pipeline:2d}  "
            f"{layout.virtual_pipeline or 1:2d} {layout.data:5d}  "
            f"{'full' if layout.recompute else 'none':9s}  {layout.micro_batch_samples:5d}  "
            + "  ".join(f"{size / GIB:6.3g}" for size in sizes)
            + f"  {fit.seconds:6.4g}"
        )


def recipe_lines(root: Path, mfu: float = 0.4, peak_tflops: float = 989.0) -> Iterator[str]:
    """What `vlfoundry recipes` prints: a line each."""
    for name, recipe in recipes(root).items():
        machine = machine_of(recipe.machine.gpus, recipe.machine.memory, mfu, peak_tflops)
        hours = gpu_hours(find_job(root, name), machine)
        yield f"{name:32s} {hours:12,.0f} GPU-h  {recipe.title}"
    yield ""
    yield f"at {mfu:.0%} of {peak_tflops:g} TFLOP/s; `vlfoundry recipes NAME` shows one"


def machine_of(
    gpus: int, memory: float, mfu: float, peak_tflops: float, *, fp32: bool = False,
    reserve: float = 4.0,
) -> Machine:  # fmt: skip
    """From the units of the command line: GiB and TFLOP/s.

    Raises:
        ConfigError: a value that no machine has.
    """
    numbers = math.isfinite(memory) and math.isfinite(reserve) and math.isfinite(peak_tflops)
    possible = 1 <= gpus <= MOST_GPUS and memory > reserve >= 0 and 0 < mfu <= 1 and peak_tflops > 0
    if not (numbers and possible):
        raise ConfigError(
            f"got {gpus} GPUs of {memory:g} GiB ({reserve:g} set aside) and {peak_tflops:g} "
            f"TFLOP/s at MFU {mfu:g}; expected 1 to {MOST_GPUS:,} GPUs, more memory than is set "
            "aside, an MFU above 0 and up to 1, and a peak above 0"
        )
    return Machine(
        ranks=gpus,
        memory_bytes=(memory - reserve) * GIB,
        element=4 if fp32 else 2,
        flops_per_s=peak_tflops * 1e12,
        mfu=mfu,
    )


def recipe_job(root: Path, name: str) -> tuple[Job, Recipe]:
    """The run of a recipe. Raises ConfigError for what is none."""
    job = find_job(root, name)
    if job.recipe is None:
        raise ConfigError(f"{name} is a stage, not a recipe; `vlfoundry recipes` lists them")
    return job, job.recipe


def show_lines(root: Path, name: str) -> Iterator[str]:
    """What `vlfoundry recipes NAME` prints: file, command, cost and memory plan."""
    job, recipe = recipe_job(root, name)
    machine = machine_of(recipe.machine.gpus, recipe.machine.memory, 0.4, 989.0)
    yield f"{name}: {recipe.title}"
    yield f"source: {recipe.source}"
    if recipe.published_on:
        yield f"published on: {recipe.published_on}"
    yield f"command: {command(name, recipe)}"
    yield f"cost: {cost_line(job, machine)}"
    best = make_plan(job, machine).best
    where = f"{recipe.machine.gpus} GPUs of {recipe.machine.memory:g} GiB"
    yield f"memory plan for {where}: {describe(best) if best else 'does not fit'}"
    for key, why in recipe.ours.items():
        yield f"ours: {key}: {why}"
    for text in recipe.differs:
        yield f"differs: {text}"
    yield ""
    yield from profile_path(root, name).read_text("utf-8").splitlines()


def command(name: str, recipe: Recipe) -> str:
    """How to run a recipe."""
    if recipe.stage == "retrieval":
        return f"none yet, as no stage fine-tunes for retrieval; vlfoundry plan {name}"
    return f"vlfoundry run --profile {name} --stage {recipe.stage}"
