"""What a program imports: `import vlfoundry` costs nothing, and PyTorch comes with the first model.

    import vlfoundry
    from pathlib import Path

    model = vlfoundry.load("internvl_g#champion")
    pictures = [path.read_bytes() for path in sorted(Path("photos").glob("*.jpg"))]  # B of them
    names = ["a cat", "a bicycle", "a bowl of soup"]  # C of them

    images = model.embed_images(pictures)  # unit float32 [B, E]
    classes = model.embed_texts(names)     # unit float32 [C, E]
    best = (images @ classes.T).argmax(1)  # zero-shot classification: int [B]

    prompt = vlfoundry.caption_prompt("en")
    captions = model.generate(pictures, [prompt] * len(pictures), max_new_tokens=20)

No stage reaches this module: it is not part of any result.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlfoundry.models.internvl.predict import Model

__all__ = ["caption_prompt", "load"]


def load(ref: str | Path, *, root: str | Path | None = None) -> Model:
    """A trained model ready for use, where and in the precision in which training computes.

    What it can do depends on its kind (`model.kind`, `model.capabilities`). Pictures are encoded
    (bytes of a PNG, JPEG, WebP, GIF, BMP or TIFF), or uint8 [H, W, 3 or 4] of any size:

    * `embed_images(pictures)` and `embed_texts(texts)` -> unit float32 [B, E]: internvl_c and
      internvl_g. Cosines are `images @ texts.T`.
    * `match(pictures, texts)` -> float32 [B], 0 to 1, whether each text belongs to its picture:
      internvl_g.
    * `generate(pictures, prompts, max_new_tokens)` -> B texts, greedily: answers to questions by
      chat_simple and chat_full, captions by internvl_g, whose prompt is `caption_prompt(lang)`.
    * `image_features(pictures)` -> float32 [B, W], the mean of the vision tower's patch tokens: all
      kinds but text.

    Args:
        ref: a model folder; or a registered name: internvl_c (its champion, or else its newest
            version), internvl_c@v0.1.0, internvl_c#champion, or a stage alone, champion, where one
            kind of model has it.
        root: the project whose registry is asked; None: that of the working directory.

    Raises:
        ModelError: there is no such model, or a file of it is missing, damaged or of another model.
        DataError: DVC's cache lacks a file of a registered model (`vlfoundry fetch` gets it).
        ConfigError: a number of its config cannot be.
    """
    from vlfoundry.infra.registry.gto import resolve_model

    folder = resolve_model(ref, Path(root) if root is not None else None)
    from vlfoundry.models.internvl.predict import load_model

    return load_model(folder)


def caption_prompt(lang: str) -> str:
    """What an internvl_g is given for a caption in a language, such as "en"."""
    from vlfoundry.models.internvl import prompts

    return prompts.caption_prompt(lang)
