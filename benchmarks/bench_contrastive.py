"""Contrastive losses, forwards and backwards on one thread, beside open_clip's.

Ours say how far their gradients are from the peer's, relative to the largest entry. The cases named
"memory" run in a process of their own and say how far its resident memory rose above the inputs.
"""

import ctypes
import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import Case, LeftOut, benchmark

WIDTH = 768
SIZES = (2048, 4096)
MEMORY_SIZES = (2048, 4096, 8192, 16384, 32768)
TEMPERATURE = 0.07
SIGLIP_BIAS = -10.0
SIGLIP_SCALE = 10.0
PACKAGES = ("torch",)
PEER = "open_clip_torch"


@benchmark("contrastive")
def contrastive() -> Iterator[Case | LeftOut | tuple[Case, ...]]:
    """Pairs of a picture and a caption a CPU-second."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for size in SIZES:
        yield from _beside_peer(size)
    for size in MEMORY_SIZES:
        yield _memory(size)
    torch.set_num_threads(threads)


def _beside_peer(size: int) -> Iterator[LeftOut | tuple[Case, ...]]:
    leaves = _leaves(size)

    def case(name: str, loss: Callable[..., Any], **more: Any) -> Case:
        return Case(
            name=f"{name}, {size}",
            call=lambda: _gradients(loss, leaves),
            items=size,
            unit="pairs",
            packages=more.pop("packages", PACKAGES),
            **more,
        )

    if importlib.util.find_spec("open_clip") is None:
        reason = "open_clip_torch is not installed; `make bench LOCK=bench`"
        yield LeftOut(name=f"open_clip softmax and sigmoid, {size}", reason=reason)
        yield (case("ours softmax", _softmax), case("ours sigmoid", _sigmoid))
        return
    softmax, sigmoid = _open_clip()
    peers = (
        case("open_clip softmax", softmax, packages=(*PACKAGES, PEER)),
        case("open_clip sigmoid", sigmoid, packages=(*PACKAGES, PEER)),
    )
    yield (
        *peers,
        case(
            "ours softmax", _softmax, against=peers[0].name, facts=_apart(_softmax, softmax, leaves)
        ),
        case(
            "ours sigmoid", _sigmoid, against=peers[1].name, ratios_to=(peers[0].name,),
            facts=_apart(_sigmoid, sigmoid, leaves),
        ),
    )  # fmt: skip


def _leaves(size: int) -> tuple:
    """Unit embeddings [size, WIDTH] of pictures and of captions like them."""
    import torch
    from torch.nn.functional import normalize

    generator = torch.Generator().manual_seed(size)
    images = normalize(torch.randn(size, WIDTH, generator=generator), dim=1)
    texts = normalize(images + 0.1 * torch.randn(size, WIDTH, generator=generator), dim=1)
    return images.requires_grad_(), texts.requires_grad_()


def _softmax(images: Any, texts: Any) -> Any:
    import torch

    from vlfoundry.models.objectives.contrastive import ContrastiveConfig, info_nce

    scale = torch.tensor(1 / TEMPERATURE).log()
    return info_nce(images, texts, scale, ContrastiveConfig())[0]


def _sigmoid(images: Any, texts: Any) -> Any:
    import torch

    from vlfoundry.models.objectives.contrastive import sigmoid_loss

    return sigmoid_loss(images, texts, torch.tensor(SIGLIP_SCALE).log(), torch.tensor(SIGLIP_BIAS))


def _open_clip() -> tuple[Callable[..., Any], Callable[..., Any]]:
    import torch
    from open_clip.loss import ClipLoss, SigLipLoss

    softmax, sigmoid = ClipLoss(), SigLipLoss()
    scale, bias = torch.tensor(SIGLIP_SCALE), torch.tensor(SIGLIP_BIAS)
    return (
        lambda images, texts: softmax(images, texts, torch.tensor(1 / TEMPERATURE)),
        lambda images, texts: sigmoid(images, texts, scale, bias),
    )


def _gradients(loss: Callable[..., Any], leaves: tuple) -> tuple:
    import torch

    return torch.autograd.grad(loss(*leaves), leaves)


def _apart(ours: Callable[..., Any], theirs: Callable[..., Any], leaves: tuple) -> dict[str, Any]:
    pairs = zip(_gradients(ours, leaves), _gradients(theirs, leaves), strict=True)
    apart = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    return {"gradients_apart": float(f"{apart:.2g}")}


def _memory(size: int) -> Case:
    from vlfoundry.infra.launch.launchers.fork import run_ranks

    facts: dict[str, Any] = {"four_inputs_mib": round(4 * size * WIDTH * 4 / 2**20, 1)}

    def call() -> None:
        facts["peak_mib"] = round(run_ranks(_peak_mib, size, ranks=1)[0], 1)

    return Case(
        name=f"ours softmax, memory, {size}", call=call, items=size, unit="pairs",
        packages=PACKAGES, repetitions=1, warm_up=False, facts=facts,
    )  # fmt: skip


def _peak_mib(size: int) -> float:
    from vlfoundry.models.objectives.tiled import TILE_COLUMNS

    leaves = _leaves(size)
    # What a fork has not touched yet, or the parent freed, is no memory of the loss.
    _gradients(_softmax, _leaves(2 * TILE_COLUMNS))
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what we hold
    before = _status_mib("VmRSS")
    _gradients(_softmax, leaves)
    return _status_mib("VmHWM") - before


def _status_mib(name: str) -> float:
    status = Path("/proc/self/status").read_text("utf-8")
    found = re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)
    assert found is not None, f"/proc/self/status has no {name}"
    return int(found[1]) / 1024
