"""The runs that bench/compare_commits.py compares: one process, the fastppo of one revision.

    python bench/compare_scenarios.py make PROJECT
    python -I bench/compare_scenarios.py PHASE SITE SOURCE PROJECT [NAME ...]

`make` writes tiny models, prompts, rewards and one TOML file for each scenario, without fastppo.
The others run scenarios in the working folder, each in a folder of its name, with the fastppo that
is installed in SITE and no other. Only public names are used, so that they run on both sides of a
move: `fastppo train` and its options, PPOConfig, PPOTrainer, PPOStep, PackedBatch.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

WORDS = ["<pad>", "<eos>", ">", *map(str, range(10))]
REWARDS = '''
import os, pathlib, signal
calls = 0

def larger(completions, answer):
    firsts = [float(text.split()[:1] == [a]) for text, a in zip(completions, answer)]
    return [first + 0.1 * len(text) for first, text in zip(firsts, completions)]

def right(completions, answer):
    return [float(a in text.split()) for text, a in zip(completions, answer)]

def some(completions, answer):
    scores = larger(completions, answer)
    return [None if len(text) % 3 == 0 else score for text, score in zip(completions, scores)]

def stopping(completions, answer):
    """Asks the run to stop at its fourth call, once."""
    global calls
    calls += 1
    if calls == 4 and not pathlib.Path("stopped").exists():
        pathlib.Path("stopped").touch()
        os.kill(os.getpid(), signal.SIGTERM)
    return larger(completions, answer)
'''
COMMON: dict[str, Any] = dict(
    num_iterations=4,
    prompts_per_iteration=12,
    max_prompt_length=8,
    max_response_length=5,
    update_epochs=2,
    num_minibatches=3,
    token_budget=16,  # two to four micro-batches in each minibatch
    learning_rate=1e-3,
    kl_coef=0.1,
    device="cpu",
    precision="fp32",
)
FILES: dict[str, Any] = dict(
    model="llama",
    dataset="prompts.jsonl",
    eval_dataset="held_out.jsonl",
    reward=["rewards.py:larger"],
    eval_interval=2,
    save_interval=2,
)
GROUPS: dict[str, Any] = dict(prompts_per_iteration=4, n_samples=3)
SEPARATE: dict[str, Any] = dict(critic="separate", critic_learning_rate=2e-3)
RESUMED = "stopped-and-resumed"
CONSTANT = ["--lr-schedule", "constant"]
PARTS = {"straight": [], "half": ["--num-iterations", "3"], "rest": ["--resume"]}
SCENARIOS: dict[str, dict[str, Any]] = {
    "gae-shared": dict(),
    "gae-separate": SEPARATE,
    "gae-value-model": dict(SEPARATE, value_model="other"),
    "gae-all-options": dict(
        **dict(critic_lambda=1.0, bootstrap_truncated=True, clip_vloss=0.2, whiten_rewards=True),
        **dict(critic_warmup=1, gamma=0.99, gae_lambda=0.9, norm_adv=False, vf_coef=0.5),
    ),
    "gae-separate-warmup": dict(SEPARATE, critic_warmup=2, loss_aggregation="seq-mean-token-mean"),
    "grpo": dict(GROUPS, advantage="grpo", loss_aggregation="seq-mean-token-mean"),
    "grpo-no-kl": dict(GROUPS, advantage="grpo", kl_coef=0.0, reward=["rewards.py:right"]),
    "dr_grpo": dict(GROUPS, advantage="dr_grpo", loss_aggregation="constant"),
    "rloo": dict(GROUPS, advantage="rloo", loss_aggregation="seq-mean-token-sum"),
    "reinforce": dict(advantage="reinforce"),
    "kl-reward-k3": dict(kl_estimator="k3"),
    "kl-loss-k2": dict(kl_in="loss", kl_estimator="k2"),
    "kl-loss-k3": dict(GROUPS, advantage="grpo", kl_in="loss", kl_estimator="k3"),
    "kl-adaptive": dict(kl_target=0.05, kl_horizon=100),
    "kl-adaptive-loss": dict(kl_target=0.05, kl_horizon=100, kl_in="loss", kl_estimator="k3"),
    "kl-ref-model": dict(ref_model="other"),
    "kl-none": dict(kl_coef=0.0),
    "target-kl": dict(update_epochs=4, target_kl=3e-3),
    "ratio-sequence": dict(GROUPS, advantage="grpo", ratio_level="sequence", clip_coef=0.01),
    "clip-entropy": dict(dual_clip=1.5, clip_coef=0.02, clip_coef_high=0.05, ent_coef=0.05),
    "tis-top-p-k": dict(is_correction="tis", is_cap=1.1, top_p=0.9, top_k=8, temperature=0.8),
    "icepop-min-p": dict(is_correction="icepop", is_low=0.9, is_high=1.1, min_p=0.05),
    "optimiser": dict(
        **dict(lr_schedule="cosine", warmup_iterations=1, weight_decay=0.1, max_grad_norm=0.1),
        **dict(adam_betas=[0.8, 0.95], adam_eps=1e-8, seed=7),
    ),
    "eos-penalty": dict(missing_eos_penalty=0.5, num_minibatches=1),
    "eos-score": dict(missing_eos_score=-1.0),
    "reward-none": dict(reward=["rewards.py:some"]),
    "reward-two": dict(reward=["rewards.py:larger", "rewards.py:right"], reward_weights=[0.5, 2.0]),
    "train-layers": dict(train_layers=1),
    "train-layers-separate": dict(SEPARATE, train_layers=1),
    "lora": dict(lora_rank=4, reference="adapter"),
    "lora-separate-bf16": dict(SEPARATE, lora_rank=4, precision="bf16"),
    "bf16": dict(precision="bf16"),
    "bf16-train-layers": dict(precision="bf16", train_layers=1),
    "bf16-fp32-logits": dict(precision="bf16", fp32_logits=True),
    "checkpointing": dict(gradient_checkpointing=True),
    "checkpointing-separate": dict(SEPARATE, gradient_checkpointing=True),
    "gpt2": dict(model="gpt2"),
    "qwen2": dict(model="qwen2"),
    "qwen3": dict(model="qwen3"),
    RESUMED: dict(
        reward=["rewards.py:stopping"], reward_workers=0, save_interval=1, lr_schedule="constant"
    ),
}


def make_project(folder: Path) -> None:
    """Tiny models with random weights, their tokenizer, prompts, rewards, a TOML per scenario."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"
    )
    ids = dict[str, Any](vocab_size=len(WORDS), pad_token_id=0, bos_token_id=None, eos_token_id=1)
    shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    llama = dict[str, Any](shape, num_key_value_heads=2, tie_word_embeddings=False)
    qwen = dict[str, Any](llama, tie_word_embeddings=True)
    gpt2 = dict[str, Any](n_embd=64, n_layer=2, n_head=4)
    for seed, (name, kind, sizes) in enumerate(
        (
            ("llama", "llama", llama),
            ("other", "llama", llama),
            ("qwen2", "qwen2", qwen),
            ("qwen3", "qwen3", dict(qwen, head_dim=16)),
            ("gpt2", "gpt2", gpt2),
        )
    ):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**ids, **sizes))
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = []
    for n in range(50):  # one to four digits
        digits = [str((7 * n + 3 * k * k) % 10) for k in range(1 + n % 4)]
        rows.append({"prompt": " ".join([*digits, ">"]), "answer": max(digits)})
    for file, chosen in (("prompts.jsonl", rows[10:]), ("held_out.jsonl", rows[:10])):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in chosen))
    (folder / "rewards.py").write_text(REWARDS)
    for name, options in SCENARIOS.items():  # a value reads the same in JSON and in TOML
        lines = [f"{k} = {json.dumps(v)}\n" for k, v in {**COMMON, **FILES, **options}.items()]
        (folder / f"{name}.toml").write_text("".join(lines))


