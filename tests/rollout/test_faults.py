"""Rollouts under faults: out of memory, logits that are no numbers, interruptions."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from fastppo.models import kv_cache
from fastppo.models.kv_cache import KVCache
from fastppo.models.packed import PackedModel
from fastppo.ppo.experience import PackedBatch
from fastppo.rollout.engine import Rollouts, Sampling
from fastppo.rollout.packed import PackedEngine
from fastppo.training import interrupts

VOCAB, STEPS = 53, 8
NAN, INF = float("nan"), float("inf")


def make_policy(**options: Any) -> PackedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,  # far from uniform
    )
    model: Any = AutoModelForCausalLM.from_config(config)
    return PackedModel(model, **options)


def make_prompts() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, VOCAB, n) for n in (7, 2, 3, 12, 5, 9)]


def sampling(**options: Any) -> Sampling:
    defaults: dict[str, Any] = {"max_new_tokens": STEPS, "eos_token_ids": ()}
    return Sampling(**(defaults | {"seed": 7} | options))


def expected(**options: Any) -> Rollouts:
    return PackedEngine(make_policy()).generate(make_prompts(), sampling(**options))


def assert_same(a: Rollouts, b: Rollouts, rows: list[int] | None = None) -> None:
    for row in rows if rows is not None else range(len(a.responses)):
        assert a.responses[row].tolist() == b.responses[row].tolist()
        np.testing.assert_allclose(a.logprobs[row], b.logprobs[row], atol=1e-5, rtol=0)


@contextlib.contextmanager
def hooked(
    policy: PackedModel,
    act: Callable[[int, int, Tensor], Tensor | None],
    module: nn.Module | None = None,
) -> Iterator[None]:
    """Inside, `act(step, rows, output)` may change what `module` returns, or else the logits; the
    steps of a pass count up, the first being the one over the prompts."""
    next_logits, step, rows = policy.next_logits, 0, 0

    def counted(ids: Tensor, cache: KVCache, **boundaries: Any) -> Tensor:
        nonlocal step, rows
        step, rows = step + 1 if cache.decoding else 0, len(cache.last)
        logits = next_logits(ids, cache, **boundaries)
        changed = None if module is not None else act(step, rows, logits)
        return logits if changed is None else changed

    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor | None:
        return act(step, rows, output)

    policy.next_logits = counted  # type: ignore[method-assign]
    handle = None if module is None else module.register_forward_hook(hook)
    try:
        yield
    finally:
        del policy.next_logits
        if handle is not None:
            handle.remove()


class Memory:
    """A hook on the embeddings that has room for `rows` rows from decoding step `step` on."""

    def __init__(self, rows: int, step: int = 0) -> None:
        self.rows, self.step = rows, step
        self.passes: list[int] = []  # rows of each
        self.failed: weakref.ref[Tensor] | None = None
        self.error: type[RuntimeError] = torch.OutOfMemoryError

    def __call__(self, step: int, rows: int, embedded: Tensor) -> None:
        if step == 0:
            self.passes.append(rows)
            assert self.failed is None or self.failed() is None, "a failed pass is still in memory"
        if step >= self.step and rows > self.rows:
            self.failed = weakref.ref(embedded)
            raise self.error(f"no memory for {rows} rows")


# memory


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize(
    ("room", "passes", "limit"),
    [(6, [6], None), (4, [6, 3, 3], 3), (2, [6, 3, 1, 1, 1, 1, 1, 1], 1)],
)
def test_out_of_memory_halves_the_rows_and_changes_nothing(
    room: int, passes: list[int], limit: int | None, step: int
) -> None:
    policy = make_policy()
    engine, memory = PackedEngine(policy), Memory(room, step)
    with hooked(policy, memory, policy.model.get_input_embeddings()):
        assert_same(engine.generate(make_prompts(), sampling()), expected())
        assert memory.passes == passes and engine.max_rows == limit
        memory.passes.clear()
        assert_same(engine.generate(make_prompts(), sampling()), expected())
        assert sum(memory.passes) == 6  # the limit found is kept: nothing fails again


def test_a_pass_that_fails_late_keeps_the_ones_before_it() -> None:
    policy = make_policy()
    engine, memory = PackedEngine(policy, max_rows=4), Memory(4)

    def shrink(step: int, rows: int, embedded: Tensor) -> None:
        memory.rows = 4 if rows == 4 else 1
        memory(step, rows, embedded)

    with hooked(policy, shrink, policy.model.get_input_embeddings()):
        assert_same(engine.generate(make_prompts(), sampling()), expected())
    assert memory.passes == [4, 2, 1, 1] and engine.max_rows == 1


def test_one_row_that_does_not_fit_is_the_original_error() -> None:
    policy = make_policy()
    engine, memory = PackedEngine(policy), Memory(0)
    with (
        hooked(policy, memory, policy.model.get_input_embeddings()),
        pytest.raises(torch.OutOfMemoryError, match="no memory for 1 rows"),
    ):
        engine.generate(make_prompts(), sampling())
    assert memory.passes == [6, 3, 1] and engine.max_rows == 1
    assert_same(engine.generate(make_prompts(), sampling()), expected())


def test_other_errors_are_not_tried_again() -> None:
    policy = make_policy()
    memory = Memory(4)
    memory.error = RuntimeError
    engine = PackedEngine(policy)
    with (
        hooked(policy, memory, policy.model.get_input_embeddings()),
        pytest.raises(RuntimeError, match="no memory for 6 rows"),
    ):
        engine.generate(make_prompts(), sampling())
    assert memory.passes == [6] and engine.max_rows is None


# 64 rows of 200k logits are 51 MB an array and several of them are alive at a time: with 120 MB to
# spare they cannot be had, a quarter of the rows can.
LITTLE_MEMORY = """
import resource
import numpy as np, torch
from transformers import AutoModelForCausalLM, LlamaConfig
from fastppo.models.packed import PackedModel
from fastppo.rollout.engine import Sampling
from fastppo.rollout.packed import PackedEngine

