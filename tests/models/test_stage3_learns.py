"""Stage 3 learns a few scenes by heart, and says them: captions alone, then with the mixture."""

import numpy as np
import pytest
import torch

from tests.support.tiny_models import tiny_config
from vlfoundry.infra.data.synthetic.scenes import KINDS, Drawing, compose, conversation
from vlfoundry.models import tokenizer as tokenizers
from vlfoundry.models.chat.examples import Example, padded
from vlfoundry.models.chat.labels import IGNORE
from vlfoundry.models.internvit.config import InternViTConfig
from vlfoundry.models.internvl.model import build
from vlfoundry.models.layers.config import DecoderConfig
from vlfoundry.models.objectives.next_token import ChatObjective
from vlfoundry.models.preprocess.normalize import normalize_uint8

pytestmark = pytest.mark.slow

SIDE_PX, SCENES, STEPS = 24, 64, 600
NAMES = {
    "en": "red apple",
    "zh": "红苹果",
    "ja": "赤いりんご",
    "ar": "تفاحة حمراء",
    "it": "mela rossa",
}


def drawing(number: int) -> Drawing:
    """A shape of its own, with a name of its own in each language."""
    rgba = np.random.default_rng(number).integers(0, 256, (9, 7, 4), np.uint8)
    rgba[..., 3] = 255
    names = {lang: f"{name} {number}" for lang, name in NAMES.items()}
    return Drawing(concept=str(number), rgba=rgba, names=names)


@pytest.mark.parametrize("kinds", [("caption",), ("caption", "colour", "box")])
def test_stage_3_learns_scenes_by_heart_and_says_them(kinds) -> None:
    assert set(kinds) <= set(KINDS)
    torch.manual_seed(0)
    scenes, asked = [], []
    for number in range(SCENES):
        lang, kind = list(NAMES)[number % len(NAMES)], kinds[number % len(kinds)]
        thing = drawing(number)
        scenes.append(compose(np.random.default_rng(number), [thing], SIDE_PX))
        names = {thing.concept: thing.names[lang]}
        asked.append(conversation(scenes[-1], kind, lang, names, box_grid=16))

    tokenizer = tokenizers.train([text for pair in asked for text in pair], 420)
    config = tiny_config(
        vision=InternViTConfig(
            width=40, depth=2, heads=5, mlp_hidden=56, patch_px=6, image_px=SIDE_PX,
            layerscale_init=1.0, position_init_std=1.0,
        ),
        text=DecoderConfig(vocab_size=420, width=32, depth=2, heads=4, mlp_hidden=72),
    )  # fmt: skip
    model = build("chat_simple", config, seed=1)
    dialogue, tokens = tokenizer.dialogue, config.visual_tokens("chat_simple")
    exchanges = [dialogue.exchange(*pair, visual_tokens=tokens) for pair in asked]
    examples = [
        Example(
            ids=prompt + answer,
            labels=[IGNORE] * len(prompt) + answer,
            tiles=1,
            pictures=lambda scene=scene: scene.image[None],
        )
        for (prompt, answer), scene in zip(exchanges, scenes, strict=True)
    ]
    made = padded(examples, tokenizer.pad_id)
    pixels = normalize_uint8(made.pop("pictures"))
    batch = {name: torch.from_numpy(value) for name, value in made.items()}
    batch |= {"pixels": pixels, "context_id": dialogue.context_id}

    objective = ChatObjective()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(STEPS):
        loss, metrics = objective(model, batch)
        if metrics["token_accuracy"] == 1 and loss < 0.05:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert metrics["token_accuracy"] == 1, metrics

    model.eval()
    prompts = [prompt for prompt, _ in exchanges]
    ids, mask = map(torch.from_numpy, tokenizers.pad(prompts, tokenizer.pad_id, left=True))
    said = model.generate(
        ids, mask, pixels, max_new_tokens=40, eos_id=dialogue.stop_id,
        context_id=dialogue.context_id,
    )  # fmt: skip
    assert [tokenizer.decode(row.tolist()).strip() for row in said] == [a for _, a in asked]
