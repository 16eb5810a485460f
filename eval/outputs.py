"""The models that a pipeline run makes: what evaluation, gate, report and registry know them by."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Output:
    """A model that a step of the pipeline makes. Two of them may be of one kind."""

    name: str
    """in gate rules, score files and `evaluate@NAME`"""
    kind: str
    """of model: what it consists of and can do (`models.internvl.config.PARTS`)"""
    folder: str
    """of the model, relative to the project"""
    title: str
    """in the report"""

    @property
    def scores(self) -> str:
        """The file of its scores, relative to the project."""
        return f"artifacts/evaluate/{self.name}/scores.json"


OUTPUTS = {
    output.name: output
    for output in (
        Output(
            name="internvl_c",
            kind="internvl_c",
            folder="artifacts/contrastive/model",
            title="InternVL-C (contrastive)",
        ),
        Output(
            name="internvl_g",
            kind="internvl_g",
            folder="artifacts/generative/model",
            title="InternVL-G (generative)",
        ),
        Output(
            name="chat_simple",
            kind="chat_simple",
            folder="artifacts/sft/simple/model",
            title="Chat, simple (vision tower and connector)",
        ),
        Output(
            name="chat_full",
            kind="chat_full",
            folder="artifacts/sft/full/model",
            title="Chat, full (with QLLaMA)",
        ),
    )
}
"""by name"""
