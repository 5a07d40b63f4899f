"""fastppo._C against plain Python: packing, bins, partitions, and every refusal.

What `_C.gae` computes is tested in tests/ops/test_gae.py."""

from __future__ import annotations

import pathlib
import subprocess
import threading
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastppo import _C

TOKENS = st.integers(0, 2**31 - 1)
PAIRS = st.lists(
    st.tuples(st.lists(TOKENS, min_size=1, max_size=9), st.lists(TOKENS, max_size=9)), max_size=9
)
LENGTHS = st.lists(st.integers(0, 60), max_size=40)
INTEGER_DTYPES = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


def pack_model(prompts: list[list[int]], responses: list[list[int]]) -> dict[str, list[Any]]:
    out: dict[str, list[Any]] = {"input_ids": [], "position_ids": [], "cu_seqlens": [0]}
    out |= {"targets": [], "rows": [], "cu_responses": [0]}
    for prompt, response in zip(prompts, responses, strict=True):
        out["rows"] += [len(out["input_ids"]) + len(prompt) - 1 + i for i in range(len(response))]
        out["input_ids"] += prompt + response
        out["position_ids"] += range(len(prompt) + len(response))
        out["cu_seqlens"].append(len(out["input_ids"]))
        out["targets"] += response
        out["cu_responses"].append(len(out["targets"]))
    return out


def bins_model(lengths: list[int], budget: int) -> list[list[int]]:
    bins: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [b for b in range(len(bins)) if room[b] >= lengths[i]]
        if not fitting:
            bins.append([])
            room.append(budget)
            fitting = [len(bins) - 1]
        best = min(fitting, key=lambda b: room[b])
        bins[best].append(i)
        room[best] -= lengths[i]
    return [sorted(b) for b in bins]


def partition_model(costs: list[int], k: int) -> list[list[int]]:
    """Largest differencing on dense k-tuples of (cost, indices)."""
    made = 0
    tuples = []
    for i, cost in enumerate(costs):
        tuples.append((made, [(cost, [i])] + [(0, [])] * (k - 1)))
        made += 1
    if not tuples:
        return [[] for _ in range(k)]
    while len(tuples) > 1:
        tuples.sort(key=lambda t: (t[1][-1][0] - t[1][0][0], t[0]))
        (_, a), (_, b), *tuples = tuples
        merged = [(x + y, i + j) for (x, i), (y, j) in zip(a, reversed(b), strict=True)]
        merged.sort(key=lambda part: (-part[0], -len(part[1])))
        tuples.append((made, merged))
        made += 1
    return [sorted(indices) for _, indices in tuples[0][1]]


def fields_of(plan: _C.PackPlan) -> dict[str, np.ndarray]:
    arena = plan.arena()
    return {
        name: np.frombuffer(arena, dtype, count, offset) if count else np.zeros(0, dtype)
        for name, (offset, dtype, count) in plan.fields.items()
    }


def aligned(nbytes: int) -> np.ndarray:
    memory = np.full(nbytes + _C.ALIGNMENT, 0xAB, np.uint8)
    start = -memory.ctypes.data % _C.ALIGNMENT
    return memory[start : start + nbytes]


@given(PAIRS)
def test_pack_equals_the_plain_model(pairs: list[tuple[list[int], list[int]]]) -> None:
    prompts, responses = [p for p, _ in pairs], [r for _, r in pairs]
    logprobs = [[-0.5 * i for i in range(len(r))] for r in responses]
    masks = [[i % 2 == 0 for i in range(len(r))] for r in responses]
    truncated = [b % 2 == 1 for b in range(len(pairs))]
    plan = _C.PackPlan(
        prompts, responses, rollout_logprobs=logprobs, loss_mask=masks, truncated=truncated
    )
    fields = fields_of(plan)
    expected: dict[str, list[Any]] = pack_model(prompts, responses)
    expected |= {"truncated": truncated}
    expected |= {"rollout_logprobs": sum(logprobs, []), "loss_mask": sum(masks, [])}
    assert {name: x.tolist() for name, x in fields.items()} == expected
    assert plan.num_sequences == len(pairs)
    assert plan.num_tokens == len(expected["input_ids"])
    assert plan.num_responses == len(expected["targets"])
    assert plan.max_seqlen == max((len(p) + len(r) for p, r in pairs), default=0)


