"""What configures the prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastppo.options import Options, option


@dataclass(frozen=True, kw_only=True)
class DataConfig(Options):
    """How long a prompt may be."""

    max_prompt_length: int = option(512, "≥ 1")
    """Longest prompt, in tokens. Prompts are never cut: see `overlong_prompts`."""
    overlong_prompts: Literal["error", "filter"] = "error"
    """Prompts over the limit are refused, or filtered out with a count."""


@dataclass(frozen=True, kw_only=True)
class NamedDataConfig(DataConfig):
    """The same for the command line, where the data is named."""

    dataset: str = option("", required=True, may_differ=True)
    """Prompts with a `prompt` column: .jsonl, .csv, .parquet, or a datasets folder#split."""
    eval_dataset: str = option("", may_differ=True)
    """Held-out prompts for the greedy evaluation before and after training."""
