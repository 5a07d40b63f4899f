"""`fastppo doctor`: what is installed, and the checks of step 0 on the user's own model.

Before the first update every one of these is known exactly: the ratio is 1, the KL to the
reference is 0, no log-probability is positive, a packed forward is the unpacked one, and every op
is its reference. A run that starts from anything else trains on noise.
"""

from __future__ import annotations

import importlib.metadata
import platform
import tempfile
from dataclasses import dataclass
from typing import Any, Literal

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from fastppo import __version__, ops
from fastppo.models import setup
from fastppo.models.loading import eos_token_ids, find_model, load_model, load_tokenizer
from fastppo.ppo.config import PPOConfig
from fastppo.ppo.experience import PackedBatch
from fastppo.ppo.start import TOLERANCE
from fastppo.ppo.step import PPOStep
from fastppo.reporting.formatting import visible
from fastppo.reporting.terminal import stdout_console
from fastppo.rollout.engine import Sampling
from fastppo.rollout.packed import PackedEngine
from fastppo.training.device import describe, resolve_device, resolve_precision

PACKAGES = ("torch", "transformers", "triton", "numpy", "safetensors", "tyro", "rich")
EXTRAS = ("flash-attn", "peft", "datasets", "pyarrow", "gguf", "tensorboard", "wandb", "trackio")
PROMPTS = ("Hi", "What is 3 + 4?", "Name a colour of the rainbow, and why you like it.", "1 2 3")


@dataclass(frozen=True)
class Check:
    """One line of the report: what was measured against what it may be."""

    name: str
    measured: float
    limit: float
    unit: str

    @property
    def ok(self) -> bool:
        return self.measured <= self.limit


def doctor(
    model: str = "", device: str = "auto", precision: Literal["auto", "fp32", "bf16"] = "auto"
) -> int:
    """Check this machine and, where one is named, a model.

    Args:
        model: folder, GGUF file or hub name; empty: smollm2-135m-instruct where it is installed,
            else a tiny random one.
        device: cuda, cpu or auto.
        precision: fp32, bf16 or auto.

    Returns:
        The process's exit status: 0 where every check passed, 1 otherwise.
    """
    console = stdout_console()
    where = resolve_device(device)
    console.print(_environment(where, resolve_precision(precision, where)))
    config = PPOConfig(device=device, precision=resolve_precision(precision, where))
    loaded, prompts, eos, name = _subject(model)
    step = PPOStep(loaded, config)
    checks = [*step_checks(step, prompts, eos), *op_checks(step.device)]
    table = Table(title=visible(f"step 0 of {name}"), title_justify="left")
    for column in ("check", "measured", "limit", ""):
        table.add_column(column)
    for check in checks:
        mark = Text("ok", style="green") if check.ok else Text("FAILED", style="red")
        limit = f"{check.limit:.2g} {check.unit}"
        table.add_row(check.name, f"{check.measured:.2g}", limit, mark)
    console.print(table)
    failed = [check.name for check in checks if not check.ok]
    verdict = f"{len(failed)} of {len(checks)} checks failed" if failed else "all checks passed"
    console.print(verdict)
    return 1 if failed else 0


def _environment(device: torch.device, precision: str) -> Table:
    table = Table(title=f"fastppo {__version__}", title_justify="left", show_header=False)
    table.add_row("python", platform.python_version())
    table.add_row("device", f"{describe(device)}, {precision}")
    for package in (*PACKAGES, *EXTRAS):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed" + (" (optional)" if package in EXTRAS else "")
        table.add_row(package, version)
    return table


def _subject(name: str) -> tuple[Any, list[list[int]], tuple[int, ...], str]:
    """Model, tokenised prompts, end tokens and display name."""
    if not name:
        try:
            find_model("smollm2-135m-instruct")
            name = "smollm2-135m-instruct"
        except ValueError:
            from fastppo.models.tiny import tiny_model

            model = tiny_model(vocab_size=64, seed=0)
            return model, [[3], [4, 5, 6], list(range(7, 20)), [8, 9]], (1,), "a tiny random model"
    tokenizer = load_tokenizer(name)
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    model = load_model(name)
    return model, prompts, eos_token_ids(model, tokenizer), name


def step_checks(step: PPOStep, prompts: list[list[int]], eos: tuple[int, ...]) -> list[Check]:
    """Sample from the model and check what must hold before the first update."""
    broken = sum(int((~p.isfinite()).sum()) for p in step.policy.actor.model.parameters())
    finite = Check("weights are finite", float(broken), 0.0, "values")
    size = setup.vocabulary(step.policy.actor.model)
    beyond = sum(token >= size for ids in [*prompts, eos] for token in ids)
    known = Check("tokens are in the vocabulary", float(beyond), 0.0, "beyond")
    if not (finite.ok and known.ok):
        return [finite, known]  # nothing can be sampled
    limit = TOLERANCE[step.precision]
    sampling = Sampling(temperature=1.0, max_new_tokens=16, eos_token_ids=eos, seed=0)
    ids = [torch.tensor(p, dtype=torch.int32).numpy() for p in prompts]
    rollouts = PackedEngine(step.policy.actor).generate(ids, sampling)
    batch = PackedBatch.pack(
        ids, rollouts.responses, rollout_logprobs=rollouts.logprobs, truncated=rollouts.truncated
    )
    together = step.evaluate(batch)
    order = list(reversed(range(batch.num_sequences)))
    again = step.evaluate(batch.select(order)).select(order)
    alone = [step.evaluate(batch.select([i])).old_logprobs for i in range(batch.num_sequences)]
    lone = [logprobs for logprobs in alone if logprobs is not None]
    old, ref, rollout = together.old_logprobs, together.ref_logprobs, together.rollout_logprobs
    assert old is not None and ref is not None and rollout is not None
    return [
        finite,
        known,
        Check("log-probabilities ≤ 0", float(old.max()), 0.0, "nats"),
        Check("ratio = 1 in any order", _gap(again.old_logprobs, old), limit, "nats"),
        Check("KL to the reference = 0", _gap(ref, old), limit, "nats"),
        Check("packed = one sequence at a time", _gap(torch.cat(lone), old), limit, "nats"),
        Check("packed = transformers' own", _gap(_own_forward(step, batch), old), limit, "nats"),
        Check("sampler = trainer", _gap(rollout.to(old.device), old), limit, "nats"),
        Check("saved and loaded = the model", _saved(step), 0.0, "differ"),
    ]


def _saved(step: PPOStep) -> float:
    """1 where the model, saved and loaded again, is another one, which is then explained."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            step.policy.save(folder)
        except ValueError as error:
            print(error)
            return 1.0
    return 0.0


def _own_forward(step: PPOStep, batch: PackedBatch) -> Tensor:
    """(N,) log-probabilities from the model's own attention, one unpacked sequence at a time."""
    found = []
    with step.policy.actor.unpacked() as model, torch.no_grad(), step.policy.actor.autocast():
        for i in range(batch.num_sequences):
            one = batch.select([i]).to(step.device)
            logits = model(input_ids=one.input_ids.long()[None]).logits[0]
            logprobs = torch.log_softmax(logits[one.rows.long()].float(), dim=-1)
            found.append(logprobs.gather(1, one.targets.long()[:, None])[:, 0])
    return torch.cat(found)


def op_checks(device: torch.device) -> list[Check]:
    """Each op against its float64 reference on random data with an awkward vocabulary."""
    rng = torch.Generator().manual_seed(0)
    n, h, v = 37, 24, 1003

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng).to(device)

    hidden, weight = draw(n, h), draw(v, h)
    targets = torch.randint(v, (n,), generator=rng).to(device)
    exact = ops.token_logprobs_reference(hidden.double() @ weight.double().T, targets)
    fused = ops.linear_logprobs(hidden, weight, targets)
    cu = torch.tensor([0, 5, 5, 20, n], dtype=torch.int32, device=device)
    rewards, values = draw(n), draw(n)
    scan = ops.gae(rewards, values, cu, gamma=0.99, gae_lambda=0.95)
    loop = ops.gae_reference(rewards.double(), values.double(), cu, gamma=0.99, gae_lambda=0.95)
    loss = PPOConfig(kl_coef=0.0).loss
    old, advantages = fused.logprobs + 0.1 * draw(n), draw(n)
    weights = torch.full((n,), 1.0 / n, device=device)
    one = ops.linear_ppo_loss(hidden, weight, targets, old, advantages, weights, loss).loss
    two = ops.ppo_loss_reference(
        exact.logprobs, old.double(), advantages.double(), weights.double(), loss
    ).loss
    return [
        Check("linear_logprobs = reference", _gap(fused.logprobs, exact.logprobs), 1e-4, "nats"),
        Check("entropy = reference", _gap(fused.entropy, exact.entropy), 1e-4, "nats"),
        Check("linear_ppo_loss = reference", _gap(one, two), 1e-4, ""),
        Check("gae = reference", _gap(scan.advantages, loop.advantages), 1e-4, ""),
    ]


def _gap(a: Tensor | None, b: Tensor) -> float:
    """Largest absolute difference; infinite where a value is not a number."""
    assert a is not None
    gap = (a.double() - b.double()).abs().max()
    return float(gap.nan_to_num(nan=float("inf")))
