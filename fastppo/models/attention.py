"""Attention over packed sequences: no padding, and never across a sequence boundary.

A packed batch is one row of T tokens in which B sequences lie back to back; `cu_seqlens` (B+1,)
marks the boundaries. transformers detects packing from `position_ids` only while there is neither
a mask nor a cache, and attends across sequences, silently, otherwise. Here the boundaries are
explicit: they travel to the attention function as model arguments, and without them it raises.

The function is registered with transformers as `fastppo`, without a mask function, so no T x T
mask is ever built. It computes, for each sequence by itself, softmax(q k^T * scaling, causal) v:

- `flash_attn`: FlashAttention-2 (https://arxiv.org/abs/2307.08691), where the package is installed
- `varlen`: torch's own flash kernel, `torch.nn.attention.varlen.varlen_attn`
- `segments`: one `scaled_dot_product_attention` per sequence; CPU, and fp32 on CUDA, for which
  flash kernels do not exist

Not here: sliding windows, soft-capping, attention sinks. `check_supported` refuses models that need
them by name.

Shapes: T packed tokens, B sequences, Hq query heads, Hkv key/value heads (Hq a multiple of Hkv), D
head dimension.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface

if TYPE_CHECKING:
    import numpy as np

    from fastppo.data.sequences import PackedSequences
    from fastppo.models.kv_cache import KVCache

NAME = "fastppo"
"""Name under which the attention function is registered with transformers."""

FAMILIES: Mapping[str, tuple[str, str]] = {
    "llama": ("layers", "norm"),
    "qwen2": ("layers", "norm"),
    "qwen3": ("layers", "norm"),
    "gpt2": ("h", "ln_f"),
}
"""Supported `model_type` → attributes of the trunk's decoder layers and of its final norm."""

_FAMILY_NEEDS: Mapping[str, str] = {
    "cohere": "scaled logits",
    "cohere2": "scaled logits",
    "gpt_oss": "attention sinks",
    "granite": "scaled logits",
}
"""What a family needs that its configuration does not show."""

_CONFIG_NEEDS: Mapping[str, str] = {
    "attn_logit_softcapping": "soft-capped attention logits",
    "final_logit_softcapping": "soft-capped final logits",
    "attention_chunk_size": "chunked attention",
    "add_cross_attention": "cross-attention",
    "is_encoder_decoder": "cross-attention",
    "reorder_and_upcast_attn": "attention reordered and upcast",
}
"""Configuration attribute → what a model needs when the attribute is set."""

Kernel = Literal["flash_attn", "varlen", "segments"]

_BF16_SEGMENT = 192
"""Under bf16 autocast on a CPU, segments shorter than this run in fp32. torch's bf16 attention is
slower there in the backward pass: 32 x 50 tokens, 9 heads of 64, 1 thread of an AMX Xeon: 51 ms
against 18 ms, equal at about 192 tokens. A sequence's length alone decides, so its result does not
depend on its neighbours or on whether gradients are recorded."""


def check_supported(config: Any) -> None:
    """Refuse a model that packed attention would compute wrongly.

    Args:
        config: the model's transformers configuration.

    Raises:
        ValueError: naming the model type and what it needs that is missing here.
    """
    model_type = config.model_type
    needs = [_FAMILY_NEEDS[model_type]] if model_type in _FAMILY_NEEDS else []
    for name, what in _CONFIG_NEEDS.items():
        if value := getattr(config, name, None):
            needs.append(f"{what} ({name} = {value})")
    if not getattr(config, "is_causal", True):
        needs.append(f"attention both ways (is_causal = {config.is_causal})")
    layer_types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if layer_types is not None:
        if other := sorted(set(layer_types) - {"full_attention"}):
            needs.append(f"layers of type {', '.join(other)} (sliding_window = {window})")
    elif window is not None and getattr(config, "use_sliding_window", True):
        needs.append(f"sliding windows (sliding_window = {window})")
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if "dynamic" in rope_type or rope_type == "longrope":
        needs.append(f"rotary frequencies that change with the batch (rope_type = {rope_type!r})")
    if not needs and model_type in FAMILIES:
        return
    missing = "; it needs " + ", ".join(needs) if needs else ""
    raise ValueError(
        f"model: type {model_type!r} is not supported by packed attention{missing}. "
        f"Expected one of {', '.join(FAMILIES)} with full causal attention in every layer"
    )


def is_supported(config: Any) -> bool:
    """Whether `check_supported` accepts it."""
    try:
        check_supported(config)
    except ValueError:
        return False
    return True


@functools.cache
def select_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> Kernel:
    """The attention kernel for a device and a compute dtype.

    A choice by capability: an installed kernel that fails is an error, not a reason to use another.
    """
    flash = (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and head_dim <= 256  # both flash kernels stop there
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )
    if not flash:
        return "segments"
    return "flash_attn" if importlib.util.find_spec("flash_attn") is not None else "varlen"


def any_shape_attention() -> contextlib.AbstractContextManager[None]:
    """Inside, `scaled_dot_product_attention` takes none of the kernels that are planned for each
    shape anew: cuDNN's, the default on Hopper GPUs, spends tenths of a second on a shape that it
    has not seen, and a batch that is decoded, or padded to its longest, has another at each step.
    """
    return sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )


