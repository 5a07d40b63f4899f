"""`fastppo demo`: a randomly initialised model learns to name the larger of two digits, in seconds.

Nothing is downloaded: the model has two layers of 64 units and a vocabulary of 13 words. Every part
is the real one: the same trainer, packer, ops and display as `fastppo train`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastppo.models.tiny import WORDS, tiny_model, word_tokenizer
from fastppo.ppo.config import PPOConfig


def larger_digit(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """1 where the reply is the answer and nothing else."""
    return [float(text.split() == [a]) for text, a in zip(completions, answer, strict=True)]


def demo(seed: int = 1, output_dir: str = "", device: str = "cpu") -> dict[str, Any]:
    """Watch a tiny randomly initialised model learn with PPO.

    Args:
        seed: of the weights and of every sample.
        output_dir: folder of the run, new or empty. Not set: runs/<date>-<time>.
        device: cpu, cuda, cuda:1 or auto; a model this small is quickest on a CPU.
    """
    from fastppo.ppo.trainer import PPOTrainer

    pairs = [(a, b) for a in range(10) for b in range(10) if a != b]
    held_out = {int(i) for i in np.random.default_rng(0).permutation(len(pairs))[:10]}
    rows = [{"prompt": f"{a} {b} >", "answer": str(max(a, b))} for a, b in pairs]
    torch.set_num_threads(1)  # a model this small is slower on several
    trainer = PPOTrainer(
        tiny_model(len(WORDS), seed),
        larger_digit,
        [row for i, row in enumerate(rows) if i not in held_out],
        PPOConfig(
            output_dir=output_dir,
            seed=seed,
            num_iterations=50,
            prompts_per_iteration=256,
            max_prompt_length=8,
            max_response_length=3,
            kl_coef=0.0,
            learning_rate=3e-3,
            ent_coef=0.03,
            update_epochs=2,
            num_minibatches=4,
            target_kl=0.1,
            sample_interval=10,
            precision="fp32",
            device=device,
        ),
        eval_dataset=[row for i, row in enumerate(rows) if i in held_out],
        processing_class=word_tokenizer(),
    )
    return trainer.train()
