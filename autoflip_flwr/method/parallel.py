"""One small thread pool for loops over tensors.

NumPy releases the interpreter's lock in its loops, so threads can pack, unpack and
score a model's tensors on all cores.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(
        max_workers=min(os.cpu_count() or 1, 8), thread_name_prefix="autoflip"
    )


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads stay in the parent


def parallel_map(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Apply `function` to each item on the pool; results in the items' order.

    `function` must not call `parallel_map` itself: the pool is shared and bounded.
    """
    return list(_pool().map(function, items))
