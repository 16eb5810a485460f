"""Model folders: `config.json`, `weights.safetensors`, a tokenizer; and the model in use.

The tokenizer is our own `tokenizer.json`, or the official files of imported weights, which stay
with whatever is trained from these, in the folder `official`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from vlfoundry.infra.backend.placement import to_device
from vlfoundry.infra.core.errors import ModelError
from vlfoundry.infra.data.images.decode import Picture
from vlfoundry.infra.train.weights import gather_weights, load_weights, pieces, write_safetensors
from vlfoundry.models.chat.official import KEPT
from vlfoundry.models.internvl.config import CAPABILITIES, PARTS, InternVLConfig
from vlfoundry.models.internvl.folder import (
    check_shapes,
    is_below,
    read_config,
    refuse_other_adapters,
    weight_shapes,
    write_config,
)
from vlfoundry.models.internvl.model import Chunks, InternVL, build
from vlfoundry.models.internvl.prompts import SUMMARIZE
from vlfoundry.models.internvl.tokenizer import load_tokenizer
from vlfoundry.models.preprocess.normalize import normalize_uint8
from vlfoundry.models.tokenizer import TextTokenizer, pad

BATCH = 64
"""squares of pictures, or texts, that a forward pass takes"""


def save_model(
    folder: str | Path,
    kind: str,
    config: InternVLConfig,
    model: InternVL | Chunks,
    tokenizer: TextTokenizer,
) -> None:
    """Write a model folder; the same model gives the same bytes. All ranks call, rank 0 writes."""
    weights = gather_weights(model)
    if weights is None:
        return
    folder = Path(folder)
    write_config(folder, kind, config)
    write_safetensors(folder / "weights.safetensors", weights)
    # A tokenizer that an earlier run left here would be taken for this model's.
    (folder / "tokenizer.json").unlink(missing_ok=True)
    shutil.rmtree(folder / KEPT, ignore_errors=True)
    tokenizer.save_to(folder)


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """Canonical tensors of a model folder."""
    from safetensors.torch import load_file

    weight_shapes(folder)  # whether the file is there and whole
    return load_file(Path(folder) / "weights.safetensors")


def load_parts(model: InternVL | Chunks, folder: str | Path, parts: Mapping[str, str]) -> list[str]:
    """Fill parts of a model from a trained one, e.g. {"language": "text"} for a chat model.

    Args:
        model: to be filled, in any layout.
        folder: the trained model's.
        parts: prefix in `model` -> prefix in the folder, by whole components of the name.

    Returns:
        The names of the parameters below `parts` that the folder does not have (a head, say,
        or cross-attention that is new): they keep their values.

    Raises:
        ModelError: nothing of a part is in the folder, a shape differs, or a part has adapters
            there and the model has no such ones.
    """
    refuse_other_adapters(model.model_config, folder, parts)
    held = weight_shapes(folder)
    for target, source in parts.items():
        if not any(is_below(name, source) for name in held):
            raise ModelError(f"{folder} has no {source!r} to fill the model's {target!r} with")
    with safe_open(Path(folder) / "weights.safetensors", framework="pt") as file:
        return _fill(model, folder, parts, file)


def _fill(
    model: InternVL | Chunks, folder: str | Path, parts: Mapping[str, str], file: Any
) -> list[str]:
    """Tensor by tensor: no rank reads what it does not hold."""
    names = set(file.keys())
    missing: list[str] = []
    for piece in pieces(model):
        target = next((part for part in parts if is_below(piece.name, part)), None)
        if target is None:
            continue
        source = parts[target] + piece.name[len(target) :]
        if source not in names:
            missing.append(piece.name)
            continue
        whole = file.get_tensor(source)
        if tuple(whole.shape) != piece.shape:
            raise ModelError(
                f"{piece.name!r} has shape {list(whole.shape)} in {folder}; the model's config "
                f"asks for {list(piece.shape)}"
            )
        piece.real.copy_(whole[piece.place])
    return missing


def load_model(folder: str | Path, *, untrained_seed: int | None = None) -> Model:
    """A model ready for use in this process: where training computes, and in its precision.

    Args:
        folder: a model folder.
        untrained_seed: leave the weights as initialised with this seed: the control that has
            learnt nothing.

    Raises:
        ModelError: a file of the folder is missing, damaged, or of another model.
        ConfigError: a number of its config cannot be.
    """
    kind, config = read_config(folder)
    if untrained_seed is None:
        check_shapes(folder, kind, config)
    tokenizer = load_tokenizer(folder)
    # Used on rows of any length and with a cache, where Transformer Engine gains nothing.
    model = build(kind, config, seed=untrained_seed or 0, spec="local")
    if untrained_seed is None:
        load_weights(model, Path(folder) / "weights.safetensors")
    return Model(to_device(model), config, tokenizer)


class Model:
    """A model as evaluation sees it: pictures and texts in, numbers and texts out.

    Pictures are as they are stored, or uint8 [H, W, 3 or 4] of any size: what the vision tower is
    given of them is the model's own affair (`models.preprocess.geometry`).
    """

    def __init__(self, model: InternVL, config: InternVLConfig, tokenizer: TextTokenizer):
        """Raises ModelError if a chat model's way of being asked is not known."""
        self.module = model.eval()
        self.config = config
        self.tokenizer = tokenizer
        self.dialogue = tokenizer.dialogue if "language" in PARTS[model.kind] else None
        self.stop_id = self.dialogue.stop_id if self.dialogue else tokenizer.eos_id
        self.kind = model.kind
        self.capabilities = CAPABILITIES[model.kind]
        self.sight = config.sight(model.kind)

    def embed_images(self, images: Sequence[Picture], task: str = "retrieval") -> np.ndarray:
        """B pictures -> unit float32 [B, E]; the task decides what is seen of an oblong one."""
        self._require("embed")
        return self._by_batch(images, task, self.module.embed_images, self.config.embed_dim)

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Texts as they are -> unit float32 [B, E]; the model adds its own prefix."""
        self._require("embed")
        seen = self.config.text.max_tokens
        longest = min(seen, self.tokenizer.embedded_tokens or seen)
        parts = [np.empty((0, self.config.embed_dim), np.float32)]
        for chunk in _chunks(list(texts)):
            ids, mask = self.tokenizer.encode_batch(chunk, prefix=SUMMARIZE, max_tokens=longest)
            with torch.inference_mode():
                parts.append(_numbers(self.module.embed_texts(self._there(ids), self._there(mask))))
        return np.concatenate(parts)

    def image_features(self, images: Sequence[Picture], task: str = "linear_probe") -> np.ndarray:
        """B pictures -> float32 [B, W]: mean of the vision tower's patch tokens, of the first
        square of each."""
        if self.module.vision is None:
            raise ModelError(f"a {self.kind} model sees no images")
        return self._by_batch(
            images,
            task,
            lambda pixels: self.module.vision(pixels)[:, 1:].mean(1),
            self.config.vision.width,
        )

    def match(
        self, images: Sequence[Picture], texts: Sequence[str], task: str = "retrieval"
    ) -> np.ndarray:
        """How sure the model is that each text belongs to its picture: float32 [B], 0 to 1.

        A picture that is asked about again within `BATCH` rows, as the same object, is looked at
        once.
        """
        self._require("match")
        parts = [np.empty(0, np.float32)]
        for shown, said in zip(_chunks(list(images)), _chunks(texts), strict=True):
            distinct = {id(image): image for image in shown}
            place = {key: row for row, key in enumerate(distinct)}
            squares = np.concatenate(
                [self.sight.squares(image, task)[:1] for image in distinct.values()]
            )
            ids, mask = self.tokenizer.encode_batch(said, max_tokens=self.config.text.max_tokens)
            batch = {
                "match_ids": self._there(ids),
                "match_mask": self._there(mask),
                "picture": self._there(np.array([place[id(image)] for image in shown])),
            }
            with torch.inference_mode():
                found = self.module.run("match", {"pixels": self._pixels(squares), **batch})
            parts.append(_numbers(found["match"].softmax(-1)[:, 1]))
        return np.concatenate(parts)

    def generate(
        self, images: Sequence[Picture], prompts: Sequence[str], max_new_tokens: int
    ) -> list[str]:
        """Greedy texts about images, one each.

        Chat models take a question, and see the tiles that they were trained on; internvl_g takes a
        caption prompt such as `models.internvl.prompts.caption_prompt("en")`.
        """
        self._require("generate")
        seen = (self.sight.squares(image, "caption") for image in images)
        texts: list[str] = []
        for squares, asked in _groups(zip(seen, prompts, strict=True)):
            texts += self._answers(squares, asked, max_new_tokens)
        return texts

    def _answers(
        self, squares: Sequence[np.ndarray], prompts: Sequence[str], max_new_tokens: int
    ) -> list[str]:
        """Texts about pictures, each of which is uint8 [N, S, S, 3]."""
        rows = [self._prompt(p, len(n)) for p, n in zip(prompts, squares, strict=True)]
        ids, mask = pad(rows, self.tokenizer.pad_id, left=True)
        with torch.inference_mode():
            new = self.module.generate(
                self._there(ids),
                self._there(mask),
                self._pixels(np.concatenate(squares)),
                max_new_tokens=max_new_tokens,
                eos_id=self.stop_id,
                **({"context_id": self.dialogue.context_id} if self.dialogue else {}),
            )
        return [self._text(row) for row in new.tolist()]

    def _prompt(self, prompt: str, squares: int) -> list[int]:
        if self.dialogue is None:
            return [*self.tokenizer.begin, *self.tokenizer.encode(prompt)]
        return self.dialogue.question(prompt, squares * self.config.visual_tokens(self.kind))

    def _text(self, row: list[int]) -> str:
        row = row[: row.index(self.stop_id)] if self.stop_id in row else row
        return self.tokenizer.decode(row, keep_special=True).strip()

    def _pixels(self, squares: np.ndarray) -> Tensor:
        return normalize_uint8(squares).to(self.device)

    def _there(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.module.parameters()).device

    def _by_batch(
        self,
        images: Sequence[Picture],
        task: str,
        encode: Callable[[Tensor], Tensor],
        width: int,
    ) -> np.ndarray:
        parts = [np.empty((0, width), np.float32)]
        for chunk in _chunks(images):
            squares = np.concatenate([self.sight.squares(image, task)[:1] for image in chunk])
            with torch.inference_mode():
                parts.append(_numbers(encode(self._pixels(squares))))
        return np.concatenate(parts)

    def _require(self, capability: str) -> None:
        if capability not in self.capabilities:
            raise ModelError(
                f"a {self.kind} model cannot {capability}; kinds that can: "
                f"{sorted(k for k, v in CAPABILITIES.items() if capability in v)}"
            )


def _chunks(items: Any) -> Iterator[Any]:
    return (items[start : start + BATCH] for start in range(0, len(items), BATCH))


def _groups(
    pairs: Iterable[tuple[np.ndarray, str]],
) -> Iterator[tuple[list[np.ndarray], list[str]]]:
    """Neighbours as long as they have no more than `BATCH` squares together; a picture is whole."""
    squares: list[np.ndarray] = []
    prompts: list[str] = []
    for found, prompt in pairs:
        if squares and sum(map(len, squares)) + len(found) > BATCH:
            yield squares, prompts
            squares, prompts = [], []
        squares.append(found)
        prompts.append(prompt)
    if squares:
        yield squares, prompts


def _numbers(tensor: Tensor) -> np.ndarray:
    """float32, wherever it is and in whatever precision: NumPy has no bf16."""
    return tensor.float().cpu().numpy()
