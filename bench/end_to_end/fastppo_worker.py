"""fastppo's PPOTrainer on a workload, one iteration at a time; or on the tensors of TRL's.

    python fastppo_worker.py WORKLOAD separate|shared
    python fastppo_worker.py WORKLOAD check TENSORS

An iteration is `PPOTrainer.iterate`, with a separate critic or a value head on the policy's trunk.
`check` takes prompts and responses from TENSORS, which trl_worker.py wrote, and says how far log-
probabilities, values, rewards, advantages, losses and the weights after the update are from TRL's.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from workload import Counter, Worker, Workload, force_end

from fastppo import PackedBatch, PPOConfig, PPOTrainer, __version__, ops
from fastppo.models.loading import load_model, load_tokenizer
from fastppo.models.packed import PackedModel
from fastppo.ppo.state import Iteration
from fastppo.rewards import RewardModel, load_reward_func
from fastppo.rollout.sampler import Sampler
from fastppo.training import interrupts
from fastppo.training.metrics import PhaseTimer

PHASES = {"rollout": ("rollout",), "evaluation": ("reward", "pack", "evaluate", "advantages")}
PHASES |= {"update": ("update",)}

REWARDS = Path(__file__).parents[2] / "examples" / "rewards.py"
REWARD_TOKENS = 512
"""Padded tokens in one pass of the reward model: rows of similar lengths share one."""


def make_trainer(folder: Path, work: Workload, critic: str) -> tuple[PPOTrainer, RewardModel]:
    """The trainer with a sequence classifier as the reward and as the critic's beginning."""
    policy, reward_folder = str(folder / "policy"), folder / "reward"
    config = PPOConfig(
        output_dir=str(folder / f"fastppo-{critic}"),
        seed=work.seed,
        prompts_per_iteration=work.episodes,
        max_prompt_length=max(work.prompt_lengths),
        max_response_length=work.max_response_length,
        temperature=work.temperature,
        kl_coef=work.kl_coef,
        clip_coef=work.clip,
        clip_vloss=work.clip_value,
        vf_coef=work.vf_coef,
        gamma=work.gamma,
        gae_lambda=work.gae_lambda,
        critic="separate" if critic == "separate" else "shared",
        update_epochs=work.epochs,
        num_minibatches=work.minibatches,
        learning_rate=work.learning_rate,
        lr_schedule="constant",
        adam_eps=work.adam_eps,
        train_layers=work.train_layers,
        missing_eos_penalty=work.missing_eos_penalty,
        max_grad_norm=0.0,  # TRL's PPOTrainer never clips
        precision="bf16" if work.precision == "bf16" else "fp32",
        device=work.device,
    )
    value = None
    if critic == "separate" and work.answers is None:
        value = transformers.AutoModelForSequenceClassification.from_pretrained(
            reward_folder, dtype=torch.float32, attn_implementation="sdpa"
        )
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    low = torch.bfloat16 if work.precision == "bf16" else torch.float32
    reward = RewardModel(
        reward_folder, tokenizer, device=work.device, dtype=low, token_budget=REWARD_TOKENS
    )
    data: list[dict[str, Any]] = [{"prompt": text} for text in work.prompts]
    for row, answer in zip(data, work.answers or (), strict=False):
        row["answer"] = answer
    trainer = PPOTrainer(
        load_model(policy).float(),
        reward if work.answers is None else load_reward_func(f"{REWARDS}:exact_number"),
        data,
        config,
        value_model=value,
        processing_class=tokenizer,
    )
    return trainer, reward


