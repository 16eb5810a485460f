"""Whether the stages can take the parameters: asked before anything is started."""

import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.rules import Rule
from eval.suites import NEEDS, abilities
from infra.config import PARAMS_FILE, load_params
from infra.errors import ConfigError
from infra.launch import local_profile
from infra.project import DEFINITION
from infra.stage import Stage, parameters_of
from infra.streams import check_seed
from models.internvl.config import CAPABILITIES

COMMAND = re.compile(r"python -m stages\.(\w+)")


def check_parameters(root: Path, params: Mapping[str, Any] | None = None) -> None:
    """Build the configuration of every stage that dvc.yaml runs, and the launcher's.

    Args:
        root: the project.
        params: of the run; None: those of params.yaml.

    Raises:
        ConfigError: as the stage would raise it, hours later.
    """
    definition = root / DEFINITION
    text = definition.read_text("utf-8") if definition.is_file() else ""
    names = dict.fromkeys(COMMAND.findall(text))
    if not names:
        return
    local_profile()
    params = load_params(root / PARAMS_FILE) if params is None else params
    configs: dict[str, Any] = {}
    for name in names:
        stage: Stage = importlib.import_module(f"stages.{name}").STAGE
        configs[name] = parameters_of(stage, dict(params))
    check_seed(params["seed"])
    if {"evaluate", "gate"} <= configs.keys():
        _check_rules(configs["gate"].gate.rules, configs["evaluate"].evaluate.suites)


def _check_rules(rules: Sequence[Rule], suites: Sequence[str]) -> None:
    """Raises ConfigError where no suite of the run gives the score of a rule."""
    for rule in rules:
        suite = rule.score.partition("/")[0]
        able = abilities(rule.variant, CAPABILITIES[rule.variant])
        there = [name for name in suites if NEEDS[name] in able]
        if suite not in there:
            raise ConfigError(
                f"gate rule on {rule.variant} {rule.score}: there will be no such score; the "
                f"suites of {rule.variant} in this run are {there} (evaluate.suites)"
            )