torch.manual_seed(0)
config = LlamaConfig(vocab_size=200_000, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                     intermediate_size=16, max_position_embeddings=32, initializer_range=0.3)
policy = PackedModel(AutoModelForCausalLM.from_config(config))
prompts = [np.array([3 + row, 4]) for row in range(64)]
sampling = Sampling(max_new_tokens=2, eos_token_ids=(), seed=1)
whole = PackedEngine(policy).generate(prompts, sampling)
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 120 * 2**20,) * 2)
engine = PackedEngine(policy)
split = engine.generate(prompts, sampling)
assert all(np.array_equal(a, b) for a, b in zip(whole.responses, split.responses)), "other samples"
print(engine.max_rows)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS and /proc")
def test_a_process_with_little_memory_gets_through() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LITTLE_MEMORY], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) in (8, 16, 32)


# logits that are no numbers


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 5, "top_p": 0.9}], ids=str)
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("entries", [slice(None), slice(VOCAB - 1, VOCAB)], ids=["all", "last"])
def test_a_row_without_finite_logits_is_flagged_and_harms_no_other(
    options: dict[str, Any], value: float, entries: slice
) -> None:
    policy = make_policy()

    def spoil(step: int, _: int, logits: Tensor) -> Tensor:
        if step == 3:
            logits[[1, 4], entries] = value
        return logits

    with hooked(policy, spoil):
        rollouts = PackedEngine(policy).generate(make_prompts(), sampling(**options))
    assert rollouts.finite.tolist() == [True, False, True, True, False, True]
    assert rollouts.finite.dtype == bool
    for row in (1, 4):
        assert np.isnan(rollouts.logprobs[row]).tolist() == [step == 3 for step in range(STEPS)]
        assert len(rollouts.responses[row]) == STEPS
        assert ((rollouts.responses[row] >= 0) & (rollouts.responses[row] < VOCAB)).all()
    clean = expected(**options)
    assert clean.finite.all()
    assert_same(rollouts, clean, [0, 2, 3, 5])


