"""What can go wrong, by who has to act: the error classes that decide about retries and exit codes."""

import errno
import re
from typing import Literal

ErrorClass = Literal[
    "user", "code", "transient", "infra", "memory", "numerics", "stopped", "poison", "unschedulable",
]  # fmt: skip


class UserError(ValueError):
    """Something the user did or set.  The message names the thing, the value and the remedy.

    It is shown without a traceback and never retried.
    """


class NotGivenError(UserError):
    """What a recipe leaves to its user was not given: nothing was asked for yet, and nothing is wrong with it."""


class NumericsError(RuntimeError):
    """Training diverged, or its weights are not what they should be.  Never retried."""


class CorruptionError(RuntimeError):
    """A committed file no longer has the bytes that were committed."""


def is_bad_format(error: BaseException) -> bool:
    """Whether a file could be read but is not what it should be: for that Arrow raises OSError too, without errno."""
    return not isinstance(error, OSError) or error.errno is None


class HangError(RuntimeError):
    """A process made no progress for longer than its watchdog allows."""


class LeaseLostError(RuntimeError):
    """Another process took over this work; whatever this one still writes must not be published."""


_PASSING = {
    errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EBUSY, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRINUSE,
}  # fmt: skip
"""Errors of storage and network that may be gone at the next try, which takes another port too."""
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


def is_disk_full(error: BaseException) -> bool:
    """Whether the error means that no space was left."""
    return isinstance(error, OSError) and error.errno in _DISK_FULL


_NO_FILE = {
    errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EACCES, errno.EPERM,
}  # fmt: skip


def is_wrong_path(error: OSError) -> bool:
    """Whether what was named is no file that may be read: another name, or other rights, would mend that."""
    return error.errno in _NO_FILE


_LOST_PEER = re.compile(
    r"Connection (closed|reset) by peer|Connection refused|Broken pipe|Socket Timeout|Timed out waiting|"
    r"failed to connect|NCCL (communicator was aborted|remote process exited)",
    re.IGNORECASE,
)
_COLLECTIVE_ERRORS = {"DistBackendError", "DistNetworkError", "DistStoreError"}


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank was gone: a symptom, whose cause is elsewhere."""
    return type(error).__name__ in _COLLECTIVE_ERRORS or (
        isinstance(error, RuntimeError) and _LOST_PEER.search(str(error)) is not None
    )


def classify(error: BaseException) -> ErrorClass:
    """The class of an exception raised by a stage."""
    if isinstance(error, UserError):
        return "user"
    if isinstance(error, NumericsError):
        return "numerics"
    if isinstance(error, MemoryError) or is_disk_full(error):
        return "memory"
    if isinstance(error, LeaseLostError) or is_lost_peer(error):
        return "infra"
    if isinstance(error, OSError) and error.errno in _PASSING:
        return "transient"
    if isinstance(error, HangError | ConnectionError | TimeoutError | InterruptedError):
        return "transient"
    if type(error).__name__ == "OutOfMemoryError":
        return "memory"
    return "code"