def run_phase(phase: str, site: Path, source: Path, project: Path, only: list[str]) -> None:
    """Run the scenarios of a phase in the working folder; what fails leaves NAME.failed.

    Args:
        phase: "tiny"; "resume", what stopped in it; "full", the demo and the example; "straight",
            or the "half" of it and the "rest", with a schedule that does not look ahead.
        site: where that fastppo is installed, and the only place it may come from.
        source: the revision's files.
        project: what `make_project` made.
        only: names of scenarios; none: all of the phase.
    """
    # An editable install has a finder that comes before sys.path, and knows another fastppo.
    finders = [f for f in sys.meta_path if f is PathFinder or not f.find_spec("fastppo", None)]
    sys.meta_path[:] = finders
    sys.path.insert(0, str(site))
    import torch

    from fastppo.cli import main

    def command(*arguments: str | Path, status: int = 0) -> Callable[[Path], None]:
        def run(folder: Path) -> None:
            torch.manual_seed(0)
            if "--resume" in arguments and not list(folder.glob("checkpoints/*")):
                raise RuntimeError("no checkpoint to go on from")
            got = main([*map(str, arguments), "--output-dir", str(folder)])
            if got != status:
                raise RuntimeError(f"exit status {got}, expected {status}; see log.txt")

        return run

    def train(name: str, *arguments: str, status: int = 0) -> Callable[[Path], None]:
        return command("train", "--config", project / f"{name}.toml", *arguments, status=status)

    if phase == "resume":
        runs = {RESUMED: train(RESUMED, "--resume")}
    elif phase in PARTS:
        names = [name for name in SCENARIOS if name != RESUMED]
        runs = {name: train(name, *CONSTANT, *PARTS[phase]) for name in names}
    elif phase == "full":
        example = source / "examples" / "arithmetic.toml"
        runs = {"demo": command("demo"), "arithmetic": command("train", "--config", example)}
    else:
        runs = {name: train(name, status=143 if name == RESUMED else 0) for name in SCENARIOS}
        runs["python-trainer"] = lambda folder: trainer_alone(project, folder)
        runs["python-step"] = lambda folder: step_alone(project, folder)
    for name, run in runs.items():
        if only and name not in only:
            continue
        try:
            run(Path(name).resolve())
        except (Exception, SystemExit):  # tyro exits where an option is unknown
            Path(f"{name}.failed").write_text(traceback.format_exc())
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("fastppo", "fastppo_kernels"):
            file = Path(module.__file__ or "")
            assert file.is_relative_to(site), f"{name} comes from {file}, not from {site}"


