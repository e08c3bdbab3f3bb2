"""Memory that was freed and that the C library keeps, back to the system."""

import ctypes
import sys


def return_freed_memory() -> None:
    """Give the system the pages that hold nothing, also those between what is still in use.

    A process that frees many large temporaries keeps them otherwise: they count as its memory, and
    nothing else can have them. Without GNU's C library this does nothing.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
