"""Ray reads its token once a process, so whatever a process of tests starts or talks to has the same."""

import os

from cluster import ray_executor
from cluster.auth import AUTH_MODE

TOKEN = ray_executor._TOKEN
"""Drawn anew in each process: a constant would be in the code that runs keep."""


def settle_token() -> None:
    """Let Ray read it now, before a test changes the environment."""
    os.environ.update(AUTH_MODE | {"RAY_AUTH_TOKEN": TOKEN})
    from ray._private.authentication_test_utils import reset_auth_token_state
    from ray._raylet import AuthenticationTokenLoader

    reset_auth_token_state()
    assert AuthenticationTokenLoader.instance().has_token()
