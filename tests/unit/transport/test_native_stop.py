"""How the `native` transport stops while other work hangs."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

from tests.helpers.waiting import WAIT_SECONDS
from tests.unit.transport.fronts import Server


def test_hanging_look_ups_do_not_delay_a_stop(server: Server) -> None:
    """A server stops although each thread of its event loop waits, for example for DNS."""

    async def stop_while_threads_wait() -> None:
        loop, answered = asyncio.get_running_loop(), threading.Event()
        loop.set_default_executor(ThreadPoolExecutor(1))
        hanging = loop.run_in_executor(None, answered.wait)
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                await server.stop(0.1)
            assert server.front.closed
            assert not hanging.done()
        finally:
            answered.set()

    # An event loop of this test alone: others need their threads.
    asyncio.run(stop_while_threads_wait())


async def test_a_second_stop_waits_for_the_first(server: Server) -> None:
    """Whoever stops the server again gets control back once it is closed, and not before."""
    slow = threading.Event()
    close = server.front.close

    def close_slowly() -> None:
        slow.wait(WAIT_SECONDS)
        close()

    server.front.close = close_slowly  # type: ignore[method-assign]
    first = asyncio.create_task(server.close())
    second = asyncio.create_task(server.close())
    done, _ = await asyncio.wait([first, second], timeout=0.05)
    assert not done
    slow.set()
    async with asyncio.timeout(WAIT_SECONDS):
        await asyncio.gather(first, second)
    assert server.front.closed