def attention_kwargs(batch: PackedSequences, kernel: Kernel) -> dict[str, Any]:
    """Arguments for a transformers model that carry the boundaries of `batch` to the attention."""
    return {
        "cu_seqlens": batch.cu_seqlens,
        "cu_seqlens_host": batch.cu_seqlens_host,
        "max_seqlen": batch.max_seqlen,
        "attention_kernel": kernel,
    }


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_host: np.ndarray | None = None,
    max_seqlen: int | None = None,
    attention_kernel: Kernel = "segments",
    kv_cache: KVCache | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each packed sequence to itself, in the form transformers calls.

    Args:
        module: the calling attention layer; its `layer_idx` is read where there is a cache.
        query: (1, Hq, T, D); key, value: (1, Hkv, T, D).
        attention_mask: must be None; the boundaries say everything.
        scaling: factor on q k^T; None is D^-0.5.
        dropout, sliding_window, softcap, s_aux: must be off.
        cu_seqlens: (B+1,) int32 on the query's device; cu_seqlens_host: the same numbers on the
            host; max_seqlen: the longest sequence; attention_kernel: see `select_kernel`.
        kv_cache: keeps the keys and values; once it is decoding, each of the T tokens attends to
            the sequence that it continues, and the boundaries are not read.

    Returns:
        (1, T, Hq, D) in the value's dtype, and None for the weights.

    Raises:
        ValueError: boundaries missing, or something asked for that is not computed here.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if kv_cache is not None:
        layer: int = module.layer_idx  # type: ignore[assignment]
        kv_cache.write(layer, key, value)
        if kv_cache.decoding:
            return kv_cache.attend(layer, query, scale), None
    if cu_seqlens is None or cu_seqlens_host is None or max_seqlen is None:
        raise ValueError(
            "cu_seqlens: expected the sequence boundaries of a packed batch, got none. This model "
            "is set to packed attention, which never guesses them. Inside `with "
            "step.policy.unpacked() as model:`, or PackedModel.unpacked(), it is an ordinary one"
        )
    for name, given in (
        ("attention_mask", attention_mask is not None),
        ("sliding_window", sliding_window is not None),
        ("softcap", softcap is not None),
        ("s_aux", s_aux is not None),
        ("dropout", dropout != 0.0),
    ):
        if given:
            raise ValueError(f"{name}: expected none in packed attention, got one")
    tokens = int(cu_seqlens_host[-1])
    if query.shape[0] != 1 or query.shape[2] != tokens or key.shape[2] != tokens:
        raise ValueError(
            f"query, key: expected (1, heads, T, D) with T = cu_seqlens[-1] = {tokens}, got "
            f"{tuple(query.shape)} and {tuple(key.shape)}; packed attention has no past_key_values"
        )
    if attention_kernel == "segments":
        return _segments(query, key, value, cu_seqlens_host, scale), None
    low = torch.is_autocast_enabled("cuda")  # which does not reach these kernels by itself
    dtype = torch.get_autocast_dtype("cuda") if low else value.dtype
    q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))  # (T, H, D)
    out = _FLASH[attention_kernel](q, k, v, cu_seqlens, max_seqlen, scale)
    return out.to(value.dtype)[None], None


def _segments(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_host: np.ndarray, scale: float) -> Tensor:
    """One SDPA call per sequence: (1, Hq, T, D), (1, Hkv, T, D) twice → (1, T, Hq, D).

    Measured against right-padded and length-grouped batches of the same sequences: the plain loop
    was the fastest of them at every mix of lengths tried, forward and backward.
    """
    lengths = [int(n) for n in cu_seqlens_host[1:] - cu_seqlens_host[:-1]]
    device = q.device.type
    autocast = torch.is_autocast_enabled(device)
    low = torch.get_autocast_dtype(device) if autocast else v.dtype
    out = []
    with torch.autocast(device, enabled=False):
        for segment in zip(*(x.split(lengths, 2) for x in (q, k, v)), strict=True):
            short = device == "cpu" and segment[0].shape[2] < _BF16_SEGMENT
            dtype = torch.float32 if autocast and short else low
            q_i, k_i, v_i = (x.to(dtype) for x in segment)
            if device != "cpu":  # fused CUDA kernels want equal heads in fp32
                k_i, v_i = (_repeat_heads(x, q.shape[1]) for x in (k_i, v_i))
            o_i = F.scaled_dot_product_attention(
                q_i, k_i, v_i, is_causal=True, scale=scale, enable_gqa=device == "cpu"
            )
            out.append(o_i.transpose(1, 2).to(v.dtype))
    return torch.cat(out, 1)


def _flash_attn(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> Tensor:
    """The flash-attn package, version 2: (T, Hq, D), (T, Hkv, D) twice → (T, Hq, D)."""
    from flash_attn import flash_attn_varlen_func

    out: Tensor = flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, softmax_scale=scale, causal=True
    )
    return out


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> Tensor:
    """torch's flash kernel: (T, Hq, D), (T, Hkv, D) twice → (T, Hq, D).

    The arguments grew over the releases, so they are read from the signature. Grouped heads work in
    2.11 too, which has no word for them: the same bits come out as of repeated ones.
    """
    from torch.nn.attention.varlen import varlen_attn

    accepted = _parameters(varlen_attn)
    options: dict[str, Any] = {"window_size": (-1, 0), "scale": scale}
    if "enable_gqa" in accepted:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)
    assert isinstance(out, Tensor)
    return out


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


@functools.cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


_FLASH: Mapping[str, Callable[..., Tensor]] = {"flash_attn": _flash_attn, "varlen": _varlen}

AttentionInterface.register(NAME, packed_attention)
