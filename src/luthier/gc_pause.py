"""The garbage collector, kept out where many objects are made and no cycles."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def pause_gc() -> Iterator[None]:
    """Run the block without the cyclic garbage collector, and switch it on again if it was on.

    A full collection walks all objects of all libraries each time, which takes longer than to make
    the rows or shapes at hand. Objects without cycles are freed as ever.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
