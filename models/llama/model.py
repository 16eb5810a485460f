"""LLaMA as Megatron-Core modules: see `models.common.decoder`, which QLLaMA shares."""

from __future__ import annotations

from vlfoundry.models.common.decoder import Decoder


class Llama(Decoder):
    """RMSNorm, SwiGLU, rotary positions (rotate-half), no biases, untied head."""
