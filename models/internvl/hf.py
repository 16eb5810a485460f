"""Official InternVL weights (InternVL-14B, InternVL-Chat, its LLaVA form) to ours and back."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from vlfoundry.infra.core.errors import ConfigError, ModelError
from vlfoundry.infra.core.givenfiles import shown
from vlfoundry.models.connector.config import ConnectorConfig
from vlfoundry.models.decoder.hf_keys import decoder_keys
from vlfoundry.models.decoder.official import rope_parameters
from vlfoundry.models.families import (
    families,
    family_of,
    family_of_official,
    read_official,
    write_official,
)
from vlfoundry.models.internvit import hf as vision_hf
from vlfoundry.models.internvit.config import InternViTConfig
from vlfoundry.models.internvl.config import InternVLConfig
from vlfoundry.models.internvl.hf_pictures import (
    NATIVE_PICTURES,
    pictures_from_llava,
    pictures_from_official,
    pictures_to_llava,
    pictures_to_official,
)
from vlfoundry.models.layers.config import DecoderConfig, LoraConfig
from vlfoundry.models.official.configs import (
    CHAT,
    CROSS_ATTENTION_FREQUENCY,
    DUAL,
    LAYERS,
    LLAVA,
    NATIVE,
    NATIVE_VISION,
)
from vlfoundry.models.official.fields import read, require_multiple, size, wrong
from vlfoundry.models.official.keymap import Key, join_all, one, prefixed, renamed
from vlfoundry.models.qllama.config import QLlamaConfig

if TYPE_CHECKING:
    from torch import Tensor


def config_from_official(config: Mapping) -> InternVLConfig:
    """`config.json` of an InternVL-14B (`qllama_config`) or an InternVL-Chat (`llm_config`).

    Raises:
        ConfigError: an option is not built here, or a field has a value that it cannot have; names
            the field with its part ("llm_config.hidden_size").
    """
    return _dual(config) if "qllama_config" in config else _chat(config)


def _dual(config: Mapping) -> InternVLConfig:
    said = read(config, DUAL)
    _refuse_lora(config)
    qllama = said["qllama_config"]
    text = read_official(qllama, "qllama_config", name="llama")
    vision = vision_hf.config_from_official(said["vision_config"] or {}, "vision_config")
    if said["force_image_size"]:
        # The class makes its position embedding of this size, whatever the tower's config says.
        _require_patches(config, said, vision)
        vision = dataclasses.replace(vision, image_px=said["force_image_size"])
    frequency = said["cross_attention_frequency"] or qllama.get("cross_attention_frequency")
    if frequency is not None and not size(most=LAYERS).fits(frequency):
        raise wrong(qllama, "qllama_config", "cross_attention_frequency", frequency, "a number")
    for part, width in (("vision_config", vision.width), ("qllama_config", text.width)):
        if width % said["attn_pool_num_heads"]:
            expected = f"a divisor of {part}.hidden_size = {width}"
            raise wrong(config, "", "attn_pool_num_heads", said["attn_pool_num_heads"], expected)
    return InternVLConfig(
        vision=vision,
        text=text,
        queries=QLlamaConfig(
            num_queries=said["num_query_token"],
            cross_attention_frequency=frequency or CROSS_ATTENTION_FREQUENCY,
        ),
        embed_dim=said["clip_embed_dim"],
        pool_heads=said["attn_pool_num_heads"],
    )


def _chat(config: Mapping) -> InternVLConfig:
    said = read(config, CHAT)
    language = read_official(said["llm_config"], "llm_config")
    _require_row(config, said, "img_context_token_id", "llm_config", language)
    vision = vision_hf.config_from_official(said["vision_config"] or {}, "vision_config")
    if said["force_image_size"] not in (None, vision.image_px):
        raise wrong(
            config, "", "force_image_size", said["force_image_size"],
            f"vision_config.image_size = {vision.image_px} or null: the position embedding is not "
            "made for another size here",
        )  # fmt: skip
    return InternVLConfig(
        vision=dataclasses.replace(vision, lora=_lora(said["use_backbone_lora"])),
        language=dataclasses.replace(language, lora=_lora(said["use_llm_lora"])),
        connector=_connector(config, said, vision, "select_layer", ps_version=said["ps_version"]),
        pictures=pictures_from_official(config),
    )


def _connector(
    config: Mapping, said: Mapping, vision: InternViTConfig, layer: str, *, ps_version: Any
) -> ConnectorConfig:
    """The pixel shuffle of a chat model, as far as the vision tower allows it."""
    ratio = said["downsample_ratio"]
    side = round(1 / ratio)
    if abs(side * ratio - 1) > 1e-3:
        expected = "1 divided by a whole number, such as 0.5"
        raise wrong(config, "", "downsample_ratio", ratio, expected)
    grid = vision.image_px // vision.patch_px
    if grid % side:
        expected = f"1 divided by a divisor of the {grid} x {grid} grid of patches"
        raise wrong(config, "", "downsample_ratio", ratio, expected)
    _require_layer(config, said, vision, layer)
    return ConnectorConfig(
        kind="pixel_shuffle", ps_version=ps_version, select_layer=said[layer], shuffle_side=side
    )


def _require_row(
    config: Mapping, said: Mapping, name: str, part: str, language: DecoderConfig
) -> None:
    """A token has a row of the embedding matrix. A default that has none is not looked at."""
    if config.get(name) is not None and said[name] >= language.vocab_size:
        expected = f"an id below {part}.vocab_size = {language.vocab_size}"
        raise wrong(config, "", name, said[name], expected)


def _require_layer(config: Mapping, said: Mapping, vision: InternViTConfig, name: str) -> None:
    if not -vision.depth - 1 <= said[name] <= vision.depth:
        expected = (
            f"a number from {-vision.depth - 1} to {vision.depth}, for the vision tower has "
            f"{vision.depth} layers"
        )
        raise wrong(config, "", name, said[name], expected)


def _require_patches(config: Mapping, said: Mapping, vision: InternViTConfig) -> None:
    if said["force_image_size"] % vision.patch_px:
        expected = f"a multiple of vision_config.patch_size = {vision.patch_px}"
        raise wrong(config, "", "force_image_size", said["force_image_size"], expected)


LORA_RANKS = ("use_backbone_lora", "use_llm_lora", "use_qllama_lora")
"""fields of a `config.json` with the ranks of adapters that are not merged yet; 0: none"""


def _lora(rank: int | None) -> LoraConfig | None:
    """What the official chat class makes of a rank: all linears, and an alpha of twice the rank."""
    return LoraConfig(rank=rank, alpha=2.0 * rank) if rank else None


def _refuse_lora(config: Mapping) -> None:
    ranks = {name: config[name] for name in LORA_RANKS if config.get(name)}
    if ranks:
        raise ConfigError(
            f"{shown(ranks)}: the adapters of an InternVL-14B have another alpha in the official "
            "fine-tuning than in the official model class, so what they add is not known; "
            "merge them with the code that they were trained with"
        )


def config_to_official(config: InternVLConfig, kind: str) -> dict[str, Any]:
    """The inverse of `config_from_official`: of the same file for "internvl_c" and "internvl_g"."""
    vision = vision_hf.config_to_official(config.vision)
    if kind == "vision":
        return vision
    if kind in ("internvl_c", "internvl_g"):
        _require_llama(config.text, "text tower", "InternVL-14B's form")
        queries = {
            "num_query_token": config.queries.num_queries,
            "cross_attention_frequency": config.queries.cross_attention_frequency,
        }
        return {
            "architectures": ["InternVLModel"],
            "model_type": "internvl",
            "vision_config": vision,
            "qllama_config": write_official(in_llama_form(config.text)) | queries,
            "hidden_size": config.text.width,
            "num_query_token": config.queries.num_queries,
            "clip_embed_dim": config.embed_dim,
            "attn_pool_num_heads": config.pool_heads,
        }
    assert kind == "chat_simple", kind
    return {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "vision_config": vision,
        "llm_config": write_official(config.chat),
        "ps_version": config.connector.ps_version,
        "select_layer": config.connector.select_layer,
        "downsample_ratio": 1 / config.connector.shuffle_side,
        "force_image_size": config.vision.image_px,
        **pictures_to_official(config.pictures),
    }


_NATIVE_VISION = {
    # Fields of transformers' vision config, and the official ones.
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "norm_type": "norm_type",
    "attention_bias": "qkv_bias",
    "use_qk_norm": "qk_normalization",
    "layer_scale_init_value": "initializer_factor",
    "layer_norm_eps": "layer_norm_eps",
    "hidden_act": "hidden_act",
}
NATIVE_QK_EPS = 1e-6
"""of the norms of q and k in transformers' vision tower, whatever its config says"""


