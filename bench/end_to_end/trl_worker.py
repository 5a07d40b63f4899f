"""TRL 1.12.0's PPOTrainer on a workload, one iteration at a time.

    python trl_worker.py WORKLOAD [TENSORS]

Nothing of TRL is changed. Its loop has no seam between iterations but the callbacks, so the worker
waits in `on_step_end`. Phases are told apart by when TRL calls its own `batch_generation` and its
first `forward` with gradients. With bf16 the frozen models are in bf16 and the update is under
autocast; sampling and values stay fp32, as PPOTrainer runs them outside of accelerate's autocast.
With TENSORS the loop's own tensors of the first iteration, and the weights after it, are written
there.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from text_reward import TextReward
from torch import Tensor
from workload import Counter, Worker, Workload, force_end, synchronize

KEPT = ("queries", "responses", "scores", "logprobs", "ref_logprobs", "values", "rewards")
KEPT += ("advantages", "returns", "pg_loss_stats", "vf_loss_stats", "padding_mask")


class EndError(Exception):
    """No iteration is asked for any more."""


def make_trainer(folder: Path, work: Workload, callback: Any) -> Any:
    """The trainer, as TRL's own example makes it."""
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", padding_side="left")
    causal, classifier = AutoModelForCausalLM, AutoModelForSequenceClassification
    low = torch.bfloat16 if work.precision == "bf16" else torch.float32
    policy, ref, value, reward = (
        auto.from_pretrained(folder / name, dtype=dtype, attn_implementation="sdpa")
        for auto, name, dtype in (
            (causal, "policy", torch.float32),
            (causal, "policy", low),
            (classifier, "reward", torch.float32),
            (classifier, "reward", low),
        )
    )
    if work.answers is not None:
        reward = TextReward(work, tokenizer)
        value.score.weight.data.zero_()
    if work.train_layers is not None:
        for model in (policy, value):
            model.requires_grad_(False)
            model.model.layers[-work.train_layers :].requires_grad_(True)
            model.model.norm.requires_grad_(True)
        value.score.requires_grad_(True)
    size = work.episodes
    args = PPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=size,
        num_mini_batches=work.minibatches,
        num_ppo_epochs=work.epochs,
        local_rollout_forward_batch_size=size,
        total_episodes=size * 10_000,
        response_length=work.max_response_length,
        stop_token_id=None if work.stop == "never" else work.eos_token_id,
        missing_eos_penalty=work.missing_eos_penalty or None,
        temperature=work.temperature,
        kl_coef=work.kl_coef,
        cliprange=work.clip,
        cliprange_value=work.clip_value,
        vf_coef=work.vf_coef,
        gamma=work.gamma,
        lam=work.gae_lambda,
        learning_rate=work.learning_rate,
        lr_scheduler_type="constant",
        adam_epsilon=work.adam_eps,
        gradient_checkpointing=False,
        bf16=work.precision == "bf16",
        use_cpu=work.device == "cpu",
        num_sample_generations=0,
        report_to="none",
        save_strategy="no",
        seed=work.seed,
    )
    data = Dataset.from_list([{"input_ids": tokenizer(text)["input_ids"]} for text in work.prompts])
    return PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=policy,
        ref_model=ref,
        reward_model=reward,
        value_model=value,
        train_dataset=data,
        eval_dataset=data,
        callbacks=[callback],
    )


def force_lengths(model: Any, work: Workload) -> None:
    """Have `model.generate` sample responses of the workload's lengths."""
    from transformers import LogitsProcessor, LogitsProcessorList

    generate = model.generate

    def forced(*, input_ids: Tensor, **options: Any) -> Any:
        rows, context = torch.arange(len(input_ids), device=input_ids.device), input_ids.shape[1]

        class ForcedLengths(LogitsProcessor):
            def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
                return force_end(work, scores, rows, input_ids.shape[1] - context)

        processors = LogitsProcessorList([ForcedLengths()])
        return generate(input_ids=input_ids, logits_processor=processors, **options)

    model.generate = forced


class Phases:
    """When the phases of the iteration under way began."""

    def __init__(self) -> None:
        from trl.experimental.ppo import ppo_trainer

        self.marks: list[tuple[float, float]] = []
        generation, forward = ppo_trainer.batch_generation, ppo_trainer.forward

        def timed_generation(*args: Any, **kwargs: Any) -> Any:
            found = generation(*args, **kwargs)
            self.mark()
            return found

        def timed_forward(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled() and len(self.marks) == 2:
                self.mark()
            return forward(*args, **kwargs)

        ppo_trainer.batch_generation, ppo_trainer.forward = timed_generation, timed_forward

    def mark(self) -> None:
        """A phase begins."""
        synchronize()
        self.marks.append((time.perf_counter(), time.process_time()))

    def seconds(self) -> dict[str, tuple[float, float]]:
        """Wall and CPU seconds of each phase, once the fourth mark is set."""
        names = ("rollout", "evaluation", "update")
        return {
            name: (end[0] - start[0], end[1] - start[1])
            for name, start, end in zip(names, self.marks, self.marks[1:], strict=False)
        }


def loop_locals() -> dict[str, Any]:
    """The variables of the PPOTrainer.train that called us."""
    frame = sys._getframe()
    while frame is not None and not (
        frame.f_code.co_name == "train" and frame.f_globals["__name__"].endswith("ppo_trainer")
    ):
        frame = frame.f_back
    assert frame is not None, "PPOTrainer.train is not on the stack"
    return frame.f_locals


def main(folder: Path, tensors: Path | None) -> None:
    """Iterate until told to end."""
    work = Workload.load(folder)
    if work.precision == "bf16":
        # transformers 5 no longer sets it from bf16=True, and PPOTrainer does not pass it on
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    import transformers
    import trl
    from transformers import TrainerCallback

    worker, counter, phases = Worker(), Counter(), Phases()

    def begin() -> None:
        if not worker.wait():
            raise EndError
        counter.take()
        phases.marks.clear()
        phases.mark()

    class Stepper(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            versions = {"trl": trl.__version__, "transformers": transformers.__version__}
            worker.say(versions=versions | {"torch": torch.__version__})
            begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            phases.mark()
            found = loop_locals()
            if tensors is not None:
                kept = {name: found[name].contiguous() for name in KEPT}
                weights = {f"policy.{k}": v for k, v in policy.state_dict().items()}
                weights |= {f"value.{k}": v for k, v in value.state_dict().items()}
                save_file({k: v.clone() for k, v in {**kept, **weights}.items()}, tensors)
            reward = trainer.reward_model
            given = reward.latest if isinstance(reward, TextReward) else found["scores"]
            worker.say(
                reward=float(given.mean()),
                seconds=phases.seconds(),
                tokens=counter.take(),
                real=int((found["queries"] != work.pad_token_id).sum())
                + int((~found["padding_mask"]).sum()),
            )
            begin()

    trainer = make_trainer(folder, work, Stepper())
    policy, value = trainer.policy_model, trainer.value_model
    if work.stop == "forced":
        force_lengths(policy, work)
    counter.watch("policy", policy.model, policy.lm_head)
    counter.watch("reference", trainer.ref_model.model, trainer.ref_model.lm_head)
    counter.watch("critic", value.model)
    if work.answers is None:
        counter.watch("reward", trainer.reward_model.model)
    with contextlib.suppress(EndError):
        trainer.train()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
