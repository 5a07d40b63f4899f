"""Launches of the scans and of whitening on meta tensors, for compiling ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from fastppo_kernels.gae import gae_fwd
from fastppo_kernels.gae_classic import gae_classic_fwd
from fastppo_kernels.whiten import whiten

TOKENS, SEQUENCES = 1 << 21, 48  # 2048 blocks: as many moments as need a stage of their own
SHORT = 1000  # tokens in the longest sequence, so that one launch does
STEPS = 128


def _floats(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def _bools(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bool, device="meta")


def _offsets() -> Tensor:
    return torch.empty(SEQUENCES + 1, dtype=torch.int32, device="meta")


def _gae(max_seqlen: int | None, options: bool) -> None:
    n, b = TOKENS, SEQUENCES
    given: dict[str, Tensor] = {}
    if options:
        given = {"mask": _bools(n), "kl": _floats(n), "scores": _floats(b)}
        given |= {"bootstrap": _floats(b), "discounts": _floats(3, b).double()}
    launcher = partial(gae_fwd, _floats(n), _offsets(), rewards=_floats(n), **given)  # type: ignore[arg-type]
    launcher(gamma=0.99, gae_lambda=0.95, max_seqlen=max_seqlen, with_moments=options)


def _classic(envs: int, options: bool) -> None:
    shape = STEPS, envs
    truncated, final = (_bools(*shape), _floats(*shape)) if options else (None, None)
    r, v, following, terminated = _floats(*shape), _floats(*shape), _floats(envs), _bools(*shape)
    gae_classic_fwd(r, v, following, terminated, truncated, final, 0.99, 0.95)


def scan_launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """(suffix of its cases, what launches them)."""
    for plan, hint in (("one launch", SHORT), ("two launches", None)):
        yield plan, partial(_gae, hint, False)
        yield f"{plan} options", partial(_gae, hint, True)
    for envs in (8, 4096):
        yield f"{envs} envs", partial(_classic, envs, False)
        yield f"{envs} envs options", partial(_classic, envs, True)
    yield "fp32", partial(whiten, _floats(TOKENS), None, True, 1e-8)
    yield "fp32 options", partial(whiten, _floats(TOKENS), _bools(TOKENS), False, 1e-8)