def config_from_native(config: Mapping) -> InternVLConfig:
    """`config.json` of transformers' own `internvl` as ours.

    Raises:
        ConfigError: as `config_from_official`.
    """
    said = read(config, NATIVE)
    facts, text = said["vision_config"] or {}, said["text_config"]
    tower = read(facts, NATIVE_VISION, "vision_config")
    require_multiple(facts, tower, "vision_config", "hidden_size", "num_attention_heads")
    sides = {name: _side(tower[name]) for name in ("patch_size", "image_size")}
    require_multiple(facts, sides, "vision_config", "image_size", "patch_size")
    if tower["use_qk_norm"] and tower["layer_norm_eps"] != NATIVE_QK_EPS:
        raise wrong(
            facts, "vision_config", "layer_norm_eps", tower["layer_norm_eps"],
            f"{NATIVE_QK_EPS}: the norms of q and k (use_qk_norm) have it there, and ours have one "
            "eps for all",
        )  # fmt: skip
    official = {theirs: tower[name] for name, theirs in _NATIVE_VISION.items()}
    official["model_type"] = "intern_vit_6b"
    vision = vision_hf.config_from_official(official | sides, "vision_config")
    family = family_of_official(text, "text_config", default="qwen2")
    if text.get("model_type") not in (None, "", family.name):
        # transformers goes by the type, the official chat models by the class.
        expected = f"{family.name}, as its architectures say"
        raise wrong(text, "text_config", "model_type", text["model_type"], expected)
    if not family.in_transformers:
        known = " or ".join(f.name for f in families().values() if f.in_transformers)
        raise wrong(text, "text_config", "model_type", family.name, known)
    language = read_official(text, "text_config", name=family.name)
    _require_row(config, said, "image_token_id", "text_config", language)
    return InternVLConfig(
        vision=vision,
        language=dataclasses.replace(language, tied_head=_is_tied(config, said)),
        connector=_connector(config, said, vision, "vision_feature_layer", ps_version="v2"),
        pictures=pictures_from_official(NATIVE_PICTURES),
    )


