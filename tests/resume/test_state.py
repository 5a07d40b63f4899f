"""Every piece of a run's state is in its checkpoints: the continuation differs without any one.

The runs here are in this process, on a tiny model, with a history that leaves no piece at what a
new process would have: memory that ran out (in the rollout and in a pass), steps that were not
finite, a roll-back, lost samples, a raised alarm, an adapted KL coefficient.
"""

from __future__ import annotations

import copy
import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastppo import PPOConfig, PPOTrainer
from fastppo.checkpoint import Checkpoint, CheckpointError, verify
from fastppo.models.packed import PackedModel
from fastppo.models.tiny import WORDS, tiny_model, word_tokenizer
from fastppo.ppo import rollout_metrics, state, trainer
from fastppo.ppo.experience import PackedBatch
from fastppo.ppo.policy import Policy
from fastppo.ppo.update_metrics import StepStats
from fastppo.rewards import RewardError
from fastppo.training import interrupts, run
from fastppo.training.errors import NonFiniteError

ROWS = [{"prompt": f"{a} {b} >", "answer": str(max(a, b))} for a in range(6) for b in range(6)]
Differences = Callable[[Path, Path], list[str]]


@pytest.fixture(scope="module", autouse=True)
def _no_pictures() -> Iterator[None]:
    """The report takes as long as the run, and nothing continues from it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("write_report", "write_curve_png"):
            patch.setattr(run, name, lambda run_dir: run_dir)
        yield


class History:
    """A trainer of 4 iterations that meets the same faults at the same places in every process.

    Args:
        run_dir: its folder; continued where it exists.
        stop: True at the place where a signal comes, once; called wherever a signal is acted on.
        bad_steps: (iteration, roll-backs, epoch, minibatch) of steps with a gradient of NaN.
    """

    def __init__(
        self,
        run_dir: Path,
        stop: Callable[[PPOTrainer], bool] | None = None,
        bad_steps: frozenset[tuple[int, int, int, int]] = frozenset(
            {(3, 0, 0, 1), (3, 0, 0, 2), (3, 0, 1, 0), (3, 1, 0, 1)}
        ),
        **options: Any,
    ) -> None:
        self.stop = stop
        self.bad_steps = bad_steps
        defaults: dict[str, Any] = {
            **{"num_iterations": 4, "prompts_per_iteration": 8, "max_prompt_length": 8},
            **{"max_response_length": 3, "update_epochs": 2, "num_minibatches": 3},
            **{"token_budget": 32, "learning_rate": 1e-3, "kl_coef": 0.1, "kl_target": 0.05},
            **{"kl_horizon": 100, "eval_interval": 2, "save_interval": 2, "sample_interval": 0},
            **{"max_nonfinite_steps": 3, "on_nonfinite": "rollback", "kl_warning": 1e-9},
            **{"reward_workers": 0, "reward_max_failure_rate": 0.9, "bootstrap_truncated": True},
            **{"device": "cpu", "precision": "fp32"},
        }
        self.trainer = PPOTrainer(
            tiny_model(len(WORDS), seed=0),
            self.larger,
            ROWS[10:],
            PPOConfig(output_dir=str(run_dir), **{**defaults, **options}),
            eval_dataset=ROWS[:10],
            processing_class=word_tokenizer(),
            resume_from_checkpoint=run_dir.exists(),
        )
        self._wrap(self.trainer.step.policy.actor, "hidden", self.hidden)
        self._wrap(self.trainer.step, "gradients", self.gradients)
        self._wrap(self.trainer.engine, "_pass", self.generate)

    @staticmethod
    def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        original = getattr(owner, name)
        setattr(owner, name, lambda *arguments: wrapper(original, *arguments))

    @property
    def iteration(self) -> int:
        return self.trainer.run.iterations + 1

    def larger(self, completions: list[str], answer: list[str]) -> list[float]:
        """A reward that cannot score a 7 or a >."""
        self.check()
        if bad := [text for text in completions if {*text} & {*"7>"}]:
            raise ValueError(f"no score for {bad[0]}")
        pairs = zip(completions, answer, strict=True)
        return [float(text.split() == [a]) + 0.1 * len(text) for text, a in pairs]

    def hidden(self, original: Callable[..., Any], batch: PackedBatch) -> Any:
        """In the second iteration the memory holds 16 tokens."""
        if self.iteration == 2 and batch.num_tokens > 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(batch)

    def generate(self, original: Callable[..., Any], prompts: Any, *rest: Any) -> Any:
        """Likewise 4 rows."""
        if self.iteration == 2 and len(prompts) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(prompts, *rest)

    def gradients(self, original: Callable[..., Any], batch: PackedBatch) -> Any:
        policy, value_loss, norms = original(batch)
        progress = self.trainer.step.progress
        assert progress is not None
        rollbacks = self.trainer.run.rollbacks
        place = (self.iteration, rollbacks, progress.epoch, progress.minibatch)
        if place in self.bad_steps:
            norms = [norm * torch.nan for norm in norms]
        return policy, value_loss, norms

    def check(self) -> None:
        """What takes the place of `interrupts.check`."""
        if self.stop is not None and self.stop(self.trainer):
            self.stop = None
            raise interrupts.Interrupted(15)

    def train(self) -> dict[str, Any]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(interrupts, "check", self.check)
            return self.trainer.train()


# Where the signal comes: always in the repetition of the third iteration, after the roll-back.


def repeated(trainer: PPOTrainer) -> bool:
    return trainer.run.iterations == 2 and trainer.run.rollbacks == 1


def in_the_rewards(trainer: PPOTrainer) -> bool:
    current = trainer.current
    return repeated(trainer) and current.rollouts is not None and current.scored is None


def in_the_update(trainer: PPOTrainer) -> bool:
    """In its second epoch, after three steps, one of them skipped."""
    progress = trainer.step.progress
    return repeated(trainer) and progress is not None and progress.epoch == 1


def after_an_update(trainer: PPOTrainer) -> bool:
    """In the held-out evaluation, one iteration later."""
    return trainer.run.iterations == 3 and trainer.current.row is not None


PLACES = {
    "rewards": (in_the_rewards, "iteration-000002-0000"),
    "update": (in_the_update, "iteration-000002-0003"),
    "updated": (after_an_update, "iteration-000003-updated"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run without a signal."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    history = History(folder)
    history.train()
    dumps = sorted(path.name for path in (folder / "dumps").iterdir())
    assert dumps == ["iteration-000001-kl", "iteration-000003-nonfinite"]
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that a signal stopped."""
    folder, found = tmp_path_factory.mktemp("stopped"), {}
    for place, (stop, name) in PLACES.items():
        found[place] = folder / place
        with pytest.raises(interrupts.Interrupted):
            History(folder / place, stop).train()
        names = sorted(path.name for path in (folder / place / "checkpoints").iterdir())
        assert names == ["iteration-000002", name]
    return found


