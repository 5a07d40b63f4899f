"""Packed attention: exactly the unpacked forward, and a refusal where it would not be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from fastppo.models import attention
from fastppo.models.attention import (
    attention_kwargs,
    check_supported,
    packed_attention,
    select_kernel,
)
from fastppo.models.packed import PackedModel
from fastppo.ppo.experience import PackedBatch

VOCAB = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # grouped heads
    "intermediate_size": 128,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),  # heads wider than hidden_size / heads
    "gpt2": GPT2Config(
        vocab_size=VOCAB,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        scale_attn_by_inverse_layer_idx=True,  # a scaling that is not 1/sqrt(head_dim)
    ),
}
# 1: a sequence with one token; 200: longer than the segment that changes dtype under autocast
LENGTHS = (5, 9, 1, 200, 17)


def make_model(family: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS[family], attn_implementation="sdpa").eval()


def make_sequences(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, n) for n in lengths]


def pack(sequences: list[np.ndarray]) -> PackedBatch:
    """Each sequence is a prompt of one token and its response."""
    return PackedBatch.pack([s[:1] for s in sequences], [s[1:] for s in sequences])


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.fixture(params=list(CONFIGS))
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


# the exact forward


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
def test_packed_equals_unpacked(family: str, checkpointing: bool) -> None:
    sequences = make_sequences()
    model = make_model(family)
    unpacked = torch.cat([model(torch.from_numpy(s)[None]).logits[0] for s in sequences])
    unpacked.square().mean().backward()
    expected = gradients(model)
    model.zero_grad()

    packed_model = PackedModel(model, gradient_checkpointing=checkpointing)
    assert packed_model.model.training
    packed = packed_model.hidden(pack(sequences)) @ packed_model.head.weight.T
    torch.testing.assert_close(packed, unpacked, atol=1e-5, rtol=0)
    packed.square().mean().backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("use_cache", [None, True, False], ids=str)
def test_a_cache_changes_nothing(family: str, use_cache: bool | None) -> None:
    batch = pack(make_sequences())
    packed_model = PackedModel(make_model(family))
    trunk = packed_model.model.base_model
    with torch.no_grad():
        expected = packed_model.hidden(batch)
        out = trunk(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            use_cache=use_cache,
            **attention_kwargs(batch, "segments"),
        )
    assert torch.equal(out.last_hidden_state[0], expected)


def test_order_of_packing_is_irrelevant(family: str) -> None:
    sequences = make_sequences()
    order = [3, 0, 4, 2, 1]
    packed_model = PackedModel(make_model(family))
    with torch.no_grad():
        straight = packed_model.hidden(pack(sequences)).split(list(LENGTHS))
        permuted = packed_model.hidden(pack([sequences[i] for i in order]))
    expected = torch.cat([straight[i] for i in order])
    torch.testing.assert_close(permuted, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_poisoned_neighbour_leaves_a_sequence_bitwise_alone(family: str, precision: Any) -> None:
    sequences = make_sequences()
    packed_model = PackedModel(make_model(family), precision=precision)
    with torch.no_grad():
        clean = packed_model.hidden(pack(sequences)).split(list(LENGTHS))
        sequences[1] = (sequences[1] + 1) % VOCAB
        poisoned = packed_model.hidden(pack(sequences)).split(list(LENGTHS))
    for i, (a, b) in enumerate(zip(clean, poisoned, strict=True)):
        assert torch.equal(a, b) == (i != 1)


# refusals


def test_a_packed_model_called_without_boundaries_raises() -> None:
    packed_model = PackedModel(make_model("llama"))
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected"):
        packed_model.model(torch.ones(1, 4, dtype=torch.long))


def unsupported(model_type: str) -> Any:
    from transformers import Gemma2Config, GptOssConfig, MistralConfig

    return {
        "gemma2": lambda: Gemma2Config(),
        "gpt_oss": lambda: GptOssConfig(),
        "mistral": lambda: MistralConfig(),
        "qwen2": lambda: Qwen2Config(**SIZES, use_sliding_window=True, max_window_layers=1),
        "llama": lambda: LlamaConfig(
            **SIZES, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
        ),
        "gpt2": lambda: GPT2Config(reorder_and_upcast_attn=True),
        "qwen3": lambda: Qwen3Config(**SIZES, is_causal=False),
    }[model_type]()


@pytest.mark.parametrize(
    ("model_type", "needs"),
    [
        ("gemma2", "soft-capped attention logits"),
        ("gpt_oss", "attention sinks"),
        ("mistral", r"sliding windows \(sliding_window = 4096\)"),
        ("qwen2", "layers of type sliding_attention"),
        ("llama", "rotary frequencies that change with the batch"),
        ("gpt2", "attention reordered and upcast"),
        ("qwen3", r"attention both ways \(is_causal = False\)"),
    ],
)
def test_unsupported_models_are_refused_by_name(model_type: str, needs: str) -> None:
    with pytest.raises(ValueError, match=f"type '{model_type}' is not supported.*{needs}"):
        check_supported(unsupported(model_type))


def test_supported_models_pass(family: str) -> None:
    check_supported(CONFIGS[family])


@pytest.mark.parametrize(
    ("name", "value"),
    [("sliding_window", 8), ("softcap", 30.0), ("dropout", 0.1), ("s_aux", torch.zeros(2))],
)
def test_what_is_not_computed_is_refused(name: str, value: Any) -> None:
    q, k, v, cu = operands(LENGTHS)
    arguments = {"cu_seqlens": cu, "cu_seqlens_host": cu.numpy(), "max_seqlen": 200, name: value}
    with pytest.raises(ValueError, match=f"{name}: expected none"):
        packed_attention(torch.nn.Identity(), q, k, v, None, **arguments)


def test_a_filled_cache_is_refused() -> None:
    q, k, v, cu = operands(LENGTHS)
    longer = torch.cat([k, k[:, :, :3]], 2)
    with pytest.raises(ValueError, match="packed attention has no past_key_values"):
        packed_attention(
            torch.nn.Identity(),
            q,
            longer,
            v,
            None,
            cu_seqlens=cu,
            cu_seqlens_host=cu.numpy(),
            max_seqlen=200,
        )


# kernels


def operands(lengths: tuple[int, ...], **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(1, 4, T, 16) query, (1, 2, T, 16) key and value, (B+1,) boundaries."""
    rng = torch.Generator().manual_seed(0)
    total = sum(lengths)
    q, k, v = (torch.randn(1, heads, total, 16, generator=rng) for heads in (4, 2, 2))
    cu = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    return q.to(**options), k.to(**options), v.to(**options), cu