def count_heads(counter: Counter) -> None:
    """Count the rows that reach the output head, which here is not a module but an operand."""
    scored, lost, sampled = ops.linear_logprobs, ops.linear_ppo_loss, PackedModel.next_logits

    def linear_logprobs(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        counter.add("heads", len(hidden))
        return scored(hidden, *args, **kwargs)

    def linear_ppo_loss(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        counter.add("heads", len(hidden))
        return lost(hidden, *args, **kwargs)

    def next_logits(self: PackedModel, *args: Any, **kwargs: Any) -> Tensor:
        logits = sampled(self, *args, **kwargs)
        counter.add("policy head", len(logits))
        return logits

    ops.linear_logprobs, ops.linear_ppo_loss = linear_logprobs, linear_ppo_loss
    PackedModel.next_logits = next_logits


def force_lengths(work: Workload) -> None:
    """Have the sampler draw responses of the workload's lengths."""
    draw = Sampler.__call__

    def forced(self: Sampler, logits: Tensor, rows: Tensor, step: int) -> tuple[Tensor, Tensor]:
        return draw(self, force_end(work, logits, rows, step), rows, step)

    Sampler.__call__ = forced


def iterate(folder: Path, work: Workload, critic: str) -> None:
    """Iterate until told to end."""
    worker, counter = Worker(), Counter()
    trainer, reward = make_trainer(folder, work, critic)
    policy = trainer.policy
    if work.stop == "forced":
        force_lengths(work)
    counter.watch("policy", policy.actor.model.base_model)
    counter.watch("reference", policy.reference.model.base_model)
    if policy.critic is not None:
        counter.watch("critic", policy.critic.model.base_model)
    if work.answers is None:
        counter.watch("reward", reward.load().base_model)
    count_heads(counter)
    cpu = PhaseTimer(clock=time.process_time)
    timer = PhaseTimer(synchronize=trainer.step.device.type == "cuda", mark=cpu)
    versions = {"fastppo": __version__, "transformers": transformers.__version__}
    worker.say(versions=versions | {"torch": torch.__version__})
    number = 0
    with trainer.rewards, interrupts.handled():
        while worker.wait():
            number += 1
            counter.take()
            trainer.current = Iteration()
            row, _ = trainer.iterate(number, timer)
            used = cpu.take()
            assert trainer.current.batch is not None
            worker.say(
                reward=row["reward"],
                seconds={
                    name: [sum(x[f"seconds_{part}"] for part in parts) for x in (row, used)]
                    for name, parts in PHASES.items()
                },
                tokens=counter.take(),
                real=trainer.current.batch.num_tokens,
            )


def check(folder: Path, work: Workload, tensors: Path) -> None:
    """Send the largest differences from TRL's tensors."""
    worker = Worker()
    theirs = load_file(tensors)
    trainer, reward = make_trainer(folder, work, "separate")
    step = trainer.step
    model, critic = step.policy.actor.model, step.policy.critic.model
    before = {f"policy.{k}": v.cpu().clone() for k, v in model.state_dict().items()}
    before |= {f"value.{k}": v.cpu().clone() for k, v in critic.state_dict().items()}
    prompts = [row[row != work.pad_token_id].numpy() for row in theirs["queries"]]
    responses = [row.numpy() for row in theirs["responses"]]
    scores = [
        reward.load()(input_ids=torch.tensor([*p, *r], device=work.device)[None]).logits
        for p, r in zip(prompts, responses, strict=True)
    ]
    batch = PackedBatch.pack(prompts, responses, truncated=[True] * len(prompts))
    batch = step.advantages(step.evaluate(batch), theirs["scores"])
    metrics = step.update(batch)
    after = {f"policy.{k}": v.cpu() for k, v in model.state_dict().items()}
    after |= {f"value.{k}": v.cpu() for k, v in critic.state_dict().items()}
    # the critic's score is a head of its own here, which starts from it
    moved = [k for k in before if k in theirs and k != "value.score.weight"]
    ours, wanted = (torch.cat([(w[k] - before[k]).ravel() for k in moved]) for w in (after, theirs))
    pairs = {
        "log-probabilities, in nats": (batch.old_logprobs, theirs["logprobs"]),
        "reference log-probabilities, in nats": (batch.ref_logprobs, theirs["ref_logprobs"]),
        "values": (batch.values, theirs["values"]),
        "reward model's scores": (torch.cat(scores), theirs["scores"]),
        "rewards per token": (batch.rewards, theirs["rewards"]),
        "whitened advantages": (batch.advantages, theirs["advantages"]),
        "returns": (batch.returns, theirs["returns"]),
        "policy loss": (torch.tensor(metrics["policy_loss"]), theirs["pg_loss_stats"]),
        "value loss": (torch.tensor(metrics["value_loss"]), theirs["vf_loss_stats"]),
    }
    gaps = {
        name: float((a.cpu().ravel() - b.ravel()).abs().max()) for name, (a, b) in pairs.items()
    }
    gaps["change of all weights, relative"] = float((ours - wanted).norm() / wanted.norm())
    worker.say(gaps=gaps, tokens=batch.num_tokens, changed=float((wanted != 0).float().mean()))


def main(folder: Path, what: str, tensors: Path | None = None) -> None:
    """Run what the command line asks for."""
    work = Workload.load(folder)
    if tensors is not None:
        check(folder, work, tensors)
    else:
        iterate(folder, work, what)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *map(Path, sys.argv[3:]))
