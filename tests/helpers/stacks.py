"""Says where a hung test waits: the stacks of all asyncio tasks."""

import asyncio
import gc
import inspect
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import Any

__all__ = ["task_stacks"]

# Deeper than any chain of awaits here.
_DEPTH_MAX = 50


def task_stacks() -> str:
    """Return the stack of each unfinished task, from the outermost coroutine to the line that
    waits, for the loops of all threads.

    The traceback of a hung asynchronous test ends in the event loop, and `Task.print_stack` shows
    only the outermost coroutine of a suspended task.
    """
    # By the type alone: `isinstance` asks the objects, and some frameworks' then do work.
    tasks: list[asyncio.Task[Any]] = [
        found for found in gc.get_objects() if issubclass(type(found), asyncio.Task)
    ]
    return "\n".join(
        f"Task {task.get_name()}\n{''.join(map(_line, _frames(task.get_coro())))}"
        for task in tasks
        if not task.done()
    )


def _frames(waiting: Any) -> Iterator[FrameType]:
    """Yield the frames of a coroutine and of everything that it awaits."""
    for _ in range(_DEPTH_MAX):
        if inspect.iscoroutine(waiting):
            frame, waiting = waiting.cr_frame, waiting.cr_await
        elif inspect.isgenerator(waiting):
            frame, waiting = waiting.gi_frame, waiting.gi_yieldfrom
        elif inspect.isasyncgen(waiting):
            frame, waiting = waiting.ag_frame, waiting.ag_await
        else:
            # What `__anext__` returns has no attribute for its generator.
            generators = filter(inspect.isasyncgen, gc.get_referents(waiting))
            if (waiting := next(generators, None)) is None:
                return
            continue
        if frame is not None:
            yield frame


def _line(frame: FrameType) -> str:
    return "".join(traceback.StackSummary.extract([(frame, frame.f_lineno)]).format())
