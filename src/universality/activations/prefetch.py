"""Compute the next items of an iterator in the background while the last ones are used."""

import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

T = TypeVar("T")

_POLL = 0.05  # seconds after which a waiting producer looks whether anyone still wants its items
_END = object()


class _Failure:
    def __init__(self, error: BaseException):
        self.error = error


def prefetch(items: Iterator[T], depth: int = 1) -> Generator[T, None, None]:
    """Pass `items` on, made by a thread of their own at most `depth` items ahead of the one being made.

    So `depth` + 2 items exist at a time: one made, `depth` waiting, one used. An exception of the iterator is raised
    here, after the items before it. Closing the generator, which leaving a loop over it does, ends the thread.
    """
    ready: queue.Queue = queue.Queue(maxsize=depth)
    stop = threading.Event()
    thread = threading.Thread(target=_produce, args=(items, ready, stop), daemon=True, name="prefetch")
    thread.start()
    try:
        while (item := ready.get()) is not _END:
            if isinstance(item, _Failure):
                raise item.error
            yield item
            del item  # or it would live on while the next is waited for
    finally:
        stop.set()
        thread.join()


def _produce(items: Iterator, ready: queue.Queue, stop: threading.Event) -> None:
    try:
        for item in items:
            if not _hand_over(item, ready, stop):
                return
            del item
        _hand_over(_END, ready, stop)
    except BaseException as error:  # whatever it is, the consumer is to see it
        _hand_over(_Failure(error), ready, stop)
    finally:
        close = getattr(items, "close", None)
        if close is not None:
            close()


def _hand_over(item: object, ready: queue.Queue, stop: threading.Event) -> bool:
    """Wait for room; False if nobody wants the item any more."""
    while not stop.is_set():
        try:
            ready.put(item, timeout=_POLL)
        except queue.Full:
            continue
        return True
    return False
