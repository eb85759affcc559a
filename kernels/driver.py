"""Whether Triton compiles for the GPU of this process: asked once, at import, as no compiler can trace the question."""

from triton.runtime import driver

OLDEST = 80  # compute capability: tensor cores for bfloat16 and float64, and the shared memory that the tiles take


def find_problem() -> str | None:
    """Why kernels cannot run on the GPU; None if they can."""
    try:
        target = driver.active.get_current_target()
    except RuntimeError as error:  # no driver, or none of those that Triton knows
        return f"Triton finds no GPU that it knows: {error}"
    if target.backend == "cuda" and target.arch < OLDEST:
        return f"kernels need compute capability 8.0, got {target.arch / 10}"
    return None


PROBLEM = find_problem()
