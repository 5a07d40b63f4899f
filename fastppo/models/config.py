"""What configures a model that is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastppo.options import Options, option


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Options):
    """What of a model is trained, and in which precision."""

    train_layers: int | None = option(None, "≥ 1")
    """Train only the last k transformer layers (and the final norm); unset: every parameter."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16: fp32 masters of what trains, under bf16 autocast. auto: bf16 where it is fast."""
    fp32_logits: bool = option(False, only_if='precision ≠ "fp32"')
    """Keep the head's logits in fp32 under bf16 (https://arxiv.org/abs/2506.13585)."""
    gradient_checkpointing: bool = option(False, may_differ=True)
    """Recompute activations in the backward pass: less memory, about a third more time."""


@dataclass(frozen=True, kw_only=True)
class NamedModelConfig(ModelConfig):
    """The same for the command line, where the model is named."""

    model: str = option("", required=True, may_differ=True)
    """Folder, GGUF file or hub name of a causal language model, or smollm2-135m-instruct."""
    lora_rank: int = option(0, "≥ 0")
    """Train a LoRA adapter of this rank on every linear layer instead of the weights; 0 is off."""
    lora_alpha: int = option(32, "≥ 1", only_if="lora_rank ≥ 1")
    """LoRA's scale: the update is multiplied by lora_alpha / lora_rank."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_rank and self.train_layers:
            raise ValueError("lora_rank and train_layers: LoRA freezes every layer. Set only one")
