"""The local concurrency limit."""

import asyncio

from vlfoundry.flows.slots import Slots


def test_a_wide_task_is_alone_and_is_not_starved() -> None:
    log: list[str] = []

    async def hold(slots: Slots, name: str, count: int | None) -> None:
        async with slots.take(count):
            log.append(f"+{name}")
            await asyncio.sleep(0.01)
            log.append(f"-{name}")

    async def scenario() -> None:
        slots = Slots(2)
        asked = [("a", 1), ("b", 1), ("wide", None), ("c", 1)]
        await asyncio.gather(*(hold(slots, name, count) for name, count in asked))
        assert slots.free == 2

    asyncio.run(scenario())
    assert log[:2] == ["+a", "+b"]
    assert log[4:6] == ["+wide", "-wide"]  # before c, which asked later though it would have fitted
    assert log[6:] == ["+c", "-c"]


def test_a_waiting_task_that_is_cancelled_frees_the_queue() -> None:
    async def scenario() -> None:
        slots = Slots(1)
        async with slots.take(1):
            waiting = asyncio.create_task(slots.take(1).__aenter__())
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        async with asyncio.timeout(1), slots.take(1):
            assert slots.free == 0

    asyncio.run(scenario())
