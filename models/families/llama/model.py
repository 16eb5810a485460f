"""LLaMA as Megatron-Core modules: see `models.decoder.model`, which QLLaMA shares."""

from __future__ import annotations

from vlfoundry.models.decoder.model import Decoder


class Llama(Decoder):
    """RMSNorm, SwiGLU, rotary positions (rotate-half), no biases, untied head."""
