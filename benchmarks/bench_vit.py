"""A training step of a vision transformer beside timm's and transformers', on one thread.

Equal maths: the same weights (each peer says how far its tokens are from ours), tokens, loss and
AdamW. The limit is torch.mm of 1024^3 at the step's FLOPs, so the ratio to it is MFU(CPU).
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from benchmarks.harness import Case, LeftOut, benchmark

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vlfoundry.models.internvit.config import InternViTConfig

# At 2 our optimizer, which does not shrink with the tokens, is a tenth of the masked step.
BATCH = 4
REPETITIONS = 9
LEARNING_RATE = 1e-4
GEMM_SIDE = 1024
GEMMS = 16
LIMIT = "limit: torch.mm"
OURS = "ours"


@benchmark("vit")
def vit() -> Iterator[Case | LeftOut | tuple[Case, ...]]:
    """Pictures a CPU-second at width 384, depth 6, 257 tokens."""
    import torch

    from vlfoundry.models.internvit.config import InternViTConfig

    config = InternViTConfig(
        width=384, depth=6, heads=6, mlp_hidden=1536, patch_px=14, image_px=224, norm="layer",
        qkv_bias=True, qk_norm=False, layerscale_init=1.0,
    )  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield from _in_turns(config)
    torch.set_num_threads(threads)


def _in_turns(config: "InternViTConfig") -> Iterator[LeftOut | tuple[Case, ...]]:
    import torch

    from vlfoundry.infra.backend.adam import CpuFusedAdam
    from vlfoundry.infra.train.mfu import counted_flops

    model, official = _ours(config)
    pixels = torch.randn(BATCH, 3, config.image_px, config.image_px)
    with torch.no_grad():
        wanted = model(pixels)
    flops = counted_flops(model, lambda model, batch: (_loss(model(batch)), {}), pixels) / BATCH
    peers = []
    for name, make in (("timm", _timm), ("transformers", _transformers)):
        if importlib.util.find_spec(name) is None:
            yield LeftOut(name=name, reason=f"{name} is not installed; `make bench LOCK=bench`")
            continue
        encode, peer = make(config, official)
        with torch.no_grad():
            apart = float((encode(pixels) - wanted).abs().max() / wanted.abs().max())
        case = _case(name, encode, torch.optim.AdamW(peer.parameters(), fused=True), pixels)
        facts = {"tokens_apart": float(f"{apart:.2g}")}
        peers.append(dataclasses.replace(case, facts=facts, packages=("torch", name)))
    kept = torch.stack([torch.randperm(config.patches)[: config.patches // 2] for _ in pixels])
    optimizer = CpuFusedAdam(model.parameters())
    limit = _limit(flops)
    names = (limit.name, *(peer.name for peer in peers))
    ours = _case(OURS, model, optimizer, pixels)
    masked = _case("ours, FLIP 50 %", lambda pixels: model(pixels, kept), optimizer, pixels)
    yield (
        limit,
        *peers,
        dataclasses.replace(ours, ratios_to=names, facts={"flops_per_image": flops}),
        dataclasses.replace(masked, against=OURS),
    )


def _ours(config: "InternViTConfig") -> tuple["nn.Module", Mapping[str, "Tensor"]]:
    """Our encoder, and its weights under their official names."""
    from vlfoundry.infra.train.weights import gather_weights
    from vlfoundry.models.internvit.hf import keys
    from vlfoundry.models.internvit.model import InternViT
    from vlfoundry.models.layers.canonical import initialise
    from vlfoundry.models.official.keymap import split_all

    model = InternViT(config)
    initialise(model, seed=0)
    weights = gather_weights(model)
    assert weights is not None, "this process is a rank of several"
    return model, split_all(keys(config), weights)


def _case(
    name: str, encode: Callable[["Tensor"], "Tensor"], optimizer: Any, pixels: "Tensor"
) -> Case:
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE

    def step() -> None:
        optimizer.zero_grad()
        _loss(encode(pixels)).backward()
        optimizer.step()

    return Case(
        name=name, call=step, items=len(pixels), unit="images", packages=("torch", "megatron-core"),
        repetitions=REPETITIONS,
    )  # fmt: skip


def _loss(tokens: "Tensor") -> "Tensor":
    return tokens.square().mean()


def _limit(flops_per_image: float) -> Case:
    import torch

    a, b = torch.ones(GEMM_SIDE, GEMM_SIDE), torch.ones(GEMM_SIDE, GEMM_SIDE)
    out = torch.mm(a, b)

    def call() -> None:
        for _ in range(GEMMS):
            torch.mm(a, b, out=out)

    return Case(
        name=LIMIT, call=call, items=GEMMS * 2 * GEMM_SIDE**3 / flops_per_image, unit="images",
        packages=("torch",), repetitions=REPETITIONS,
    )  # fmt: skip


def _timm(
    config: "InternViTConfig", official: Mapping[str, "Tensor"]
) -> tuple[Callable[["Tensor"], "Tensor"], "nn.Module"]:
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=config.image_px, patch_size=config.patch_px, embed_dim=config.width,
        depth=config.depth, num_heads=config.heads, mlp_ratio=config.mlp_hidden / config.width,
        init_values=config.layerscale_init, num_classes=0, global_pool="", final_norm=False,
    )  # fmt: skip
    names = {
        "embeddings.class_embedding": "cls_token",
        "embeddings.position_embedding": "pos_embed",
        "embeddings.patch_embedding.": "patch_embed.proj.",
        "encoder.layers.": "blocks.",
    }
    weights = {}
    for name, tensor in official.items():
        start = next(start for start in names if name.startswith(start))
        renamed = names[start] + name.removeprefix(start)
        weights[renamed + ".gamma" if renamed.endswith((".ls1", ".ls2")) else renamed] = tensor
    model.load_state_dict(weights)
    return model.forward_features, model


def _transformers(
    config: "InternViTConfig", official: Mapping[str, "Tensor"]
) -> tuple[Callable[["Tensor"], "Tensor"], "nn.Module"]:
    from transformers import InternVLVisionConfig, InternVLVisionModel

    model = InternVLVisionModel(
        InternVLVisionConfig(
            hidden_size=config.width, num_hidden_layers=config.depth,
            num_attention_heads=config.heads, intermediate_size=config.mlp_hidden,
            norm_type="layer_norm", attention_bias=True, image_size=[config.image_px] * 2,
            patch_size=[config.patch_px] * 2, layer_norm_eps=config.eps,
            layer_scale_init_value=config.layerscale_init,
        )
    )  # fmt: skip
    names = {
        "embeddings.class_embedding": "embeddings.cls_token",
        "embeddings.position_embedding": "embeddings.position_embeddings",
        "embeddings.patch_embedding": "embeddings.patch_embeddings.projection",
        "encoder.layers": "encoder.layer",
        ".norm1": ".layernorm_before",
        ".norm2": ".layernorm_after",
        ".ls1": ".lambda_1",
        ".ls2": ".lambda_2",
        ".attn.proj": ".attention.projection_layer",
    }
    weights = {}
    for name, tensor in official.items():
        for theirs, here in names.items():
            name = name.replace(theirs, here)
        if ".attn.qkv." in name:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                weights[name.replace(".attn.qkv.", f".attention.{part}_proj.")] = rows
        else:
            weights[name] = tensor
    model.load_state_dict(weights)
    return lambda pixels: model(pixels).last_hidden_state, model
