"""Configuration: ranges, inert options, files and flags, all before anything heavy is loaded."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from fastppo.cli.main import main
from fastppo.cli.options import as_flags, read_toml
from fastppo.cli.train import parse_train
from fastppo.ppo.config import PPOConfig, TrainConfig

MINIMAL = {"model": "m", "dataset": "d.jsonl", "reward": ("r.py:f",)}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_iterations": 0}, ["num_iterations", "≥ 1", "0"]),
        ({"gamma": 1.5}, ["gamma", "[0, 1]", "1.5"]),
        ({"clip_coef": 1.0}, ["clip_coef", "(0, 1)"]),
        ({"temperature": 0.0}, ["temperature", "> 0"]),
        ({"learning_rate": float("nan")}, ["learning_rate", "finite"]),
        ({"dual_clip": 0.9}, ["dual_clip", "(1, "]),
        ({"adam_betas": (0.9, 1.0)}, ["adam_betas"]),
        ({"token_budget": 100}, ["token_budget", "640"]),
        ({"num_minibatches": 33}, ["num_minibatches", "32 sequences"]),
    ],
)
def test_a_value_out_of_range_is_named(options: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        PPOConfig(**options)  # type: ignore[arg-type]
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"advantage": "grpo"}, ["n_samples = 1", "grpo"]),
        ({"advantage": "rloo", "n_samples": 2, "gamma": 0.9}, ["gamma", "no effect"]),
        ({"advantage": "grpo", "n_samples": 2, "critic": "shared"}, ["critic", "nothing reads"]),
        ({"advantage": "gae", "critic": "none"}, ["critic = 'none'"]),
        ({"vf_coef": 0.0}, ["vf_coef"]),
        ({"kl_coef": 0.1, "reference": "none"}, ["kl_coef", "reference"]),
        ({"kl_coef": 0.0, "kl_target": 6.0}, ["kl_target", "kl_coef > 0"]),
        ({"kl_in": "loss"}, ["k1", "zero in expectation"]),
        ({"kl_horizon": 5}, ["kl_horizon", "kl_target"]),
        ({"is_low": 0.1}, ["is_low", "icepop"]),
        ({"is_correction": "icepop", "is_cap": 3.0}, ["is_cap", "tis"]),
        ({"target_kl": 0.1}, ["target_kl", "update_epochs"]),
        ({"missing_eos_penalty": 1.0, "missing_eos_score": -1.0}, ["missing_eos"]),
        ({"critic_warmup": 100}, ["critic_warmup", "never be trained"]),
        ({"warmup_iterations": 100}, ["warmup_iterations"]),
    ],
)
def test_an_option_without_effect_is_refused(options: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        PPOConfig(**options)  # type: ignore[arg-type]
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("option", [{"top_p": 0.9}, {"top_k": 50}, {"min_p": 0.1}])
def test_filtered_sampling_needs_a_corrected_ratio(option: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="is_correction"):
        PPOConfig(**option)  # type: ignore[arg-type]
    PPOConfig(**option, is_correction="tis")  # type: ignore[arg-type]


def test_schedules() -> None:
    linear = PPOConfig(num_iterations=10, lr_schedule="linear")
    assert [linear.lr_factor(i) for i in (0, 5, 10)] == [1.0, 0.5, 0.0]
    warm = PPOConfig(num_iterations=10, lr_schedule="cosine", warmup_iterations=4)
    assert [warm.lr_factor(i) for i in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert PPOConfig(lr_schedule="constant").lr_factor(99) == 1.0


def test_an_unknown_key_suggests_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("num_iteration = 3\n")
    with pytest.raises(ValueError, match="unknown key 'num_iteration'.*'num_iterations'"):
        read_toml(path)


def test_broken_and_missing_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("num_iterations = = 3\n")
    with pytest.raises(ValueError, match="not valid TOML"):
        read_toml(path)
    with pytest.raises(ValueError, match="does not exist"):
        read_toml(tmp_path / "none.toml")


def test_paths_in_a_file_are_relative_to_it(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("{}\n")
    (tmp_path / "r.py").write_text("")
    path = tmp_path / "c.toml"
    path.write_text('dataset = "p.jsonl"\nreward = ["r.py:f", "pkg.mod:g"]\nmodel = "hub/name"\n')
    settings = read_toml(path)
    assert settings["dataset"] == str(tmp_path / "p.jsonl")
    assert settings["reward"] == [f"{tmp_path / 'r.py'}:f", "pkg.mod:g"]
    assert settings["model"] == "hub/name"


def test_flags_override_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(
        'model = "m"\ndataset = "d"\nreward = ["a:b"]\nnum_iterations = 7\nnorm_adv = true\n'
        "adam_betas = [0.8, 0.9]\nseed = 3\n"
    )
    argv = ["--config", str(path), "--num-iterations", "9", "--no-norm-adv", "--dry-run"]
    config, dry = parse_train(argv)
    assert dry
    assert (config.num_iterations, config.norm_adv, config.seed) == (9, False, 3)
    assert config.adam_betas == (0.8, 0.9)


def test_every_field_survives_the_trip_through_flags() -> None:
    config = TrainConfig(**MINIMAL, report_to=("tensorboard",), dual_clip=3.0)  # type: ignore[arg-type]
    settings = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(config).items()
        if value not in (None, "", ())
    }
    assert parse_train(as_flags(settings))[0] == config


def test_errors_are_one_line_and_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "Did you mean 'train'" in capsys.readouterr().err
    assert main(["train", "--config", "none.toml"]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main(["--help"]) == 0


def test_a_bad_configuration_is_refused_without_loading_torch(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('model = "m"\ndataset = "d"\nreward = ["a:b"]\nadvantage = "grpo"\n')
    code = (
        "import sys; from fastppo.cli.main import main\n"
        f"try: main(['train', '--config', {str(path)!r}])\n"
        "except SystemExit as e: assert e.code == 2\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "n_samples" in done.stderr
