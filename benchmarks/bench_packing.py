"""Training a decoder on texts of different lengths: padded to the longest, and packed.

A step forward and backward over the same samples, of 128 to 384 tokens (width 384, six layers) and
of short captions. Packing saves the padding and no more, so the packed line's `ratio` is to be held
against `padding_ratio`: tokens with padding over real ones.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.harness import Case, LeftOut, benchmark

if TYPE_CHECKING:
    from torch import Tensor

SEED = 5
SAMPLES = 8
LENGTHS = {"128 to 384": (128, 384), "8 to 48": (8, 48)}
VOCABULARY = 512
PACKAGES = ("torch", "megatron-core")


@benchmark("packing")
def packing() -> Iterator[Case | LeftOut]:
    """Real tokens a CPU-second on one thread."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name, (low, high) in LENGTHS.items():
        draw = np.random.default_rng(SEED)
        samples = SAMPLES * 384 // high
        lengths = draw.integers(low, high + 1, samples)
        rows = [draw.integers(12, VOCABULARY, length).tolist() for length in lengths]
        yield from _cases(name, rows)
    torch.set_num_threads(threads)


def _cases(name: str, rows: list[list[int]]) -> Iterator[Case]:
    import torch

    from vlfoundry.models.internvl.config import InternVLConfig
    from vlfoundry.models.internvl.model import build
    from vlfoundry.models.layers.config import DecoderConfig
    from vlfoundry.models.layers.packing import pack_rows
    from vlfoundry.models.objectives.next_token import TextObjective
    from vlfoundry.models.tokenizer import pad

    text = DecoderConfig(vocab_size=VOCABULARY, width=384, depth=6, heads=6, mlp_hidden=1024)
    model = build("text", InternVLConfig(text=text))
    ids, mask = map(torch.from_numpy, pad(rows, 0))
    packed_ids, cu_seqlens = pack_rows(ids, mask)

    def step(batch: "dict[str, Tensor]") -> None:
        model.zero_grad(set_to_none=True)
        loss, _ = TextObjective()(model, batch)
        loss.backward()

    tokens = int(mask.sum())
    facts = {"padding_ratio": round(mask.numel() / tokens, 3)}
    batches = {
        "padded": {"ids": ids, "mask": mask},
        "packed": {"ids": packed_ids, "cu_seqlens": cu_seqlens},
    }
    for kind, batch in batches.items():
        yield Case(
            name=f"{kind}, {name}",
            call=lambda batch=batch: step(batch),
            items=tokens,
            unit="tokens",
            packages=PACKAGES,
            against="" if kind == "padded" else f"padded, {name}",
            facts=facts,
        )
