"""A local concurrency limit: training takes the whole machine, cheap stages share it."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator


class Slots:
    """`total` CPU slots, handed out in the order of asking, so that a wide task is not starved."""

    def __init__(self, total: int) -> None:
        self.total = self.free = total
        self._queue: deque[object] = deque()
        self._changed = asyncio.Condition()

    @contextlib.asynccontextmanager
    async def take(self, count: int | None) -> AsyncIterator[None]:
        """Hold `count` slots, or all of them for None or more than there are."""
        wanted = self.total if count is None else min(count, self.total)
        ticket = object()
        async with self._changed:
            self._queue.append(ticket)
            try:
                await self._changed.wait_for(
                    lambda: self._queue[0] is ticket and self.free >= wanted
                )
                self.free -= wanted
            finally:
                self._queue.remove(ticket)
                self._changed.notify_all()
        try:
            yield
        finally:
            async with self._changed:
                self.free += wanted
                self._changed.notify_all()