def _is_tied(config: Mapping, said: Mapping) -> bool:
    """The head is in the outer class; transformers 4 asks the language model's config."""
    if "tie_word_embeddings" in config or "tie_word_embeddings" not in said["text_config"]:
        return said["tie_word_embeddings"]
    return said["text_config"]["tie_word_embeddings"]


def _side(sides: int | list[int]) -> int:
    return sides[0] if isinstance(sides, list) else sides


def config_to_native(config: InternVLConfig, image_token_id: int) -> dict[str, Any]:
    """The inverse of `config_from_native`.

    Raises:
        ModelError: transformers' own class computes something else; the message says what.
    """
    if config.connector.ps_version != "v2":
        raise ModelError(
            f"the pixel shuffle is {config.connector.ps_version!r}; transformers' own internvl has "
            "'v2' alone and would see every image transposed"
        )
    if config.vision.qk_norm and config.vision.eps != NATIVE_QK_EPS:
        raise ModelError(
            f"the vision tower's eps is {config.vision.eps}; transformers' own internvl has "
            f"{NATIVE_QK_EPS} in the norms of q and k"
        )
    language = in_llama_form(config.chat)
    official = config_to_official(config, "chat_simple")
    vision = {name: official["vision_config"][theirs] for name, theirs in _NATIVE_VISION.items()}
    sides = {name: [official["vision_config"][name]] * 2 for name in ("patch_size", "image_size")}
    text = write_official(language)
    del text["rope_theta"], text["rope_scaling"]
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "vision_config": vision | sides | {"model_type": "internvl_vision"},
        "text_config": text | {"rope_parameters": rope_parameters(language)},
        "image_token_id": image_token_id,
        "image_seq_length": config.visual_tokens("chat_simple"),
        "downsample_ratio": official["downsample_ratio"],
        "projector_hidden_act": "gelu",
        "vision_feature_layer": config.connector.select_layer,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": language.tied_head,
    }


