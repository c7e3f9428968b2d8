"""The garbage collector, kept out where many objects are made and no cycles."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def pause_gc() -> Iterator[None]:
    """Look for no cycles within the block.

    A full collection walks all objects of all libraries each time, which takes longer than to make
    the rows or shapes at hand.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