@given(PAIRS)
def test_every_form_of_input_packs_to_the_same_bytes(
    pairs: list[tuple[list[int], list[int]]],
) -> None:
    prompts, responses = [p for p, _ in pairs], [r for _, r in pairs]
    expected = bytes(_C.PackPlan(prompts, responses).arena())
    forms: list[Any] = [
        lambda x: [np.array(s, np.int64) for s in x],
        lambda x: [np.array(s, np.uint32) for s in x],
        lambda x: [torch.tensor(s, dtype=torch.int32) for s in x],
        lambda x: tuple(tuple(s) for s in x),
        lambda x: [np.array(s, np.int32)[::-1].copy()[::-1] for s in x],  # negative stride
        lambda x: [np.repeat(np.array(s, np.int32), 2)[::2] for s in x],  # every other element
        lambda x: [memoryview(np.array(s, np.int32)) for s in x],
        lambda x: [[np.int64(t) for t in s] for s in x],
    ]
    for form in forms:
        assert bytes(_C.PackPlan(form(prompts), form(responses)).arena()) == expected
    flat = [np.array(sum(x, []), np.int64) for x in (prompts, responses)]
    lengths = [[len(s) for s in x] for x in (prompts, responses)]
    plan = _C.PackPlan(*flat, prompt_lengths=lengths[0], response_lengths=np.array(lengths[1], int))
    assert bytes(plan.arena()) == expected


@pytest.mark.parametrize("dtype", INTEGER_DTYPES)
def test_every_integer_dtype(dtype: str) -> None:
    ids = np.array([0, 1, 127], dtype)
    assert fields_of(_C.PackPlan([ids], [ids]))["input_ids"].tolist() == [0, 1, 127, 0, 1, 127]


def test_utf8_bytes_survive_packing_and_unpacking() -> None:
    texts = ["naïve 🦙", "", "中文 – ≥", "e\u0301\u200d"]
    prompts = [b"\x00"] * len(texts)
    fields = fields_of(_C.PackPlan(prompts, [t.encode() for t in texts]))
    pieces = np.split(fields["targets"], fields["cu_responses"][1:-1])
    assert [bytes(x.tolist()).decode() for x in pieces] == texts


def test_the_arena_is_aligned_and_so_is_every_field() -> None:
    plan = _C.PackPlan([[1], [2, 3]], [[4, 5, 6], []], rollout_logprobs=[[0.0] * 3, []])
    arena = np.frombuffer(plan.arena(), np.uint8)
    assert arena.ctypes.data % _C.ALIGNMENT == 0
    assert arena.nbytes == plan.nbytes == len(plan.arena()) == plan.arena().nbytes
    assert all(offset % _C.ALIGNMENT == 0 for offset, _, _ in plan.fields.values())
    end = 0
    for offset, dtype, count in plan.fields.values():
        assert not arena[end:offset].any()  # padding is zero: equal batches are equal bytes
        end = offset + count * np.dtype(dtype).itemsize
    assert not arena[end:].any()


def test_fill_writes_the_arena_into_the_callers_buffer() -> None:
    plan = _C.PackPlan([[1, 2]], [[3]], loss_mask=[[True]])
    out = aligned(plan.nbytes + 8)
    plan.fill(out)
    assert bytes(out[:-8]) == bytes(plan.arena())
    assert (out[-8:] == 0xAB).all()


def test_the_plan_keeps_its_sources_alive() -> None:
    plan = _C.PackPlan([np.arange(1000)], [np.arange(1000, 2000)])
    junk = [np.full(1000, 7) for _ in range(50)]
    assert fields_of(plan)["input_ids"].tolist() == list(range(2000))
    assert len(junk) == 50


