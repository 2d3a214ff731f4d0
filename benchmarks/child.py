"""Work in a process of its own: one setting of the allocator, one peak of memory."""

import ctypes
import gc
import multiprocessing
import re
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

# Names and numbers of malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_TOP_PAD_BYTES = 64 << 20
_NEVER = -1
_SAMPLE_S = 0.001


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
    before = resident_bytes("VmRSS")
    work()
    return resident_bytes("VmHWM") - before


def peak_anonymous_bytes(work: Callable[[], object]) -> int:
    """Peak of memory that no file backs during ``work``, above what there was before it: pages mapped from files, which
    the kernel takes back at will, are left out.  Sampled, for the kernel keeps no peak of it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = peak = resident_bytes("RssAnon")
    is_over = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not is_over.wait(_SAMPLE_S):
            peak = max(peak, resident_bytes("RssAnon"))

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        work()
    finally:
        is_over.set()
        sampler.join()
    return max(peak, resident_bytes("RssAnon")) - before


def resident_bytes(field: str) -> int:
    """A size that the kernel keeps of this process, such as VmRSS or VmHWM."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, field
    return int(found[1]) << 10
