"""How much a child process costs, on a machine that may be busy."""

import resource
from collections.abc import Callable


def least_cpu_s(run: Callable[[], object], enough: float, tries: int = 3) -> float:
    """CPU-seconds of the children that `run` starts and waits for: the least of some tries.

    What else runs makes the same work cost more, never less; so one try below `enough` ends it.
    """
    least = float("inf")
    for _ in range(tries):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        least = min(least, spent)
        if least < enough:
            break
    return least
