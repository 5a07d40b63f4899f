"""Time and memory of calls: fairly, repeatedly, and with every sample kept.

CUDA: events around one call on each of several input sets which together are larger than twice the
L2 cache, so a call finds nothing of its inputs there; where a call is shorter than its launch, the
calls are captured into a CUDA graph and its replay is timed, unless the call makes the host wait or
is a loop of launches (`LAUNCH_LOOP`), which nobody runs as a graph. CPU: perf_counter around as
many calls as fill `MIN_SAMPLE`, on one input set: caches are warm, and so are those of the copy
that bounds what a call can reach. What is compared takes turns: A B C A B C …; beside something
slow, a turn of something quick is several samples, as many in every round.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

import torch
from torch._C._autograd import _enable_record_function

Work = Callable[[], object]

MIN_SAMPLE = 0.001  # seconds; short, so that on a busy machine some samples are undisturbed
LONG_CALL = 0.1  # seconds; what takes longer needs no other warm-up than the call that was checked
MIN_ROUNDS, MAX_ROUNDS = 3, 100
FEW, FEW_SECONDS = 10, 0.5  # so many rounds are worth so long, whatever the budget
REST_AFTER, REST = 0.005, 0.2  # seconds of work on a GPU, and of rest before the next sample
LAUNCH_LOOP = 0.002  # seconds that a call's launches take the host: one input set, and no graph
TURN, MAX_TURN = 0.1, 10  # of the slowest one's sample, as long a turn may be; samples in it


def steady_allocator() -> None:
    """Make glibc keep what is freed, below 32 MB, as it does by itself in a process that ran long.

    Otherwise whether a call has its pages mapped anew, every time, depends on what ran before it.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


class Timer:
    """Takes samples of one kind of call.

    Args:
        calls: one per input set; a sample runs each of them equally often. The first was called
            before, or is short.
        device: where they run.
        graph: time a CUDA graph of them, where that can be captured.

    Attributes:
        mode: "perf_counter", "events" or "graph".
        note: why it is not the mode that was asked for; else empty.
        length: seconds of the latest sample, all its calls together; 0 before the first.
        problem: what a call raised while it was timed; None: nothing.
    """

    def __init__(self, calls: Sequence[Work], device: torch.device, graph: bool = False) -> None:
        self._calls, self._device, self.note = calls, device, ""
        self._replay: Work | None = None
        self.mode, self.length = "perf_counter", 0.0
        self.problem: Exception | None = None
        self._repeats = 0  # until the first sample
        if device.type == "cuda":
            self.mode = "events"
            calls[0]()  # compiles, grows pools
            took = self._launch_time()
            if graph and took > LAUNCH_LOOP:
                self._calls = calls[:1]
                self.note = f"{took * 1e3:.0f} ms of launches: timed with them"
                return
            for call in self._calls:
                call()
            torch.cuda.synchronize(device)
            if graph:
                self._replay = self._capture()

    def _launch_time(self) -> float:
        """Seconds that the host takes to launch the first call."""
        torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        self._calls[0]()
        took = time.perf_counter() - start
        torch.cuda.synchronize(self._device)
        return took

    def _capture(self) -> Work | None:
        # Capture of a call that waits cannot be ended, and leaves the allocator and the stream as
        # they are inside it: what waits is found beforehand.
        try:
            torch.cuda.set_sync_debug_mode("error")
            self._calls[0]()
        except RuntimeError as error:
            self.note = f"no CUDA graph ({str(error).splitlines()[0]}): timed with launches"
            return None
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._outputs = [call() for call in self._calls]  # the graph writes to them
        self.mode = "graph"
        return graph.replay

    def _all(self) -> None:
        if self._replay is not None:
            self._replay()
            return
        for call in self._calls:
            call()

    def sample(self) -> float:
        """Seconds of one call, a mean over those of one sample.

        A GPU's clock falls with the power of the last tenths of a second: after matrix products it
        rests, or who comes after something idle would win.
        """
        if self._device.type == "cuda" and self.length > REST_AFTER:
            time.sleep(REST)
        if not self._repeats:
            self._repeats = 1
            first = self._time()
            if self.length >= LONG_CALL:
                return first
            self._time()  # fills caches
            self._time()
            self._repeats = max(1, math.ceil(MIN_SAMPLE / self.length))
        return self._time()

    def _time(self) -> float:
        if self._device.type != "cuda":
            start = time.perf_counter()
            for _ in range(self._repeats):
                self._all()
            self.length = time.perf_counter() - start
        else:
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            for _ in range(self._repeats):
                self._all()
            after.record()
            after.synchronize()
            self.length = float(before.elapsed_time(after)) / 1e3
        return self.length / (self._repeats * len(self._calls))


def take_turns(timers: Mapping[str, Timer], budget: float) -> dict[str, list[float]]:
    """Samples of every timer: one of each in the first round, then one turn of each per round.

    One that raises has no more turns, and its `problem` is set.

    A turn is one sample, or up to `MAX_TURN` that together take at most `TURN` of the time of the
    slowest one's sample.

    Args:
        timers: by name.
        budget: seconds for all rounds; there are at least `MIN_ROUNDS`, or `FEW` of them if these
            take less than `FEW_SECONDS`, and at most `MAX_ROUNDS`.
    """
    samples: dict[str, list[float]] = {name: [] for name in timers}
    turns = dict.fromkeys(timers, 1)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for round_ in range(MAX_ROUNDS):
            spent = time.perf_counter() - start
            allowed = budget if round_ >= FEW else max(budget, FEW_SECONDS)
            if round_ >= MIN_ROUNDS and spent * (round_ + 1) / round_ > allowed:
                break
            running = {name: timer for name, timer in timers.items() if timer.problem is None}
            for name, timer in running.items():
                try:
                    samples[name] += [timer.sample() for _ in range(turns[name])]
                except Exception as problem:
                    timer.problem = problem
            if round_ == 0:
                longest = TURN * max(timer.length for timer in running.values())
                for name, timer in running.items():
                    if timer.problem is None:
                        turns[name] = max(1, min(MAX_TURN, int(longest / timer.length)))
    finally:
        if collecting:
            gc.enable()
    return samples


def peak_memory(call: Work, device: torch.device) -> int:
    """Bytes of tensors that a call holds at most, beyond what was there before; results included.

    By torch's allocator: on CUDA by its high-water mark, on a CPU by adding up the allocations that
    torch's profiler records. What a library allocates by other means is not seen.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would tell stderr of each start and stop
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        # without the ops: they are most of what it records
        _enable_record_function(False)
        try:
            call()
        finally:
            _enable_record_function(True)
    recorded = profiler.profiler.kineto_results.events() if profiler.profiler else []
    changes = [(e.start_ns(), e.nbytes()) for e in recorded if e.name() == "[memory]"]
    return int(max(accumulate((n for _, n in sorted(changes)), initial=0)))


def rotated_sets(nbytes: int, device: torch.device) -> int:
    """How many input sets of `nbytes` are larger than twice the L2 cache; 1 on a CPU."""
    if device.type != "cuda":
        return 1
    l2 = int(torch.cuda.get_device_properties(device).L2_cache_size)
    return 1 + 2 * l2 // max(nbytes, 1)