Change = Callable[[dict[str, Any], dict[str, dict[str, Tensor]]], None]


class Changed(Checkpoint):
    """A checkpoint as it would be read without one of its pieces."""

    groups_changed: dict[str, dict[str, Tensor]]

    @classmethod
    def of(cls, checkpoint: Checkpoint, change: Change) -> Changed:
        tensors = {group: checkpoint.tensors(group) for group in checkpoint.groups}
        state = copy.deepcopy(checkpoint.state)
        change(state, tensors)
        changed = cls(checkpoint.path, state)
        object.__setattr__(changed, "groups_changed", tensors)
        return changed

    def tensors(self, name: str) -> dict[str, Tensor]:
        return self.groups_changed[name]


def resumed(stopped: Path, folder: Path, change: Change | None = None) -> Path:
    """The rest of a stopped run, in a copy of its folder; `change` what is read of the state."""
    shutil.copytree(stopped, folder)
    history = History(folder)
    if change is not None:
        opened = history.trainer.run.opened
        checkpoint = Changed.of(verify(opened.checkpoint.path), change)
        history.trainer.run.opened = dataclasses.replace(opened, checkpoint=checkpoint)
    history.train()
    return folder


@pytest.mark.parametrize("place", PLACES)
def test_a_stopped_run_goes_on_exactly(
    place: str, stopped: dict[str, Path], whole: Path, tmp_path: Path, differences: Differences
) -> None:
    assert differences(whole, resumed(stopped[place], tmp_path / "run")) == []


