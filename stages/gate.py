"""Decide whether the run's models may be promoted, rule by rule, with a reason for each.

A rule looks at one score of one model: its value, its distance from chance, from the untrained
control, and from an earlier model on the same items. All must hold but those that only warn.
"""

import dataclasses
from dataclasses import dataclass

from vlfoundry.eval.compare.rules import Rule, decide
from vlfoundry.eval.compare.scores import read_document, read_scores
from vlfoundry.eval.outputs import OUTPUTS
from vlfoundry.infra.core.errors import ConfigError
from vlfoundry.infra.core.stage import Context, Stage, main

FORMAT = "vlfoundry.gate.v1"
OUT = "artifacts/gate/gate.json"


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """When a model is good enough."""

    candidate: str
    """Kind of the model that is promoted if all rules hold."""
    rules: tuple[Rule, ...]
    """What must hold, or is warned about."""

    def __post_init__(self) -> None:
        named = {self.candidate, *(rule.variant for rule in self.rules)}
        named |= {rule.not_below for rule in self.rules if rule.not_below}
        unknown = sorted(named - set(OUTPUTS))
        if unknown:
            raise ConfigError(f"gate: no model {unknown}; there are {list(OUTPUTS)}")
        if all(rule.warn for rule in self.rules):
            raise ConfigError(
                "gate.rules has no rule that can fail: such a gate lets everything pass; expected "
                "at least one without warn"
            )


@dataclass(frozen=True, kw_only=True)
class Config:
    """What `gate` reads from params.yaml."""

    gate: GateConfig


def run(config: Config, context: Context) -> None:
    """Check every rule and write the decision. A failed gate is a result, not an error."""
    gate = config.gate
    files = {variant: context.path(OUTPUTS[variant].scores) for variant in OUTPUTS}
    scores = {
        variant: {score.key: score for score in read_scores(file)}
        for variant, file in files.items()
    }
    checks = [check for rule in gate.rules for check in decide(rule, scores)]
    passed = all(check.stands for check in checks)
    for check in checks:
        context.log(check.line)
    unwatched = sorted(set(OUTPUTS) - {rule.variant for rule in gate.rules})
    if unwatched:
        context.log(f"WARNING: no rule looks at {', '.join(unwatched)}: it may be of any quality")
    context.log(f"gate: {gate.candidate} {'passed' if passed else 'did not pass'}")
    document = read_document(files[gate.candidate])
    baseline = document.get("baseline")
    context.log(f"baseline: {baseline['name'] if baseline else 'none'}")
    context.write_json(
        OUT,
        {
            "format": FORMAT,
            "passed": passed,
            "candidate": gate.candidate,
            "model": OUTPUTS[gate.candidate].folder,
            "fingerprint": document["model"]["fingerprint"],
            "baseline": baseline,
            "unwatched": unwatched,
            "reasons": [check.line for check in checks if not check.stands],
            "warnings": [check.line for check in checks if check.warn and not check.passed],
            "checks": [dataclasses.asdict(check) for check in checks],
        },
    )


STAGE = Stage(
    name="gate",
    config=Config,
    inputs=tuple(OUTPUTS[variant].scores for variant in OUTPUTS),
    outputs=(OUT,),
    run=run,
    timeout_s=1800,
    cpu=1,
)

if __name__ == "__main__":
    raise SystemExit(main(STAGE))
