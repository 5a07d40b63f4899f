"""The second stage of a reduction in the launch of the first.

Every program stores its part, then arrives at a counter. The program that arrives last reads all
parts, in the order of their programs, and writes the result. Which one is last depends on timing;
what it computes does not: same input, same bits. There are no atomics on floats.

Why the last program sees every part, in the words of the PTX memory model:

  program i   parts stored by any thread
              barrier                     orders them before what thread 0 does next
              atomic add, acq_rel, gpu    releases them to whoever reads the counter from here on
  the last    atomic add, acq_rel, gpu    read the sum of all arrivals, so it synchronises with each
              barrier                     orders that before what the other threads do next
              parts loaded by any thread

The chain is complete because read-modify-writes continue the release of those before them.
Causality is transitive across it, barriers included. The counter then gets its 0 back from the
last program, when nobody is left to touch it; the next launch that uses it starts after this one
has ended, as long as both are in one stream. `arrival_counter` sees to that.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def is_last(arrivals_ptr, num_programs):
    """True in the last of `num_programs` programs that get here; it may read what they stored."""
    tl.debug_barrier()
    arrived = tl.atomic_add(arrivals_ptr, 1, sem="acq_rel", scope="gpu")
    last = arrived == num_programs - 1
    if last:
        tl.store(arrivals_ptr, 0)
    tl.debug_barrier()
    return last


@triton.jit
def load_valid(ptr, offs, inside, valid):
    """Numbers of valid tokens as float32, 0 for the others, whatever they hold."""
    return tl.where(valid, tl.load(ptr + offs, mask=inside, other=0.0).to(tl.float32), 0.0)


@triton.jit
def four(a, b, c, d):
    """Four tensors in two new, minor dimensions: a, b, c, d in memory order."""
    return tl.join(tl.join(a, c), tl.join(b, d))


class Counters:
    """Who uses which row of `memory` (M, any): an int32 counter, 0 between launches."""

    def __init__(self, memory: Tensor) -> None:
        self._free = list(memory.unbind())
        self._of_stream: dict[int, Tensor] = {}
        self._lock = Lock()

    def of_stream(self, stream: int) -> Tensor | None:
        """The counter of this stream, always the same; None where all are taken."""
        counter = self._of_stream.get(stream)
        if counter is not None:
            return counter
        with self._lock:
            if stream not in self._of_stream and self._free:
                self._of_stream[stream] = self._free.pop()
            return self._of_stream.get(stream)

    def new(self) -> Tensor | None:
        """A counter that nobody else will get; None where all are taken."""
        with self._lock:
            return self._free.pop() if self._free else None


# 16 bytes each: Triton compiles a kernel anew for a pointer of another alignment.
SHAPE = (4096, 4)
_counters: dict[int, Counters] = {}
_creation = Lock()


def _zeros(device: torch.device) -> Tensor:
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        memory = torch.zeros(SHAPE, dtype=torch.int32, device=device)
        done = torch.cuda.Event()
        done.record(stream)
    done.synchronize()  # other streams will use it; this waits for one small fill, once
    return memory


def _create(device: torch.device) -> Counters:
    # A thread and a stream of its own: what they allocate is in no memory pool that the caller may
    # be filling for a CUDA graph, which would take the memory back.
    with ThreadPoolExecutor(1) as thread:
        return Counters(thread.submit(_zeros, device).result())


def arrival_counter(device: torch.device) -> Tensor:
    """An int32 tensor whose first element is 0 when the next launch on the current stream starts,
    for the device of a tensor.

    One per stream, because launches of one stream follow one another. A launch that is captured in
    a CUDA graph gets one of its own, since the graph may run in any stream, beside other graphs;
    and a graph never runs beside itself. Neither needs a launch to clear it. When the 4096 of a
    device are gone, or the first launch of all is a captured one, a fill before it does.
    """
    if device.type == "cuda":
        capturing = torch.cuda.is_current_stream_capturing()
        counters = _counters.get(device.index)
        if counters is None and not capturing:
            with _creation:
                counters = _counters.get(device.index) or _create(device)
                _counters[device.index] = counters
        if counters is not None:
            stream = torch.cuda.current_stream(device).cuda_stream
            counter = counters.new() if capturing else counters.of_stream(stream)
            if counter is not None:
                return counter
    return torch.zeros(SHAPE[1], dtype=torch.int32, device=device)