def test_the_plan_lets_its_sources_go() -> None:
    source = bytearray(b"\x01\x02")
    plan = _C.PackPlan([source], [source])
    with pytest.raises(BufferError):
        source.append(3)
    del plan
    source.append(3)
    with pytest.raises(ValueError, match="^responses: expected"):
        _C.PackPlan([source], [])
    source.append(4)


def test_the_gil_is_released_while_copying() -> None:
    token = np.broadcast_to(np.int64(5), 20_000_000)
    plan = _C.PackPlan([token], [token[:1]])
    out = aligned(plan.nbytes)
    ran = []
    stop = threading.Event()

    def count() -> None:
        while not stop.is_set():
            ran.append(1)
            stop.wait(0.0005)

    thread = threading.Thread(target=count)
    thread.start()
    before = len(ran)
    plan.fill(out)
    during = len(ran) - before
    stop.set()
    thread.join()
    assert during >= 2


def pack(*args: Any, **kwargs: Any) -> None:
    _C.PackPlan(*args, **kwargs).arena()


HUGE = np.broadcast_to(np.int32(1), 2**31 - 1)  # no memory behind it

REFUSALS: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "float tokens": (([np.ones(2)], [[1]]), {}, TypeError, r"prompts\[0\]: .*integers.*float64"),
    "float in a list": (([[1, 2.0]], [[1]]), {}, TypeError, r"prompts\[0\]\[1\]: .*integer.*float"),
    "bool tokens": (([[1]], [np.ones(2, bool)]), {}, TypeError, r"responses\[0\]: .*got bool"),
    "bool in a list": (([[1]], [[True]]), {}, TypeError, r"responses\[0\]\[0\]: .*got bool"),
    "text": ((["héllo 🦙"], [[1]]), {}, TypeError, r"prompts\[0\]: .*got str; tokenize"),
    "text outside": (("héllo", [[1]]), {}, TypeError, r"prompts: expected .*got str"),
    "flat without lengths": ((np.ones(3, int), [[1]]), {}, TypeError, r"prompts: .*prompt_lengths"),
    "flat list": (([1, 2], [[1]]), {}, TypeError, r"prompts\[0\]: expected .*got int"),
    "padded matrix": ((np.ones((2, 3), int), [[1]]), {}, TypeError, r"prompts: .*prompt_lengths"),
    "matrix inside": (([np.ones((2, 3), int)], [[1]]), {}, ValueError, r"prompts\[0\]: .*2-D"),
    "big endian": (([np.ones(2, ">i4")], [[1]]), {}, TypeError, r"prompts\[0\]: .*>i4"),
    "grad tensor": (
        ([[1]], [[1]]),
        {"rollout_logprobs": [torch.zeros(1, requires_grad=True)]},
        TypeError,
        r"rollout_logprobs\[0\]: .*requires grad",
    ),
    "none": ((None, [[1]]), {}, TypeError, r"prompts: .*NoneType"),
    "set": (([{1, 2}], [[1]]), {}, TypeError, r"prompts\[0\]: .*got set"),
    "negative token": (([[1, -7]], [[1]]), {}, ValueError, r"prompts\[0\]\[1\]: .*got -7"),
    "token past int32": (
        ([[1], [2]], [[1], [3, 2**31]]),
        {},
        ValueError,
        r"responses\[1\]\[1\]: .*got 2147483648",
    ),
    "token past int64": (([[2**70]], [[1]]), {}, ValueError, r"prompts\[0\]\[0\]: .*int64"),
    "negative token, flat": (
        (np.array([1, 2, -3]), [[1], [1]]),
        {"prompt_lengths": [1, 2]},
        ValueError,
        r"prompts\[2\]: .*got -3",
    ),
    "empty prompt": (
        ([[1], []], [[1], [1]]),
        {},
        ValueError,
        r"prompts\[1\]: .*got 0",
    ),
    "empty prompt, flat": (
        (np.array([1]), [[1], [1]]),
        {"prompt_lengths": [1, 0]},
        ValueError,
        r"prompt_lengths\[1\]: .*got 0",
    ),
    "negative length": (
        (np.array([1]), [[1], [1]]),
        {"prompt_lengths": [2, -1]},
        ValueError,
        r"prompt_lengths\[1\]: expected ≥ 0, got -1",
    ),
    "float length": (
        (np.array([1]), [[1]]),
        {"prompt_lengths": np.array([1.0])},
        TypeError,
        r"prompt_lengths: .*float64",
    ),
    "lengths that do not add up": (
        (np.array([1, 2]), [[1]]),
        {"prompt_lengths": [3]},
        ValueError,
        r"prompts: .*got 2",
    ),
    "fewer responses": (
        ([[1], [2]], [[1]]),
        {},
        ValueError,
        r"responses: .*got 1",
    ),
    "lengths past int32": (
        (np.array([1]), [[1], [1]]),
        {"prompt_lengths": [2**31 - 1, 2**31 - 1]},
        ValueError,
        r"prompt_lengths: .*2147483647.*got at least 4294967294",
    ),
    "lengths near int64": (
        (np.array([1]), [[1], [1]]),
        {"prompt_lengths": [2**63 - 1, 2**63 - 1]},
        ValueError,
        r"prompt_lengths: .*2147483647",
    ),
    "length past int64": (
        (np.array([1]), [[1]]),
        {"prompt_lengths": np.array([2**64 - 1], np.uint64)},
        ValueError,
        r"prompt_lengths\[0\]: .*int64",
    ),
    "tokens past int32": (
        ([HUGE], [[1]]),
        {},
        ValueError,
        r"prompts and responses: expected ≤ 2147483647 tokens in all .* got 2147483648",
    ),
    "few log-probs": (
        ([[1]], [[1, 2]]),
        {"rollout_logprobs": [[0.0]]},
        ValueError,
        r"rollout_logprobs\[0\]: .*got 1",
    ),
    "log-probs of too few sequences": (
        ([[1]], [[1]]),
        {"rollout_logprobs": []},
        ValueError,
        r"rollout_logprobs: .*got 0",
    ),
    "integer log-probs": (
        ([[1]], [[1]]),
        {"rollout_logprobs": [np.zeros(1, int)]},
        TypeError,
        r"rollout_logprobs\[0\]: .*float32 or float64.*int64",
    ),
    "half log-probs": (
        ([[1]], [[1]]),
        {"rollout_logprobs": [np.zeros(1, np.float16)]},
        TypeError,
        r"rollout_logprobs\[0\]: .*float16",
    ),
    "bfloat16 log-probs": (
        ([[1]], [[1]]),
        {"rollout_logprobs": [torch.zeros(1, dtype=torch.bfloat16)]},
        TypeError,
        r"rollout_logprobs\[0\]: .*BFloat16",
    ),
    "text log-probs": (
        ([[1]], [[1]]),
        {"rollout_logprobs": [["x"]]},
        TypeError,
        r"rollout_logprobs\[0\]\[0\]: .*got str",
    ),
    "integer mask": (
        ([[1]], [[1]]),
        {"loss_mask": [np.ones(1, int)]},
        TypeError,
        r"loss_mask\[0\]: .*bools.*int64",
    ),
    "integer mask in a list": (
        ([[1]], [[1]]),
        {"loss_mask": [[1]]},
        TypeError,
        r"loss_mask\[0\]\[0\]: .*got int",
    ),
    "truncated of another size": (
        ([[1]], [[1]]),
        {"truncated": [True, False]},
        ValueError,
        r"truncated: .*got 2",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_name_the_argument(case: str) -> None:
    args, kwargs, error, message = REFUSALS[case]
    with pytest.raises(error, match=message):
        pack(*args, **kwargs)


def test_a_list_that_shrinks_while_it_is_read() -> None:
    tokens: list[Any] = []

    class Shrinks:
        def __index__(self) -> int:
            del tokens[2:]
            return 5

    tokens += [Shrinks(), 1, 2, 3]
    plan = _C.PackPlan([tokens], [[9]])
    assert fields_of(plan)["input_ids"].tolist() == [5, 1, 9]


def test_fill_refuses_buffers_it_cannot_use() -> None:
    plan = _C.PackPlan([[1]], [[2]])
    with pytest.raises(ValueError, match=r"^out: .*got 1"):
        plan.fill(aligned(1))
    with pytest.raises(ValueError, match=r"out: .*multiple of 128, got one 4 past it"):
        plan.fill(aligned(plan.nbytes + 4)[4:])
    with pytest.raises(TypeError, match=r"^out: .*got bytes"):
        plan.fill(bytes(plan.nbytes))
    with pytest.raises(TypeError, match="out: .*Tensor"):
        plan.fill(torch.zeros(plan.nbytes, dtype=torch.uint8))


@given(LENGTHS, st.integers(60, 200))
def test_bins_are_best_fit_decreasing(lengths: list[int], budget: int) -> None:
    bins = _C.bins(lengths, budget)
    assert bins == bins_model(lengths, budget)
    assert sorted(sum(bins, [])) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in b) <= budget for b in bins)


