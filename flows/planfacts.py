"""`vlfoundry plan --json` and `vlfoundry recipes --json`: what `flows/plan.py` prints, as facts."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlfoundry.flows.plan import (
    Job,
    command,
    find_job,
    gpu_hours,
    machine_of,
    make_plan,
    recipe_job,
)
from vlfoundry.flows.recipes import Recipe, recipes
from vlfoundry.models.estimate.compute import sample_flops
from vlfoundry.models.estimate.search import Fit, Machine, Plan


def plan_facts(job: Job, plan: Plan, machine: Machine) -> dict[str, Any]:
    """A run on a machine: sizes in bytes, times in seconds, work in FLOP; layouts best first."""
    work = job.heaviest
    return {
        "name": job.name,
        "kind": work.kind,
        "parameters": sum(weight.elements for weight in work.weights(1)),
        "trained_parameters": sum(w.elements for w in work.weights(1) if w.name in work.names),
        "batch_samples": work.batch_samples,
        "parts": [
            {
                "steps": part.steps,
                "images": part.images if "vision" in part.parts else 0,
                "vision_tokens": part.vision_tokens if "vision" in part.parts else 0,
                "text_tokens": part.text_tokens,
                "captions": part.captions,
                "forward_flops": sample_flops(part).forward,
                "backward_flops": sample_flops(part).backward,
            }
            for part in job.parts
        ],
        "machine": dataclasses.asdict(machine),
        "flops": job.flops,
        "gpu_hours": gpu_hours(job, machine),
        "layouts": [_layout(fit) for fit in plan.fits],
        "refused": dict(plan.refused.most_common()),
    }


def recipes_facts(root: Path, mfu: float = 0.4, peak_tflops: float = 989.0) -> dict[str, Any]:
    """All recipes, each with its cost at that share of that peak."""
    found = []
    for name, recipe in recipes(root).items():
        machine = machine_of(recipe.machine.gpus, recipe.machine.memory, mfu, peak_tflops)
        hours = gpu_hours(find_job(root, name), machine)
        found.append({**_recipe(name, recipe), "gpu_hours": hours})
    return {"mfu": mfu, "peak_tflops": peak_tflops, "recipes": found}


def recipe_facts(root: Path, name: str) -> dict[str, Any]:
    """One recipe, with the plan for its own machine. Raises ConfigError if there is none."""
    job, recipe = recipe_job(root, name)
    machine = machine_of(recipe.machine.gpus, recipe.machine.memory, 0.4, 989.0)
    return {**_recipe(name, recipe), "plan": plan_facts(job, make_plan(job, machine), machine)}


def _recipe(name: str, recipe: Recipe) -> Mapping[str, Any]:
    return {"name": name, "command": command(name, recipe), **dataclasses.asdict(recipe)}


def _layout(fit: Fit) -> dict[str, Any]:
    return {
        **dataclasses.asdict(fit.layout),
        "memory_bytes": {**dataclasses.asdict(fit.memory), "total": fit.memory.total},
        "step_seconds": fit.seconds,
    }
