"""How much memory a computation holds at its peak, as the allocator sees it."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(run: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """The most bytes that tensors made by `run` hold at one time, on one device.

    Every allocation counts, also temporary ones inside an operation and what autograd keeps out of Python's sight;
    tensors that were there before do not.

    Raises: ValueError for a device other than cpu and cuda.

    >>> x = torch.zeros(1000, requires_grad=True)
    >>> peak_bytes(lambda: x.sin().sin())
    8000
    """
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if kind != "cpu":
        raise ValueError(f"peak_bytes needs a cpu or cuda device, got {kind}; choose one of them")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
