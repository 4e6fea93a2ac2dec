"""Compute the next results in threads while the caller uses the last one."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(
    load: Callable[[Item], Result], items: Iterable[Item], ahead: int = 2, threads: int = 1
) -> Generator[Result, None, None]:
    """Yield `load(item)` for each item, in order, while threads load up to `ahead` further ones.

    An error in `load` is raised here when its result is due, and no later item is loaded. If the
    caller stops early, loads that have not begun are cancelled. The threads have ended when the
    iterator is closed.
    """
    failed = threading.Event()

    def load_until_failure(item: Item) -> Result:
        if failed.is_set():  # the next load could wait for something that will not come
            raise CancelledError
        try:
            return load(item)
        except BaseException:
            failed.set()
            raise

    pool = ThreadPoolExecutor(threads, thread_name_prefix="prefetch")
    results: deque[Future[Result]] = deque()
    try:
        for item in items:
            results.append(pool.submit(load_until_failure, item))
            if len(results) > ahead:
                yield results.popleft().result()
        while results:
            yield results.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