def trainer_alone(project: Path, folder: Path) -> None:
    """PPOTrainer with objects for everything: models, tokenizer, rows, functions."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastppo import PPOConfig, PPOTrainer

    def longer(completions: list[str], **_: Any) -> list[float]:
        return [0.1 * len(text) for text in completions]

    def even(completions: list[str], **_: Any) -> list[float | None]:
        return [float(text[-1:] in "02468") if text else None for text in completions]

    lines = (project / "prompts.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    model, ref, value = (
        AutoModelForCausalLM.from_pretrained(project / name, dtype="float32")
        for name in ("llama", "llama", "other")
    )
    config = PPOConfig(**COMMON, critic="separate", eval_interval=3, output_dir=str(folder))
    tokenizer = AutoTokenizer.from_pretrained(project / "llama")
    PPOTrainer(
        model,
        [longer, even],
        rows,
        config,
        eval_dataset=rows[:7],
        ref_model=ref,
        value_model=value,
        processing_class=tokenizer,
        reward_weights=[1.0, 0.5],
    ).train()


def step_alone(project: Path, folder: Path) -> None:
    """PPOStep in a loop of its own, on token ids made by hand."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from fastppo import PackedBatch, PPOConfig, PPOStep

    model = AutoModelForCausalLM.from_pretrained(project / "llama", dtype="float32")
    step = PPOStep(model, PPOConfig(**COMMON))
    rows, tensors = [], {}
    for i in range(3):
        prompts = [[3 + (i + n + k) % 10 for k in range(1 + n % 4)] + [2] for n in range(12)]
        responses = [[3 + (i * n + 5 * k) % 10 for k in range(1 + n % 5)] for n in range(12)]
        batch = PackedBatch.pack(prompts, responses, truncated=[n % 5 == 4 for n in range(12)])
        batch = step.evaluate(batch)
        batch = step.advantages(batch, [0.3 * ((n + i) % 4) for n in range(12)])
        rows.append({"iteration": i + 1, **step.update(batch)})
        for name in ("old_logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns"):
            tensors[f"{name}.{i}"] = getattr(batch, name).contiguous()
    after = step.evaluate(batch)  # says what the critic learned
    tensors |= {f"{name}.after": getattr(after, name) for name in ("old_logprobs", "values")}
    (folder / "model").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parameters = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    save_file(parameters | tensors, folder / "model" / "step.safetensors")
    assert torch.get_num_threads() == 1


if __name__ == "__main__":
    chosen, *places = sys.argv[1:]
    if chosen == "make":
        make_project(Path(places[0]))
    else:
        site, source, project = map(Path, places[:3])
        run_phase(chosen, site, source, project, places[3:])
