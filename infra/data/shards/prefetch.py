"""Batches that worker processes make ahead of the step that needs them."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from vlfoundry.infra.core.errors import KilledError, UserError, ending
from vlfoundry.infra.core.process import die_with_parent

DEPTH = 2
"""batches that each worker makes ahead"""


class Prefetch:
    """`batch_at`, asked from forked workers for the steps that come next.

    `batch_at` must be a function of the step alone, so that neither how many workers there are nor
    where a run resumes changes a batch, and there is nothing to save. Tensors come through shared
    memory; anything else is pickled, so give pictures as uint8 tensors. At most DEPTH batches a
    worker wait. A UserError of a worker is raised here as it was. Workers end with this process,
    even if it is killed, and leave Ctrl-C to it.

    Args:
        batch_at: makes the batch of a step.
        steps: steps of the whole run.
        workers: processes; 0: batches are made here, when they are asked for.
    """

    def __init__(self, batch_at: Callable[[int], Any], *, steps: int, workers: int) -> None:
        self._batch_at, self._steps, self._workers = batch_at, steps, workers
        self._batches: Any = None
        self._last: tuple[int, Any] = (-1, None)
        self._next = -1

    def __call__(self, step: int) -> Any:
        if not self._workers:
            return self._batch_at(step)
        if step == self._last[0]:  # after a dry run
            return self._last[1]
        if step != self._next:
            self.close()
            self._batches = self._start(step)
        try:
            batch = next(self._batches)
            if isinstance(batch, _Failed):
                raise batch.error
        except RuntimeError as error:
            killed = self._killed()
            self.close()
            if killed is None:
                raise
            raise KilledError(f"a worker that makes batches {ending(killed)}: {error}") from error
        except BaseException:
            self.close()
            raise
        self._last, self._next = (step, batch), step + 1
        return batch

    def close(self) -> None:
        """End the workers; the next call starts others.

        A DataLoader waits for them when it is collected, which an exception's traceback puts off
        until any thread collects garbage: one of the threads that would tell the workers to end, if
        it comes badly, and then everything waits for torch's five seconds a worker.
        """
        if self._batches is not None:
            self._batches._shutdown_workers()
        self._batches, self._next = None, -1

    def _killed(self) -> int | None:
        """Exit code of a worker that has ended unasked."""
        codes = [worker.exitcode for worker in self._batches._workers]
        return next((code for code in codes if code), None)

    def _start(self, first: int) -> Any:
        import torch
        from torch.utils.data import DataLoader

        parent = os.getpid()
        before = signal.getsignal(signal.SIGCHLD)
        loader = DataLoader(
            _Steps(self._batch_at),  # pyrefly: ignore[bad-argument-type]
            sampler=range(first, self._steps),
            batch_size=None,
            collate_fn=lambda batch: batch,  # the default turns tuples into lists
            num_workers=self._workers,
            prefetch_factor=DEPTH,
            multiprocessing_context="fork",
            worker_init_fn=lambda _: _be_worker(parent),
            generator=torch.Generator(),  # else it draws from the one that dropout draws from
        )
        with _born_deaf_to_ctrl_c():
            batches = iter(loader)
        if threading.current_thread() is threading.main_thread():
            # torch's raises the death of a worker wherever this process happens to be; we hear of
            # it, within 5 s, when we wait for a batch.
            signal.signal(signal.SIGCHLD, before)
        return batches


class _Failed:
    """A mistake of the user on its way out of a worker."""

    def __init__(self, error: UserError) -> None:
        self.error = error


class _Steps:
    def __init__(self, batch_at: Callable[[int], Any]) -> None:
        self._batch_at = batch_at

    def __getitem__(self, step: int) -> Any:
        try:
            return self._batch_at(step)
        except UserError as error:
            return _Failed(error)


@contextlib.contextmanager
def _born_deaf_to_ctrl_c() -> Iterator[None]:
    """A Ctrl-C that reaches a worker before it could say that it ignores it would end it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _be_worker(parent: int) -> None:
    die_with_parent(signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before we could ask
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
