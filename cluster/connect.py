"""Becoming a driver of a Ray cluster that is there already."""

import logging
import os
import socket
from typing import Any

from cluster.auth import AUTH_MODE, AuthError, redacted, require_token
from cluster.jobs import ClusterError

_ANSWER_S = 5.0


def connect(address: str = "auto") -> Any:
    """Connect to the cluster at an address of its GCS, or to the one that this machine is part of; what Ray says of it.

    ClusterError if nobody answers there, AuthError without a token that it takes.
    """
    import ray
    from ray._private.services import canonicalize_bootstrap_address_or_die

    try:
        found = canonicalize_bootstrap_address_or_die(address)
        host, _, port = found.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_S).close()
        if require_token(found) is not None:
            os.environ.update(AUTH_MODE)
    except AuthError:
        raise
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"this machine is part of no cluster that answers: {error}. Give the address of the dashboard of one: "
            "--address http://HOST:8265"
        ) from None
    try:
        return ray.init(address=found, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        if isinstance(error, ConnectionError) or "Authentication" in type(error).__name__:
            raise AuthError(  # Ray itself says no more than that it could not connect
                f"there is a Ray at {found}, and it does not let us in: its token is not that of this environment. "
                "Set RAY_AUTH_TOKEN_PATH to a file with the token that it was started with"
            ) from None
        raise ClusterError(f"the Ray at {found} refused: {redacted(str(error))}") from error