@given(LENGTHS, st.integers(1, 9))
def test_partition_is_karmarkar_karp(lengths: list[int], k: int) -> None:
    parts = _C.partition(lengths, k)
    assert parts == partition_model(lengths, k)
    assert sorted(sum(parts, [])) == list(range(len(lengths)))
    costs = [sum(lengths[i] for i in part) for part in parts]
    assert costs == sorted(costs, reverse=True)
    assert max(costs) - min(costs) <= max(lengths, default=0)
    assert len(lengths) < k or all(parts)


@pytest.mark.parametrize("convert", [list, np.array, torch.tensor], ids=["list", "numpy", "torch"])
def test_lengths_in_every_form(convert: Any) -> None:
    assert _C.bins(convert([3, 9, 4]), 10) == [[1], [0, 2]]
    assert _C.partition(convert([8, 7, 6, 5, 4]), 2) == [[1, 3, 4], [0, 2]]


def test_bins_refuse() -> None:
    with pytest.raises(ValueError, match=r"^token_budget: .*got 8"):
        _C.bins([3, 9], 8)
    with pytest.raises(ValueError, match=r"^token_budget: .*got 0"):
        _C.bins([], 0)
    with pytest.raises(ValueError, match=r"^lengths\[0\]: .*got -1"):
        _C.bins([-1], 8)
    for wrong in (8.0, True, "8", None):
        with pytest.raises(TypeError, match=r"^token_budget: expected"):
            _C.bins([1], wrong)  # type: ignore[arg-type] # what is being tested