def test_hidden_states_that_are_nan_stay_in_their_row() -> None:
    """The key-value cache of that row is NaN from then on."""
    policy = make_policy()

    def spoil(step: int, _: int, hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        if step == 2:
            hidden[0, 1] = NAN
        return hidden

    with hooked(policy, spoil, policy.model.get_input_embeddings()):
        rollouts = PackedEngine(policy).generate(make_prompts(), sampling())
    assert rollouts.finite.tolist() == [True, False, True, True, True, True]
    assert np.isnan(rollouts.logprobs[1]).tolist() == [False] * 2 + [True] * (STEPS - 2)
    assert_same(rollouts, expected(), [0, 2, 3, 4, 5])


@pytest.mark.parametrize("spoiled", [0, 5], ids=["dropped", "moved"])
def test_a_row_that_is_nan_harms_none_that_takes_its_place(
    spoiled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 0 ends, the last one alive moves into its place, and the cache grows."""
    monkeypatch.setattr(kv_cache, "_ROOM", 1)
    policy, prompts, options = make_policy(), make_prompts(), {"max_new_tokens": 20}
    token = sum(map(len, prompts[:spoiled]))  # the first of its prompt

    def spoil(step: int, _: int, hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        if step == 0:
            hidden[0, token] = NAN
        return hidden

    with hooked(policy, spoil, policy.model.get_input_embeddings()):
        free = PackedEngine(policy).generate(prompts, sampling(**options))
        options |= {"eos_token_ids": (int(free.responses[0][3]),)}
        rollouts = PackedEngine(policy).generate(prompts, sampling(**options))
    assert len(rollouts.responses[0]) <= 4 and len(rollouts.responses[1]) == 20
    assert rollouts.finite.tolist() == [row != spoiled for row in range(6)]
    assert np.isnan(rollouts.logprobs[spoiled]).all()
    assert_same(rollouts, expected(**options), [row for row in range(6) if row != spoiled])


def test_masked_vocabulary_is_finite_and_never_drawn() -> None:
    policy = make_policy()

    def mask(_: int, __: int, logits: Tensor) -> Tensor:
        logits[:, ::2] = -INF
        return logits

    with hooked(policy, mask):
        rollouts = PackedEngine(policy).generate(make_prompts() * 20, sampling())
    assert rollouts.finite.all()
    assert set(np.concatenate(rollouts.responses).tolist()) == set(range(1, VOCAB, 2))


# interruptions


@pytest.mark.parametrize(
    "error", [interrupts.Interrupted(15), KeyboardInterrupt(), RuntimeError("broken")], ids=repr
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_exception_in_the_middle_leaves_the_policy_as_it_was(
    error: BaseException, precision: str
) -> None:
    options: dict[str, Any] = {"precision": precision, "train_layers": 1}
    policy, fresh = make_policy(**options), make_policy(**options)
    engine, batch = PackedEngine(policy), PackedBatch.pack(make_prompts(), make_prompts())

    def fail(step: int, _: int, __: Tensor) -> None:
        if step == 3:
            raise error

    own = policy.model.generation_config
    mlp = policy.model.model.layers[1].mlp
    with hooked(policy, fail, mlp), pytest.raises(type(error)) as caught:
        engine.generate(make_prompts(), sampling())
    assert caught.value is error
    assert policy.model.generation_config is own
    for module, other in zip(policy.model.modules(), fresh.model.modules(), strict=True):
        assert module.training == other.training
    for (name, weight), (_, same) in zip(
        policy.model.named_parameters(), fresh.model.named_parameters(), strict=True
    ):
        assert torch.equal(weight, same), name
        assert weight.requires_grad == same.requires_grad, name
    assert torch.equal(policy.hidden(batch), fresh.hidden(batch))
    assert_same(
        engine.generate(make_prompts(), sampling()),
        PackedEngine(fresh).generate(make_prompts(), sampling()),
    )
    policy.hidden(batch).sum().backward()
    assert all(p.grad is not None for p in policy.model.model.layers[1].parameters())


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_answered_within_one_token(signum: signal.Signals) -> None:
    policy = make_policy()
    engine, steps = PackedEngine(policy), []

    def ask(step: int, _: int, __: Tensor) -> None:
        steps.append(step)
        if step == 2:
            signal.raise_signal(signum)
            time.sleep(0.2)  # the watcher is a thread of its own

    with interrupts.handled():
        with (
            hooked(policy, ask, policy.model.get_input_embeddings()),
            pytest.raises(interrupts.Interrupted) as caught,
        ):
            engine.generate(make_prompts(), sampling())
        assert caught.value.signum == signum and steps == [0, 1, 2]
        assert_same(engine.generate(make_prompts(), sampling()), expected())


def test_a_signal_that_came_before_is_answered_before_the_prompts() -> None:
    policy, steps = make_policy(), []

    def note(step: int, _: int, __: Tensor) -> None:
        steps.append(step)

    with interrupts.handled():
        signal.raise_signal(signal.SIGTERM)
        with (
            hooked(policy, note, policy.model.get_input_embeddings()),
            pytest.raises(interrupts.Interrupted),
        ):
            PackedEngine(policy).generate(make_prompts(), sampling())
    assert steps == []
