"""Errors fall into the class that decides about retries."""

import errno

import pytest

from pipeline.errors import CorruptionError, LeaseLostError, NumericsError, UserError, classify


class DistBackendError(RuntimeError):
    """Named like torch's."""


class OutOfMemoryError(RuntimeError):
    """Named like torch's."""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UserError("x"), "user"),
        (NumericsError("x"), "numerics"),
        (MemoryError(), "memory"),
        (OutOfMemoryError("CUDA out of memory"), "memory"),
        (OSError(errno.ENOSPC, "No space left on device"), "memory"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), "memory"),
        (OSError(errno.EIO, "Input/output error"), "transient"),
        (OSError(errno.EACCES, "Permission denied"), "code"),
        (ConnectionResetError("x"), "transient"),
        (TimeoutError("x"), "transient"),
        (RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:3"), "infra"),
        (DistBackendError("NCCL error"), "infra"),
        (LeaseLostError("x"), "infra"),
        (RuntimeError("shape mismatch"), "code"),
        (ValueError("x"), "code"),
        (CorruptionError("x"), "code"),
    ],
)
def test_error_is_put_into_the_class_that_decides_about_retries(error: BaseException, expected: str) -> None:
    assert classify(error) == expected