def test_partition_refuses() -> None:
    for k in (0, -1):
        with pytest.raises(ValueError, match=rf"^k: .*got {k}"):
            _C.partition([1], k)
    with pytest.raises(ValueError, match=r"^k: expected"):
        _C.partition([1], 2**40)
    with pytest.raises(ValueError, match="^lengths: expected"):
        _C.partition([2**63 - 1, 1], 2)
    with pytest.raises(TypeError, match="lengths: .*float64"):
        _C.partition(np.ones(2), 2)


@given(PAIRS)
def test_the_offsets_cut_fields_into_sequences(
    pairs: list[tuple[list[int], list[int]]],
) -> None:
    fields = fields_of(_C.PackPlan([p for p, _ in pairs], [r for _, r in pairs]))
    for name, ends, expected in (
        ("input_ids", "cu_seqlens", [p + r for p, r in pairs]),
        ("targets", "cu_responses", [r for _, r in pairs]),
    ):
        cuts = pairwise(fields[ends].tolist())
        assert [fields[name][start:stop].tolist() for start, stop in cuts] == expected


@given(st.data())
@settings(max_examples=300)
def test_anything_is_packed_or_refused(data: st.DataObject) -> None:
    scalar = st.one_of(st.integers(), st.floats(), st.booleans(), st.text(), st.none())
    array = st.builds(
        lambda values, dtype: np.array(values).astype(dtype),
        st.lists(st.integers(-3, 100), max_size=4),
        st.sampled_from([*INTEGER_DTYPES, "float32", "float64", "float16", "bool", "O", ">i2"]),
    )
    item = st.one_of(scalar, array, st.lists(scalar, max_size=3), st.binary(max_size=3))
    anything = st.one_of(item, st.lists(item, max_size=3))
    optional = st.one_of(st.none(), anything)
    arguments = {
        name: data.draw(optional, name)
        for name in (
            "prompt_lengths",
            "response_lengths",
            "rollout_logprobs",
            "loss_mask",
            "truncated",
        )
    }
    names = ("prompts", "responses", *arguments)
    try:
        plan = _C.PackPlan(data.draw(anything), data.draw(anything), **arguments)
        assert len(plan.arena()) == plan.nbytes
    except (TypeError, ValueError) as error:
        assert str(error).startswith(names), error
        assert "expected" in str(error) and ", got " in str(error)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cu_seqlens": [1, 4]}, ValueError, "cu_seqlens: .*got 1 to"),
        ({"cu_seqlens": []}, ValueError, "cu_seqlens: .*got none"),
        ({"cu_seqlens": [0, 3, 2, 4]}, ValueError, r"cu_seqlens\[2\]: expected ≥ 3, got 2"),
        ({"cu_seqlens": [0, 2**40, 4]}, ValueError, r"cu_seqlens\[2\]: expected"),
        ({"cu_seqlens": [0.0, 4.0]}, TypeError, "cu_seqlens"),
        ({"values": np.zeros(4, np.int32)}, TypeError, "values: .*int32"),
        ({"rewards": np.zeros(4)}, ValueError, "rewards: .*got 4 flo"),
        ({"rewards": np.zeros(3, np.float32)}, ValueError, "rewards: .*got 3 float32"),
        ({"kl": np.zeros(8, np.float32)[::2]}, ValueError, "kl: .*with a stride of 8 bytes"),
        ({"mask": np.zeros(4, np.float32)}, TypeError, "mask: expected .*bools"),
        ({"mask": np.zeros(5, bool)}, ValueError, "mask: .*got 5"),
        ({"bootstrap": np.zeros(2, np.float32)}, ValueError, "bootstrap: expected 1"),
        ({"scores": np.zeros(4, np.float32)}, ValueError, "scores: expected 1"),
        ({"gamma": np.zeros(1, np.float32)}, ValueError, "gamma: expected"),
        ({"gamma": None}, TypeError, "gamma, gae_lambda: expected numbers, got None"),
        ({"mask_mode": "zero"}, ValueError, "mask_mode: expected"),
        ({"returns": np.zeros(3, np.float32)}, ValueError, "returns: .*buffer of 4 float32, got 3"),
        ({"returns": np.zeros(4)}, ValueError, "returns: .*got 4 float64"),
        ({"advantages": b"0123"}, TypeError, "advantages: .*got bytes"),
        ({"advantages": [0.0] * 4}, TypeError, "advantages: .*got list"),
    ],
)
def test_gae_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        **{name: np.zeros(4, np.float32) for name in ("advantages", "returns", "values")},
        "cu_seqlens": np.array([0, 4]),
        "gamma": 1.0,
        "gae_lambda": 1.0,
    }
    _C.gae(**arguments)
    with pytest.raises(error, match=message):
        _C.gae(**(arguments | change))


@pytest.mark.slow
def test_the_core_under_sanitizers(tmp_path: pathlib.Path) -> None:
    program = tmp_path / "core_test"
    source = pathlib.Path(__file__).parent / "core_test.cpp"
    flags = ["-std=c++17", "-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    warnings = ["-Wall", "-Wextra", "-Wconversion", "-Werror"]
    subprocess.run(["c++", *flags, *warnings, str(source), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr
