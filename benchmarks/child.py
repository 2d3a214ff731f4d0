"""Work in a process of its own: one setting of the allocator, one peak of memory."""

import ctypes
import gc
import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

# Names and numbers of malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_TOP_PAD_BYTES = 64 << 20
_NEVER = -1


def in_child(function: Callable[..., Any], *args: Any, heap: bool = True) -> Any:
    """The result of ``function(*args)`` from a new process; with ``heap``, one that called ``keep_freed_memory``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])  # which takes seconds to import and, until used, starts no thread
    with ProcessPoolExecutor(1, mp_context=context, initializer=keep_freed_memory if heap else None) as pool:
        return pool.submit(function, *args).result()


def keep_freed_memory() -> None:
    """Let glibc keep and reuse what is freed, instead of mapping new pages for every large tensor.

    Page faults otherwise cost as much as the matrix products, and most where most is allocated: left alone, the
    allocator would flatter whoever allocates less.
    """
    libc = ctypes.CDLL(None)
    for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER), (_M_TOP_PAD, _TOP_PAD_BYTES)):
        if not libc.mallopt(parameter, value):
            raise OSError(f"mallopt({parameter}, {value}) failed")


def peak_bytes(work: Callable[[], object]) -> int:
    """Peak resident memory during ``work`` above what was resident before it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or work would find room in what is free but still resident
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _resident_bytes("VmRSS")
    work()
    return _resident_bytes("VmHWM") - before


def _resident_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, field
    return int(found[1]) << 10
