import threading
import time

import pytest

from universality.activations.prefetch import prefetch


def prefetching() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_items_come_in_order_and_the_thread_ends():
    assert list(prefetch(iter(range(100)), depth=3)) == list(range(100))
    assert prefetching() == []


def test_an_error_comes_after_the_items_before_it():
    def failing():
        yield from (1, 2)
        raise OSError("the disk is gone")

    seen = []
    with pytest.raises(OSError, match="the disk is gone"):
        seen.extend(prefetch(failing()))
    items = prefetch(failing())
    assert [next(items), next(items)] == [1, 2]
    items.close()
    assert prefetching() == []


def test_no_more_is_made_than_there_is_room_for_and_closing_ends_it():
    made, closed = [], threading.Event()

    def endless():
        try:
            while True:
                made.append(len(made))
                yield made[-1]
        finally:
            closed.set()

    items = prefetch(endless(), depth=2)
    assert next(items) == 0
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert len(made) == 4  # one is used, two wait, one waits for room
    items.close()
    assert closed.is_set()
    assert prefetching() == []


def test_a_consumer_that_leaves_early_ends_the_thread():
    for item in prefetch(iter(range(10**9))):
        if item == 3:
            break
    deadline = time.monotonic() + 5
    while prefetching() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert prefetching() == []