TOWER = "vision_tower_config"
"""what we add to a LLaVA-style config.json: the config.json of the folder that `mm_vision_tower`
names, without which the file says nothing of the vision tower or QLLaMA"""


def config_from_llava(config: Mapping) -> InternVLConfig:
    """`config.json` of an InternVL-Chat 1.0 in LLaVA's form, with QLLaMA (`two_mlp`) or without.

    Raises:
        ConfigError: its connector, or the tokens it takes, are of another kind; or what the vision
            tower is, is not known.
    """
    said = read(config, LLAVA)
    if TOWER not in config:
        raise ConfigError(
            "config.json says nothing of the vision tower but its name, "
            f"{shown(said['mm_vision_tower'])}; give the config.json of that with --tower-config"
        )
    language, tower = read_official(config, name="llama"), config[TOWER]
    if said["mm_projector_type"] == "two_mlp":
        try:
            whole = _dual(tower)
        except ConfigError as error:
            raise ConfigError(f"{TOWER}: {error}") from None
    else:
        whole = InternVLConfig(vision=vision_hf.config_from_official(tower, TOWER))
    _require_layer(config, said, whole.vision, "mm_vision_select_layer")
    connector = ConnectorConfig(kind="mlp2x", select_layer=said["mm_vision_select_layer"])
    return dataclasses.replace(
        whole, language=language, connector=connector, pictures=pictures_from_llava(config)
    )


def config_to_llava(config: InternVLConfig, kind: str) -> dict[str, Any]:
    """The inverse of `config_from_llava`, for "chat_simple" or "chat_full"."""
    full = kind == "chat_full"
    return write_official(in_llama_form(config.chat)) | {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        # The official code tells the towers apart by what stands in this name.
        "mm_vision_tower": "OpenGVLab/InternVL-14B" if full else "OpenGVLab/InternViT-6B",
        TOWER: config_to_official(config, "internvl_g" if full else "vision"),
        "mm_projector_type": "two_mlp" if full else "mlp2x_gelu",
        "mm_hidden_size": config.text.width if full else config.vision.width,
        "mm_vision_select_layer": config.connector.select_layer,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        **pictures_to_llava(config.pictures),
    }


KINDS = ("vision", "internvl_c", "internvl_g", "chat_simple")
"""configurations that `keys` knows official names for"""


def keys(config: InternVLConfig, kind: str) -> Iterator[Key]:
    """Official names and shapes of a configuration, and the canonical ones.

    "vision" is an InternViT alone; "internvl_g" an InternVL-14B and "internvl_c" that without
    QLLaMA's own parts; "chat_simple" an InternVL-Chat.

    Raises:
        ModelError: no official format holds that configuration.
    """
    if kind == "vision":
        return prefixed(vision_hf.keys(config.vision), ours="vision.")
    if kind in ("internvl_c", "internvl_g"):
        return _dual_keys(config, with_queries=kind == "internvl_g")
    if kind == "chat_simple":
        return _chat_keys(config, family_of(config.chat).keys(config.chat))
    raise ModelError(f"no official table of names is for a {kind}; there are those of {KINDS}")


def llava_keys(config: InternVLConfig, kind: str) -> Iterator[Key]:
    """As `keys` of "chat_simple" or "chat_full", by the names of LLaVA (InternVL-Chat 1.0).

    Raises:
        ModelError: LLaVA's form cannot hold the connector or the language model.
    """
    if config.connector.kind != "mlp2x":
        raise ModelError(
            f"the connector is of kind {config.connector.kind!r}; LLaVA's form has 'mlp2x' alone"
        )
    _require_llama(config.chat, "language model", "LLaVA's form")
    if kind == "chat_full":
        _require_llama(config.text, "text tower", "LLaVA's form")
    return _llava_keys(config, with_queries=kind == "chat_full")


