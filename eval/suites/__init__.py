"""The registry of suites: each module of this folder declares one as `SUITE` (`eval.suite`)."""

import functools
from collections.abc import Sequence

from vlfoundry.eval.context import Model
from vlfoundry.eval.suite import Suite
from vlfoundry.infra.core.errors import ModelError
from vlfoundry.infra.core.members import members


@functools.cache
def suites() -> dict[str, Suite]:
    """Every suite by its name, in the order in which they run."""
    found = sorted(members(__name__, "SUITE"), key=lambda suite: (suite.position, suite.name))
    return {suite.name: suite for suite in found}


def suite(name: str) -> Suite:
    """A suite by its name.

    Raises:
        ModelError: there is none of that name.
    """
    known = suites()
    if name not in known:
        raise ModelError(f"unknown suite {name!r}; choose from {', '.join(known)}")
    return known[name]


def score_keys(name: str, languages: Sequence[str]) -> list[str]:
    """`suite/name` and `suite/name/lang` of all that a suite may score on concept sets."""
    return list(suite(name).keys(languages))


def abilities(kind: str, capabilities: frozenset[str]) -> frozenset[str]:
    """A model's capabilities, and `chat` if one of its kind answers questions."""
    can_chat = "generate" in capabilities and kind.startswith("chat")
    return capabilities | ({"chat"} if can_chat else set())


def why_not(model: Model, name: str) -> str:
    """Why the model cannot run the suite, or an empty string if it can.

    Raises ModelError for a suite that does not exist.
    """
    return why_not_kind(model.kind, model.capabilities, name)


def why_not_kind(kind: str, capabilities: frozenset[str], name: str) -> str:
    """`why_not` of a model that is not loaded yet."""
    needs, able = suite(name).needs, abilities(kind, capabilities)
    if needs in able:
        return ""
    return (
        f"{name} needs a model that can {needs}; one of kind {kind} can "
        f"{' and '.join(sorted(able))}"
    )