def test_kernel_follows_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    assert select_kernel(torch.device("cpu"), torch.bfloat16, 64) == "segments"
    flash = "flash_attn" if attention.importlib.util.find_spec("flash_attn") else "varlen"
    for capability, dtype, head_dim, expected in (
        ((9, 0), torch.bfloat16, 64, flash),
        ((9, 0), torch.float32, 64, "segments"),  # flash kernels do not exist in fp32
        ((9, 0), torch.bfloat16, 512, "segments"),
        ((7, 5), torch.bfloat16, 64, "segments"),
    ):
        select_kernel.cache_clear()
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda _, capability=capability: capability
        )
        assert select_kernel(gpu, dtype, head_dim) == expected
    select_kernel.cache_clear()


def reference_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu: Tensor, scale: float, heads_may_differ: bool
) -> Tensor:
    """Dense attention under a block-diagonal causal mask, in float64."""
    assert heads_may_differ or q.shape[1] == k.shape[1]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    position = torch.arange(q.shape[0])
    block = torch.bucketize(position, cu[1:], right=True)
    visible = (block[:, None] == block[None]) & (position[:, None] >= position[None])
    scores = torch.einsum("qhd,khd->hqk", q.double(), k.double()) * scale
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v.double()).to(q.dtype)


@pytest.mark.parametrize("release", ["2.11", "2.13"])
def test_varlen_adapts_to_the_signature(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's signature in each release, computed densely: all give what the segments give."""

    def torch_2_11(
        query: Any, key: Any, value: Any, cu_q: Any, cu_k: Any, max_q: Any, max_k: Any,
        *, return_aux: Any = None, scale: Any = None, window_size: Any = (-1, -1),
    ) -> Tensor:  # fmt: skip
        assert window_size == (-1, 0)
        return reference_varlen(query, key, value, cu_q, scale, True)

    def torch_2_13(
        query: Any, key: Any, value: Any, cu_q: Any, cu_k: Any, max_q: Any, max_k: Any,
        *, scale: Any = None, window_size: Any = (-1, -1), enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        assert window_size == (-1, 0)
        return reference_varlen(query, key, value, cu_q, scale, enable_gqa)

    kernel = {"2.11": torch_2_11, "2.13": torch_2_13}[release]
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    q, k, v, cu = operands(LENGTHS)
    arguments: dict[str, Any] = {
        "scaling": 0.1,
        "cu_seqlens": cu,
        "cu_seqlens_host": cu.numpy(),
        "max_seqlen": 200,
    }
    module = torch.nn.Identity()
    expected, _ = packed_attention(module, q, k, v, None, **arguments, attention_kernel="segments")
    out, _ = packed_attention(module, q, k, v, None, **arguments, attention_kernel="varlen")
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


def test_varlen_runs_forward_and_backward_on_meta_tensors() -> None:
    q, k, v, cu = operands(LENGTHS, device="meta", dtype=torch.bfloat16)
    operands_ = [x.requires_grad_() for x in (q, k, v)]
    out, _ = packed_attention(
        torch.nn.Identity(),
        *operands_,
        None,
        cu_seqlens=cu.to("meta"),
        cu_seqlens_host=cu.numpy(),
        max_seqlen=200,
        attention_kernel="varlen",
    )
    assert (out.shape, out.dtype) == ((1, sum(LENGTHS), 4, 16), torch.bfloat16)
    out.sum().backward()
    for x in operands_:
        assert x.grad is not None and x.grad.shape == x.shape


@pytest.mark.parametrize("length", [attention._BF16_SEGMENT - 1, attention._BF16_SEGMENT])
def test_segments_under_autocast(length: int) -> None:
    """Both sides of the length that changes dtype err no more than bf16 attention does."""
    q, k, v, cu = operands((length, 3))
    arguments = {"cu_seqlens": cu, "cu_seqlens_host": cu.numpy(), "max_seqlen": length}
    module = torch.nn.Identity()
    exact, _ = packed_attention(module, q, k, v, None, **arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = packed_attention(module, q, k, v.bfloat16(), None, **arguments)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kernel", ["flash_attn", "varlen", "segments"])
def test_cuda_kernels(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and gradients in bf16 against fp32 segments on the host."""
    if kernel == "flash_attn":
        pytest.importorskip("flash_attn")
    q, k, v, cu = operands(LENGTHS)
    host = {"scaling": 0.2, "cu_seqlens_host": cu.numpy(), "max_seqlen": 200}
    results = []
    for device, dtype, name in (
        ("cpu", torch.float32, "segments"),
        ("cuda", torch.bfloat16, kernel),
    ):
        inputs = [x.to(device, dtype).requires_grad_() for x in (q, k, v)]
        out, _ = packed_attention(
            torch.nn.Identity(),
            *inputs,
            None,
            **host,
            cu_seqlens=cu.to(device),
            attention_kernel=name,
        )
        grads = torch.autograd.grad(out.float().square().sum(), inputs)
        results.append([x.float().cpu() for x in (out, *grads)])
    for exact, low in zip(*results, strict=True):
        torch.testing.assert_close(low, exact, atol=0.1, rtol=0.05)
