"""Whether the stages can take the parameters: asked before anything is started."""

import difflib
import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlfoundry.eval.compare.rules import Rule
from vlfoundry.eval.outputs import OUTPUTS
from vlfoundry.eval.suites import abilities, score_keys, suite
from vlfoundry.infra.core.config import PARAMS_FILE, load_params
from vlfoundry.infra.core.errors import ConfigError
from vlfoundry.infra.core.project import DEFINITION
from vlfoundry.infra.core.stage import Stage, parameters_of
from vlfoundry.infra.core.streams import check_seed
from vlfoundry.infra.launch.profile import local_profile
from vlfoundry.models.internvl.config import CAPABILITIES

COMMAND = re.compile(r"python -m vlfoundry.stages\.(\w+)")


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
    local_profile(root)
    params = load_params(root / PARAMS_FILE) if params is None else params
    configs: dict[str, Any] = {}
    for name in names:
        stage: Stage = importlib.import_module(f"vlfoundry.stages.{name}").STAGE
        configs[name] = parameters_of(stage, dict(params))
    check_seed(params["seed"])
    if {"evaluate", "gate"} <= configs.keys():
        evaluation = configs["evaluate"]
        _check_rules(configs["gate"].gate.rules, evaluation.evaluate.suites, evaluation.languages)


def _check_rules(rules: Sequence[Rule], suites: Sequence[str], languages: Sequence[str]) -> None:
    """Raises ConfigError where no suite of the run gives the score of a rule."""
    for rule in rules:
        for variant in filter(None, (rule.variant, rule.not_below)):
            kind = OUTPUTS[variant].kind
            able = abilities(kind, CAPABILITIES[kind])
            there = [name for name in suites if suite(name).needs in able]
            keys = [key for name in there for key in score_keys(name, languages)]
            if rule.score in keys:
                continue
            near = difflib.get_close_matches(rule.score, keys, n=1)
            raise ConfigError(
                f"gate rule on {variant}: there will be no score {rule.score!r}"
                + (f"; did you mean {near[0]!r}?" if near else "")
                + f" The suites of {variant} in this run are {there} (evaluate.suites), the "
                f"languages {list(languages)}"
            )
