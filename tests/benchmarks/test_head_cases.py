"""The head's cases: every way of computing them that runs here is right, gradients included.

Peers that cannot run here give rows that say so; where they can, they are checked like fastppo.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastppo.benchmarks import head
from fastppo.benchmarks.check import Judge
from fastppo.benchmarks.registry import Benchmark, Provider, in_float64, select_cases
from fastppo.benchmarks.run import Cell, Roof
from fastppo.profiling.case import Call, Inputs, Size
from fastppo.profiling.meta import Ceilings

CPU = torch.device("cpu")
NAMES = (
    "token_logprobs_forward",
    "token_logprobs",
    "linear_logprobs_forward",
    "linear_logprobs",
    "linear_ppo_loss",
)
CASES = {case.name: case for case in select_cases(NAMES)}
COMPILES = ("torch.compile", "Liger chunked")  # seconds each


def runnable() -> list[object]:
    """(case, provider) of everything but the baseline that runs here."""
    return [
        pytest.param(
            case, name, id=f"{case.name}-{name}", marks=[pytest.mark.slow] * (name in COMPILES)
        )
        for case in CASES.values()
        for name, provider in case.providers.items()
        if name != case.baseline and provider.missing(CPU) is None
    ]


# torch's compiler of its own code, and of what Liger hands it
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")
@pytest.mark.parametrize("case, name", runnable())
def test_provider_agrees_with_float64(case: Benchmark, name: str) -> None:
    provider = case.providers[name]
    for size in case.sizes["smoke"]:
        x = case.inputs(size, CPU, 0)
        before = {key: t.clone() for key, t in x.items()}
        judge = Judge(case, size, x)
        baseline = case.providers[case.baseline]
        judge.check(case.baseline, baseline.prepare(x, size)())  # it sets the limit
        call = provider.prepare(x, size)
        judge.check(name, call())
        judge.check(name, call())  # nothing is used up
        assert all(torch.equal(x[key], t) for key, t in before.items())


GRADIENTS = {
    "token_logprobs_forward": set(),
    "token_logprobs": {"logits"},
    "linear_logprobs_forward": set(),
    "linear_logprobs": {"hidden", "weight"},
    "linear_ppo_loss": {"hidden", "weight"},
}


@pytest.mark.parametrize("name", NAMES)
def test_every_gradient_is_compared(name: str) -> None:
    case = CASES[name]
    size = case.sizes["smoke"][0]
    x = case.inputs(size, CPU, 0)
    answer = case.reference(in_float64(x), size)
    compared = {key.removeprefix("grad ") for key in answer if key.startswith("grad ")}
    assert compared == GRADIENTS[name]
    assert all(answer[f"grad {leaf}"].shape == x[leaf].shape for leaf in compared)
    assert all(answer[f"grad {leaf}"].abs().max() > 0 for leaf in compared)


def spoil(result: str, factor: float) -> Provider:
    """fastppo's answer to linear_ppo_loss with one result off."""
    right = CASES["linear_ppo_loss"].providers["fastppo"]

    def prepare(x: Inputs, size: Size) -> Call:
        call = right.prepare(x, size)

        def spoiled() -> dict[str, torch.Tensor]:
            outputs = dict(call())
            return outputs | {result: outputs[result] * factor}

        return spoiled

    return Provider(prepare=prepare)


def roof() -> Roof:
    """Of a machine faster than any, without measuring one."""
    made = Roof.__new__(Roof)
    made.device, made.ceilings = CPU, Ceilings(copy_gb_s=1e6, bf16_tflops=1e6, fp32_tflops=1e6)
    return made


def test_rows_name_a_wrong_gradient_and_an_absent_peer() -> None:
    case = CASES["linear_ppo_loss"]
    absent = Provider(prepare=case.providers["TRL chunked"].prepare, needs=("trl_of_tomorrow",))
    providers = {
        "torch": case.providers["torch"],
        "fastppo": case.providers["fastppo"],
        "hidden": spoil("grad hidden", 1.001),
        "weight": spoil("grad weight", 0.999),
        "entropy": spoil("entropy", 1.001),
        "TRL": absent,
        "TRL kernel": case.providers["TRL kernel"],
    }
    changed = dataclasses.replace(case, providers=providers)
    cell = Cell(changed, case.sizes["smoke"][0], roof())
    cell.measure(budget=0.05)
    found = {row.provider: row for row in cell.rows}
    assert found["fastppo"].status == found["torch"].status == "ok"
    for name, result in (("hidden", "grad hidden"), ("weight", "grad weight")):
        assert found[name].status == "wrong"
        assert found[name].note.startswith(result)
        assert not found[name].seconds
    assert found["entropy"].note.startswith("entropy")
    assert found["TRL"].status == "missing"
    assert found["TRL"].note == "trl_of_tomorrow is not installed"
    assert found["TRL kernel"].status == "missing"
    assert found["TRL kernel"].note in ("runs on cuda only", "trl is not installed")


@pytest.mark.parametrize("name", ["token_logprobs", "linear_ppo_loss"])
def test_reference_by_parts_is_the_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    size = case.sizes["smoke"][0]
    x = in_float64(case.inputs(size, CPU, 1))
    whole = case.reference(x, size)
    monkeypatch.setattr(head, "_PART_BYTES", 7 * 8 * size["V"])  # 7 rows; 48 is no multiple
    assert len(head.part_slices(size["N"], size["V"])) == 7
    for result, out in case.reference(x, size).items():
        torch.testing.assert_close(out, whole[result], rtol=1e-11, atol=1e-13)


def test_ratios_are_clear_of_the_clip() -> None:
    case = CASES["linear_ppo_loss"]
    size = Size(N=512, B=4, H=32, V=1000)
    x = case.inputs(size, CPU, 0)
    logprobs, _ = head.linear_logprobs_of(x["hidden"], x["weight"], x["targets"])
    ratio = (logprobs - x["old_logprobs"]).exp()
    outside = (ratio < 0.8) | (ratio > 1.2)
    assert 0.1 < outside.float().mean() < 0.3
    assert ((ratio - 0.8).abs() > 0.05).all()
    assert ((ratio - 1.2).abs() > 0.05).all()
    assert (x["advantages"].view(4, -1) == x["per_sequence"][:, None]).all()