def _require_llama(config: DecoderConfig, part: str, form: str) -> None:
    family = family_of(in_llama_form(config)).name
    if family != "llama":
        raise ModelError(f"the {part} is of the family {family}; {form} has a LLaMA")


def in_llama_form(config: DecoderConfig) -> DecoderConfig:
    """The same decoder where LLaMA's and Qwen2's names are all there are."""
    return dataclasses.replace(config, names="llama")


def from_official(
    weights: Mapping[str, Tensor], config: InternVLConfig, kind: str
) -> dict[str, Tensor]:
    """Canonical tensors of a configuration from official ones, which may hold more."""
    return join_all(keys(config, kind), weights)


_NATIVE = (
    # Patterns of official names, tried in this order, and what transformers' own InternVL has.
    (r"^vision_model\.encoder\.layers\.(\d+)\.attn\.proj\.",
     r"vision_tower.encoder.layer.\1.attention.projection_layer."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.attn\.",
     r"vision_tower.encoder.layer.\1.attention."),
    (r"^vision_model\.encoder\.layers\.", "vision_tower.encoder.layer."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.ls([12])$", r".lambda_\1"),
    (r"^vision_model\.embeddings\.class_embedding$", "vision_tower.embeddings.cls_token"),
    (r"^vision_model\.embeddings\.position_embedding$",
     "vision_tower.embeddings.position_embeddings"),
    (r"^vision_model\.embeddings\.patch_embedding\.",
     "vision_tower.embeddings.patch_embeddings.projection."),
    (r"^mlp1\.0\.", "multi_modal_projector.layer_norm."),
    (r"^mlp1\.1\.", "multi_modal_projector.linear_1."),
    (r"^mlp1\.3\.", "multi_modal_projector.linear_2."),
    (r"^language_model\.model\.", "language_model."),
)  # fmt: skip


def native_keys(config: InternVLConfig) -> Iterator[Key]:
    """As `keys` of a chat model, by the names of transformers' own `internvl`.

    It has q, k and v of the vision tower apart, and an InternLM2 as a LLaMA.
    """
    for key in _chat_keys(config, decoder_keys(config.chat)):
        if key.blocks > 1:
            ((name, (rows, *rest)),) = key.theirs
            parts = [(name.replace("qkv", f"{p}_proj"), (rows // 3, *rest)) for p in "qkv"]
            key = dataclasses.replace(key, theirs=tuple(parts), blocks=1)
        yield from renamed([key], _native_name)


def saved_name(native: str) -> str:
    """What `save_pretrained` of transformers calls a tensor of its own `internvl`.

    A model that was made from a config, or loaded from such a file, is saved by these names (since
    4.52), and one that was loaded by the names of the class by those.
    """
    for pattern, saved in (
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
    ):
        native = re.sub(pattern, saved, native)
    return native


def base_name(native: str) -> str:
    """As `saved_name`, of `InternVLModel`, which is all but the head."""
    return native.removeprefix("model.")


_TIMM = (
    # Patterns of official names, and what the timm-style PyTorch files have.
    (r"^vision_model\.", ""),
    (r"^qllama\.model\.", "transformer."),
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.position_embedding$", "pos_embed"),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^encoder\.layers\.", "blocks."),
    (r"\.ls([12])$", r".ls\1.gamma"),
)


def timm_keys(config: InternVLConfig, kind: str) -> Iterator[Key]:
    """As `keys` of "vision" or "internvl_c", by the names of the timm-style PyTorch files."""
    return renamed(keys(config, kind), _timm_name)


def _timm_name(official: str) -> str:
    for pattern, timm in _TIMM:
        official = re.sub(pattern, timm, official)
    return official


def _native_name(official: str) -> str:
    if official.startswith("language_model.lm_head."):
        return official.removeprefix("language_model.")
    for pattern, native in _NATIVE:
        official = re.sub(pattern, native, official)
    return f"model.{official}"


def _dual_keys(config: InternVLConfig, *, with_queries: bool) -> Iterator[Key]:
    yield from prefixed(vision_hf.keys(config.vision), ours="vision.", theirs="vision_model.")
    if with_queries:
        yield from _qllama_keys(config, head=True)
    else:
        yield from prefixed(decoder_keys(config.text, head=False), ours="text.", theirs="qllama.")
    width = config.text.width
    yield one("text_projection", (width, config.embed_dim), "text_projection")
    yield one("logit_scale", (), "logit_scale")
    yield from _pool_keys("clip_projector.", config.vision.width, config.embed_dim)
    if with_queries:
        yield from _pool_keys("clip_projector2.", width, config.embed_dim)
        yield one("itm_head.weight", (2, width), "itm_head.weight")
        yield one("itm_head.bias", (2,), "itm_head.bias")


def _qllama_keys(config: InternVLConfig, *, head: bool) -> Iterator[Key]:
    text = decoder_keys(
        config.text,
        head=head,
        cross_every=config.queries.cross_attention_frequency,
        vision_width=config.vision.width,
    )
    yield from prefixed(text, ours="text.", theirs="qllama.")
    shape = (config.queries.num_queries, config.text.width)
    yield one("text.query_tokens", shape, "query_tokens", (1, *shape))


def _chat_keys(config: InternVLConfig, language: Iterable[Key]) -> Iterator[Key]:
    if config.connector.kind != "pixel_shuffle":
        raise ModelError(
            f"the connector is of kind {config.connector.kind!r}; InternVL-Chat's and "
            "transformers' own format have 'pixel_shuffle' alone"
        )
    yield from prefixed(vision_hf.keys(config.vision), ours="vision.", theirs="vision_model.")
    yield from prefixed(language, ours="language.", theirs="language_model.")
    merged = config.vision.width * config.connector.merge**2
    yield one("connector.norm.weight", (merged,), "mlp1.0.weight")
    yield one("connector.norm.bias", (merged,), "mlp1.0.bias")
    yield from _mlp_keys("connector.", "mlp1.", ("1", "3"), merged, config.chat.width)


LLAVA_TOWER = "model.vision_tower.vision_tower."
"""in front of the names of the vision tower, or of all of InternVL-14B that Chat full uses"""


def _llava_keys(config: InternVLConfig, *, with_queries: bool) -> Iterator[Key]:
    inner = f"{LLAVA_TOWER}vision_model." if with_queries else LLAVA_TOWER
    mlp = "model.mm_projector.mlp1." if with_queries else "model.mm_projector."
    yield from prefixed(vision_hf.keys(config.vision), ours="vision.", theirs=inner)
    yield from prefixed(decoder_keys(config.chat), ours="language.")
    sizes = (config.vision.width, config.chat.width)
    yield from _mlp_keys("connector.", mlp, ("0", "2"), *sizes)
    if with_queries:
        yield from prefixed(_qllama_keys(config, head=False), theirs=LLAVA_TOWER)
        sizes = (config.text.width, config.chat.width)
        yield from _mlp_keys("query_connector.", "model.mm_projector.mlp2.", ("0", "2"), *sizes)


def _mlp_keys(
    ours: str, theirs: str, numbers: tuple[str, str], inner: int, width: int
) -> Iterator[Key]:
    """Two linear layers, by their places in a sequence of modules."""
    for name, number, columns in (("linear1", numbers[0], inner), ("linear2", numbers[1], width)):
        yield one(f"{ours}{name}.weight", (width, columns), f"{theirs}{number}.weight")
        yield one(f"{ours}{name}.bias", (width,), f"{theirs}{number}.bias")


def _pool_keys(prefix: str, width: int, out_width: int) -> Iterator[Key]:
    found = []
    for part in "qkv":
        for leaf in ("weight", "bias"):
            found.append(one(f"norm_{part}.{leaf}", (width,), f"norm1_{part}.{leaf}"))
        found.append(one(f"linear_{part}.weight", (width, width), f"cross_attn.{part}.weight"))
        found.append(one(f"linear_{part}.bias", (width,), f"cross_attn.{part}_bias"))
    found.append(one("linear_proj.weight", (out_width, width), "cross_attn.proj.weight"))
    found.append(one("linear_proj.bias", (out_width,), "cross_attn.proj.bias"))
    return prefixed(found, ours=prefix, theirs=prefix)
