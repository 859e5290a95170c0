"""What CUPTI sees through torch's profiler: launches per call, the slowest kernels, kernel time beside wall time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from ..measure import Bench
from ..operator import Operator, Part
from ..records import Launches, Profile, Record
from . import fisher

NO_DEVICE = "the profiler saw no kernel on a device"
SLOWEST = 12


def kernels(events: Iterable[FunctionEvent]) -> list[tuple[str, float]]:
    """Name and ms of every kernel that ran on the GPU; copies and fills by the driver are none."""
    return [
        (event.name, event.time_range.elapsed_us() / 1e3)
        for event in events
        if event.device_type == DeviceType.CUDA
        and not event.is_user_annotation
        and not event.name.startswith(("Memcpy", "Memset"))
    ]


def traced(bench: Bench, call: Callable[[], object], warm_up: int = 3) -> tuple[list[tuple[str, float]], float]:
    """The kernels of one call, and its wall time in ms."""
    for _ in range(warm_up):  # compiles, builds tables
        call()
    bench.synchronize()
    activities = [ProfilerActivity.CPU]
    if bench.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        start = time.perf_counter()
        call()
        bench.synchronize()
        wall = 1e3 * (time.perf_counter() - start)
    return kernels(profiler.events()), wall


def launches(operators: Iterable[Operator]) -> Part:
    def run(bench: Bench) -> Iterator[Record]:
        for operator in operators:
            for call in operator.calls(bench) if operator.calls else ():
                found, _ = traced(bench, call.run)
                record = Launches(operator.name, call.case, call.groups)
                if found:
                    record.launches = len(found)
                    record.kernels = dict(Counter(name[:120] for name, _ in found))
                else:
                    record.note = NO_DEVICE
                yield record

    return Part("launches per call", 12, run)


def summary(what: str, found: list[tuple[str, float]], wall: float) -> Profile:
    if not found:
        return Profile(what, NO_DEVICE)
    number = Counter(name for name, _ in found)
    total = {name: sum(ms for other, ms in found if other == name) for name in number}
    slowest = [[name[:120], total[name], number[name]] for name in sorted(total, key=lambda n: -total[n])[:SLOWEST]]
    return Profile(what, "", wall, sum(ms for _, ms in found), len(found), slowest)


def fisher_profile(dtype: torch.dtype) -> Callable[[Bench], Iterator[Record]]:
    def run(bench: Bench) -> Iterator[Record]:
        work = fisher.work(bench, dtype)
        problem = work.large()
        for name, contender in ((fisher.PLAIN, fisher.plain), ("ours", fisher.ours)):
            yield summary(f"{work.what}: {name}", *traced(bench, contender(problem), warm_up=2))

    return run


def stream_profiles(operators: Iterable[Operator]) -> Callable[[Bench], Iterator[Record]]:
    """Kernel time beside wall time of one call at full size: what the host adds when nothing is queued before it."""

    def run(bench: Bench) -> Iterator[Record]:
        for operator in operators:
            for timed in operator.timed:
                if timed.goal and operator.name != "per_sample_squared_grad_":
                    for work in timed.works(bench):
                        yield summary(f"{work.operator}, {work.what}", *traced(bench, work.ours(work.large())))
                        bench.release()

    return run
