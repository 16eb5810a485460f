"""The models that a pipeline run makes, and where they lie."""

MODELS = {
    "internvl_c": "artifacts/contrastive/model",
    "internvl_g": "artifacts/generative/model",
    "chat_simple": "artifacts/sft/simple/model",
    "chat_full": "artifacts/sft/full/model",
}
"""Kind of model to its folder, relative to the root."""


def scores_file(variant: str) -> str:
    """Where the scores of a model lie, relative to the root."""
    return f"artifacts/evaluate/{variant}/scores.json"
