"""The most memory that a run has held: of the GPU, or of the process."""

import sys
from pathlib import Path

import torch


def reset_peak() -> None:
    """Start counting anew, where the system lets us."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, proc(5)


def peak_bytes() -> int:
    """Bytes at the peak since `reset_peak`; on systems that cannot be reset, since the process started."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        (line,) = [line for line in lines if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
