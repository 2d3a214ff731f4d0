"""Errors fall into the class that decides about retries."""

import errno
import socket

import pytest

from pipeline.errors import CorruptionError, HangError, LeaseLostError, NumericsError, UserError, classify


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
        (OSError(errno.EIO, "Input/output error"), "transient"),
        (OSError(errno.EACCES, "Permission denied"), "code"),
        (ConnectionResetError("x"), "transient"),
        (TimeoutError("x"), "transient"),
        (OSError(errno.EADDRINUSE, "Address already in use"), "transient"),
        (HangError("rank 0 made no progress"), "transient"),
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


def test_a_port_that_torch_finds_taken_is_tried_again_elsewhere() -> None:
    import torch.distributed as dist

    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(dist.DistNetworkError) as raised:
        dist.TCPStore("127.0.0.1", taken.getsockname()[1], is_master=True, wait_for_workers=False)
    assert "EADDRINUSE" in str(raised.value)
    assert classify(raised.value) == "infra"