def test_the_history_leaves_nothing_at_its_default(stopped: dict[str, Path]) -> None:
    """Otherwise the test below could not fail."""
    saved = verify(stopped["update"] / "checkpoints" / "iteration-000002-0003")
    run, step = saved.state["run"], saved.state["step"]
    assert (run["iterations"], run["rollbacks"], len(run["rewards"])) == (2, 1, 2)
    assert run["eval_before"]["prompts"] == 10 and run["seconds"] > 0
    assert step["token_budget"] == 16 and step["iteration"] == 2
    assert step["kl_coef"] != pytest.approx(0.1, rel=1e-6)
    assert saved.state["max_rows"] == 4 and saved.state["alarms"] == ["kl"]
    assert any(lost for lost, _ in saved.state["reward_failures"]["batches"])
    assert saved.state["iteration"]["failures"] and saved.state["iteration"]["lost"]
    skipped = saved.tensors("iteration")["steps/skipped"]
    assert skipped.tolist() == [0.0, 1.0, 0.0]


# Without one piece


def put(*path: str, value: Any) -> Change:
    """Set one entry of the JSON half."""

    def change(state: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> None:
        for key in path[:-1]:
            state = state[key]
        assert state[path[-1]] != value
        state[path[-1]] = value

    return change


def lose(*path: str) -> Change:
    """Remove one entry of the JSON half."""

    def change(state: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> None:
        for key in path[:-1]:
            state = state[key]
        del state[path[-1]]

    return change


def fresh(group: str, matches: Callable[[str], bool]) -> Change:
    """Give some tensors what they have in a new process."""

    def change(state: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> None:
        new = (
            dict(History(Path("unused")).trainer.step.policy.named_parameters())
            if group == "policy"
            else {name: torch.zeros_like(x) for name, x in tensors[group].items()}
        )
        chosen = [name for name in tensors[group] if matches(name)]
        assert any(not torch.equal(tensors[group][name], new[name]) for name in chosen)
        tensors[group] |= {name: new[name].detach() for name in chosen}

    return change


def reset(name: str) -> Change:
    """Another content of the same shape for a tensor of the iteration under way."""

    def change(state: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> None:
        x = tensors["iteration"][name]
        tensors["iteration"][name] = ~x if x.dtype == torch.bool else torch.zeros_like(x)
        assert not torch.equal(x, tensors["iteration"][name])

    return change


RUN = {
    "precision": put("run", "precision", value="bf16"),
    "prompts": put("run", "prompts", value=""),
    "reward_names": put("run", "reward_names", value=[]),
    "reward_weights": put("run", "reward_weights", value=[2.0]),
    "frozen": put("run", "frozen", value=""),
    "iterations": put("run", "iterations", value=0),
    "rewards": put("run", "rewards", value=[]),
    "eval_before": put("run", "eval_before", value=None),
    "rollbacks": put("run", "rollbacks", value=0),
}
STEP = {
    "iteration": put("step", "iteration", value=0),
    "kl_coef": put("step", "kl_coef", value=0.1),
    "token_budget": put("step", "token_budget", value=32),
}
OTHERS = {
    "max_rows": put("max_rows", value=None),
    "alarms": put("alarms", value=[]),
    "reward failures": lambda state, _: state["reward_failures"]["batches"].clear(),
}
WEIGHTS = {
    "value head": fresh("policy", lambda name: name.startswith("value_head")),
    "other parameters": fresh("policy", lambda name: not name.startswith("value_head")),
    "exp_avg": fresh("optimizer", lambda name: name.endswith("/exp_avg")),
    "exp_avg_sq": fresh("optimizer", lambda name: name.endswith("/exp_avg_sq")),
    "step": fresh("optimizer", lambda name: name.endswith("/step")),
}
PROGRESS = {
    "progress": lose("iteration", "progress"),
    "epoch": put("iteration", "progress", value=[0, 0]),
    "minibatch": put("iteration", "progress", value=[1, 2]),
    **{f"steps/{name}": reset(f"steps/{name}") for name in StepStats._fields},
}
# What the update does not read: the first three have done their work in the advantages, the others
# follow from the lengths, and do so again in every minibatch.
NOT_READ_AGAIN = {"rewards", "bootstrap", "truncated", "position_ids", "rows"}
BATCH = {
    "batch": lose("iteration", "batch"),
    **{
        f"batch/{name}": reset(f"batch/{name}")
        for name in state._batch_fields()
        if name not in NOT_READ_AGAIN | {"weights"} and not name.startswith("cu_")
    },
}
SCORED = {
    "all scores": lose("iteration", "scores"),
    "scores": reset("scores"),
    "scores/larger": reset("scores/larger"),
    "failures": put("iteration", "failures", value=[]),
    "lost": put("iteration", "lost", value=0),
}
ROLLOUTS = {
    f"rollouts/{name}": reset(f"rollouts/{name}") for name in ("responses", "finished", "truncated")
}
PIECES: dict[tuple[str, str], Change] = {
    **{("update", name): change for name, change in {**RUN, **STEP, **OTHERS}.items()},
    **{("update", name): change for name, change in {**WEIGHTS, **PROGRESS, **BATCH}.items()},
    **{("update", name): change for name, change in {**SCORED, **ROLLOUTS}.items()},
    ("rewards", "rollouts/logprobs"): reset("rollouts/logprobs"),
    ("updated", "row"): lose("iteration", "row"),
}


QUICK = ("batch", "batch/advantages", "steps/policy")  # of their kinds


def cases() -> list[Any]:
    return [
        pytest.param(
            place,
            piece,
            id=f"{place}-{piece.replace(' ', '-')}",
            marks=[pytest.mark.slow] if "/" in piece and piece not in QUICK else [],
        )
        for place, piece in PIECES
    ]


@pytest.mark.parametrize(("place", "piece"), cases())
def test_without_one_piece_the_continuation_differs(
    place: str,
    piece: str,
    stopped: dict[str, Path],
    whole: Path,
    tmp_path: Path,
    differences: Differences,
) -> None:
    try:
        folder = resumed(stopped[place], tmp_path / "run", PIECES[place, piece])
    except CheckpointError as error:
        assert piece in RUN and "expected a checkpoint of this run" in str(error)
        return
    assert differences(whole, folder) != []


def test_every_entry_of_a_checkpoint_is_tried(stopped: dict[str, Path]) -> None:
    """What is added to a checkpoint must be added above."""
    saved = verify(stopped["update"] / "checkpoints" / "iteration-000002-0003")
    tried = {piece for _, piece in PIECES}
    known = {"run", "step", "iteration", "reward_failures", "config", "versions"}
    known |= {"eos_token_ids"}  # its absence says something: test_trainer_inputs.py
    alarms = {"max_rows", "alarms", "alarm_streaks"}  # test_alarms.py
    assert saved.state.keys() == known | (tried & saved.state.keys()) | alarms
    assert saved.state["run"].keys() == RUN.keys() | {"seconds"}  # tried below
    assert saved.state["step"].keys() == STEP.keys() | {"nonfinite_in_a_row"}  # tried below
    assert saved.state["reward_failures"].keys() == {"batches", "token_budgets"}  # test_rewards.py
    parts = {"rollouts", "scores", "failures", "lost", "batch", "progress"}
    assert saved.state["iteration"].keys() == parts
    assert saved.groups == ["iteration", "optimizer", "policy"]
    shape = {"batch/cu_seqlens", "batch/cu_responses", "rollouts/lengths"}  # nothing fits without
    unread = {f"batch/{name}" for name in NOT_READ_AGAIN}
    assert saved.tensors("iteration").keys() <= tried | shape | unread
    kinds = {name.rpartition("/")[2] for name in saved.tensors("optimizer")}
    assert kinds == {"exp_avg", "exp_avg_sq", "step"}


def test_the_seconds_of_earlier_processes_count(stopped: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(stopped["update"], tmp_path / "run")
    history = History(tmp_path / "run")
    opened = history.trainer.run.opened
    changed = Changed.of(opened.checkpoint, put("run", "seconds", value=1e6))
    history.trainer.run.opened = dataclasses.replace(opened, checkpoint=changed)
    assert 1e6 < history.train()["seconds"] < 1e6 + 600


# Steps that are not finite, before and after the signal

FIRST_TWO = frozenset({(1, 0, 1, 1), (1, 0, 1, 2), (2, 0, 0, 0)})  # the last two, and the next


@pytest.mark.parametrize(
    ("done", "piece"), [(0, None), (0, "nonfinite_in_a_row"), (1, None), (1, "steps/skipped")]
)
def test_bad_steps_before_a_signal_count(done: int, piece: str | None, tmp_path: Path) -> None:
    """Three in a row: two an update ago, and one after the signal, or `done` before it."""

    def stop(trainer: PPOTrainer) -> bool:
        progress = trainer.step.progress
        return trainer.run.iterations == 1 and progress is not None and progress.minibatch == done

    folder, options = tmp_path / "run", {"on_nonfinite": "stop"}
    with pytest.raises(interrupts.Interrupted):
        History(folder, stop, FIRST_TWO, **options).train()
    saved = verify(folder / "checkpoints" / f"iteration-000001-000{done}")
    assert saved.state["step"]["nonfinite_in_a_row"] == 2
    if done:
        assert saved.tensors("iteration")["steps/skipped"].tolist() == [3.0]
    history = History(folder, None, FIRST_TWO, **options)
    if piece is None:
        with pytest.raises(NonFiniteError, match="fastppo replay"):
            history.train()
        dump = verify(folder / "dumps" / "iteration-000002-nonfinite")
        for name, value in saved.tensors("policy").items():  # the steps after it changed nothing
            assert torch.equal(dump.tensors("policy")[name], value), name
        return
    change = put("step", piece, value=0) if piece in saved.state["step"] else reset(piece)
    opened = history.trainer.run.opened
    changed = Changed.of(opened.checkpoint, change)
    history.trainer.run.opened = dataclasses.replace(opened, checkpoint=changed)
    history.train()


@pytest.mark.slow
def test_a_roll_back_after_a_resume_is_the_one_without_it(
    tmp_path: Path, differences: Differences
) -> None:
    """It goes to a checkpoint of `save_interval`, not to the one of the signal."""
    bad = frozenset({(3, 0, 1, 0), (3, 0, 1, 1), (3, 0, 1, 2)})

    def stop(trainer: PPOTrainer) -> bool:
        return trainer.run.iterations == 2 and in_epoch(trainer, 1) and not trainer.run.rollbacks

    whole, started = History(tmp_path / "whole", None, bad, keep_checkpoints=1), time.perf_counter()
    assert whole.train()["seconds"] < time.perf_counter() - started  # none counts twice
    with pytest.raises(interrupts.Interrupted):
        History(tmp_path / "run", stop, bad, keep_checkpoints=1).train()
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["iteration-000002", "iteration-000002-0003"]
    History(tmp_path / "run", None, bad, keep_checkpoints=1).train()
    assert differences(tmp_path / "whole", tmp_path / "run") == []


def in_epoch(trainer: PPOTrainer, epoch: int) -> bool:
    progress = trainer.step.progress
    return progress is not None and progress.epoch == epoch


class ShortOfMemory(History):
    """In the evaluation after the second iteration too, from its second batch on."""

    batches = 0

    @property
    def evaluating(self) -> bool:
        return self.trainer.run.iterations == 1 and self.trainer.current.row is not None

    def generate(self, original: Callable[..., Any], prompts: Any, *rest: Any) -> Any:
        if self.evaluating and self.batches and len(prompts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        rollouts = super().generate(original, prompts, *rest)
        self.batches += self.evaluating
        return rollouts


@pytest.mark.slow
def test_an_evaluation_that_is_stopped_leaves_no_trace(
    tmp_path: Path, differences: Differences, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first batches have lost samples and run out of memory; it starts again from the first."""
    monkeypatch.setattr(trainer, "EVAL_BATCH", 4)

    def stop(trainer: PPOTrainer) -> bool:
        """In the last of three batches."""
        return history.evaluating and history.batches == 4  # 1 + 2 + 1

    whole = ShortOfMemory(tmp_path / "whole")
    whole.train()
    history = ShortOfMemory(tmp_path / "run", stop)
    with pytest.raises(interrupts.Interrupted):
        history.train()
    saved = verify(tmp_path / "run" / "checkpoints" / "iteration-000001-updated")
    assert len(saved.state["reward_failures"]["batches"]) == 2  # of the iterations alone
    assert saved.state["max_rows"] == 4
    ShortOfMemory(tmp_path / "run").train()
    assert differences(tmp_path / "whole", tmp_path / "run") == []


@pytest.mark.slow
def test_a_reward_is_mended_between_two_processes(
    tmp_path: Path, differences: Differences, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run without any score stops; its last batch is scored again afterwards."""
    monkeypatch.setattr(rollout_metrics, "UNSCORED_ITERATIONS", 1)
    mended = History.larger

    def silent(
        self: History, completions: list[str], answer: list[str]
    ) -> list[float] | list[None]:
        evaluates = self.trainer.current.rollouts is None
        return mended(self, completions, answer) if evaluates else [None] * len(answer)

    History(tmp_path / "whole").train()
    with monkeypatch.context() as patch:
        patch.setattr(History, "larger", silent)
        silent.__name__ = "larger"
        with pytest.raises(RewardError, match="got None for all"):
            History(tmp_path / "run").train()
    saved = verify(tmp_path / "run" / "checkpoints" / "iteration-000000-0000")
    assert "scores" not in saved.state["iteration"]
    History(tmp_path / "run").train()
    assert differences(tmp_path / "whole", tmp_path / "run") == []


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 1.5])
def test_numbers_that_are_not_finite_come_back(value: float) -> None:
    """An infinite approx_kl raises an alarm, in the process after the signal too."""
    current = state.Iteration(row={"iteration": 3, "approx_kl": value})
    tensors, saved = state.iteration_state(current, None)
    assert isinstance(saved["row"]["approx_kl"], str) == (value != 1.5)
    back, _ = state.load_iteration(tensors, saved, torch.device("cpu"))
    assert back.row is not None and back.row["iteration"] == 3
    np.testing.assert_equal(back.row["approx_kl"], value)


# What changes while a run trains

# in checkpoints: the run, Iteration, _COUNTERS, max_rows, the window of failures, the alarms
SAVED = {
    *("Run.iterations", "Run.rewards", "Run.eval_before"),
    *("PPOTrainer.current", "PPOStep.iteration", "PPOStep.kl_coef"),
    *("PPOStep.nonfinite_in_a_row", "PPOStep.progress"),
    *("PPOStep.actor_optimizer", "PPOStep.critic_optimizer", "PPOStep.token_budget"),
    *("PPOStep.policy", "PPOTrainer.policy", "PackedEngine.model"),  # of one policy
    *("PackedEngine.max_rows", "FailureWindow._past", "Alarms.raised"),
}
# made anew by every process, or by every update from what is saved
NEED_NOT_BE = {
    "Run._begun": "this process has the run directory",
    "Run.metrics": "writes files",
    "Run.display": "shows rows of metrics.jsonl",
    "Run.started": "a time of this process; Run.seconds is saved",
    "PPOTrainer._frozen": "the digest of what a checkpoint leaves out",
    "Run._lock": "which directory this process locked",
    "PPOTrainer.token_budget_shown": "what has been told to a person",
}


def fingerprint(value: Any) -> Any:
    """Something that is equal as long as an attribute has not changed."""
    if isinstance(value, Tensor):
        return value.detach().cpu().numpy().tobytes()
    if isinstance(value, Policy):
        return {name: fingerprint(p) for name, p in value.named_parameters()}
    if isinstance(value, PackedModel):
        return fingerprint(value.model)
    if isinstance(value, torch.nn.Module):
        return {name: fingerprint(x) for name, x in value.state_dict().items()}
    if isinstance(value, torch.optim.Optimizer):
        return [fingerprint(x) for s in value.state.values() for x in s.values()]
    if isinstance(value, (list, tuple)):
        return [fingerprint(item) for item in value]
    if isinstance(value, dict):
        return {key: fingerprint(item) for key, item in value.items()}
    if isinstance(value, (state.Iteration, PackedBatch)):
        return fingerprint(vars(value))
    return repr(value)


def test_nothing_else_changes_while_a_run_trains(tmp_path: Path) -> None:
    """A new attribute that training changes has to be saved, or listed as one that need not be."""
    bad = frozenset({(2, 0, 1, 2), (3, 0, 0, 2)})  # the last before this and of this update
    history = History(tmp_path / "run", in_the_third, bad, num_iterations=3)
    own = history.trainer
    parts = (own, own.run, own.step, own.engine, own.rewards, own.rewards._window)
    parts = (*parts, own.alarms, own.run.store)
    ours = [part for part in parts if type(part).__module__.startswith("fastppo")]
    assert len(ours) == len(parts)

    def snapshot() -> dict[str, Any]:
        return {
            f"{type(part).__name__}.{name}": fingerprint(value)
            for part in parts
            for name, value in vars(part).items()
        }

    before = snapshot()
    with pytest.raises(interrupts.Interrupted):
        history.train()
    after = snapshot()
    changed = {name for name in after if before.get(name) != after[name]}
    assert after.keys() >= before.keys()
    assert changed == SAVED | NEED_NOT_BE.keys()


def in_the_third(trainer: PPOTrainer) -> bool:
    return trainer.run.iterations == 2 and in_epoch(trainer, 1)
