"""An object store that refuses, is absent or loses answers: errors that say what to do, in bounded time."""

import socket
import threading
import time
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline import object_storage
from pipeline.errors import UserError, classify
from pipeline.object_storage import ObjectStorage, RefusedError
from pipeline.storage import Place
from tests.support.object_stores import FAKE_AWS, LosesAnswers
from workflows.lease import acquire_lease, find_holder
from workflows.store import Store

BOUND_S = 55.0


@pytest.fixture
def anew() -> Iterator[None]:
    """Clients that read their environment now."""
    import s3fs
    from gcsfs.core import GCSFileSystem

    for client in (s3fs.S3FileSystem, GCSFileSystem):
        client.clear_instance_cache()
    yield
    for client in (s3fs.S3FileSystem, GCSFileSystem):
        client.clear_instance_cache()


def port_of_nobody() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture
def absent(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, anew: None) -> ObjectStorage:
    """A storage whose server does not listen."""
    for name, value in FAKE_AWS.items():
        monkeypatch.setenv(name, value)
    address = f"http://127.0.0.1:{port_of_nobody()}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
    return ObjectStorage(request.param, "bucket/store")


@pytest.mark.parametrize("absent", ["s3", pytest.param("gs", marks=pytest.mark.slow)], indirect=True)
def test_a_server_that_cannot_be_reached_is_a_passing_fault_in_bounded_time(absent: ObjectStorage) -> None:
    begun_s = time.monotonic()
    with pytest.raises(ConnectionError, match=r"://bucket/store: .*onnect") as caught:
        absent.create("store.json", b"1")
    assert classify(caught.value) == "transient"
    assert time.monotonic() - begun_s < BOUND_S


@pytest.fixture
def silent(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, anew: None) -> Iterator[ObjectStorage]:
    """A storage whose server takes every request and says nothing; with little patience."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listener:  # the kernel accepts what nobody answers
        for name, value in FAKE_AWS.items():
            monkeypatch.setenv(name, value)
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
        monkeypatch.setattr(object_storage, "_SILENCE_S", 0.5)
        monkeypatch.setattr(object_storage, "_ANSWER_S", 1.5)
        yield ObjectStorage(request.param, "bucket/store")


@pytest.mark.parametrize("silent", ["s3", "gs"], indirect=True)
@pytest.mark.parametrize("what", ["create", "write", "read", "exists", "names", "modified", "now"])
def test_a_server_that_says_nothing_is_a_passing_fault_soon(silent: ObjectStorage, what: str) -> None:
    begun_s = time.monotonic()
    with pytest.raises(ConnectionError, match=r"://bucket/store did not answer in time") as caught:
        getattr(silent, what)("a", *([b"1"] if what in ("create", "write") else []))
    assert classify(caught.value) == "transient"
    assert time.monotonic() - begun_s < 10.0


@pytest.mark.parametrize("silent", ["s3"], indirect=True)
@pytest.mark.parametrize("what", ["upload", "sizes"])
def test_what_takes_many_requests_has_no_limit_as_a_whole_and_ends_where_one_is_not_answered(
    silent: ObjectStorage, what: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(bytes(1 << 20))
    begun_s = time.monotonic()
    with pytest.raises(ConnectionError, match=r"://bucket/store: \w*Timeout"):
        silent.upload(tmp_path / "file", "a") if what == "upload" else getattr(silent, what)("a")
    assert time.monotonic() - begun_s < 30.0


class Busy(BaseHTTPRequestHandler):
    """A server of S3 that refuses for a while, then answers."""

    refusals: Iterator[tuple[int, str]] = iter(())

    def do_GET(self) -> None:
        code, reason = next(Busy.refusals, (200, ""))
        error = f"<Error><Code>{reason}</Code><Message>told</Message></Error>"
        body = (error if reason else "<ListBucketResult></ListBucketResult>").encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *given: object) -> None:
        pass


@pytest.mark.parametrize("refusal", [(500, "InternalError"), (503, "SlowDown"), (503, "ServiceUnavailable")])
def test_a_server_of_s3_that_wants_time_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, refusal: tuple[int, str]
) -> None:
    for name, value in FAKE_AWS.items():
        monkeypatch.setenv(name, value)
    with ThreadingHTTPServer(("127.0.0.1", 0), Busy) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        Busy.refusals = iter([refusal] * 2)
        assert ObjectStorage("s3", "bucket/store").names("a") == []
        assert next(Busy.refusals, None) is None
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("fixture", ["s3_url", "gs_url"])
def test_a_bucket_that_is_not_there_is_named_with_what_to_do(
    request: pytest.FixtureRequest, fixture: str, tmp_path: Path
) -> None:
    scheme = request.getfixturevalue(fixture).partition(":")[0]
    storage = ObjectStorage(scheme, "no-such-bucket/store")
    (tmp_path / "file").write_bytes(b"1")
    for put in (
        lambda: storage.create("a", b"1"),
        lambda: storage.write("a", b"1"),
        lambda: storage.touch("a"),
        lambda: storage.upload(tmp_path / "file", "a"),
        Store(Place(storage)).mark,
    ):
        with pytest.raises(UserError, match=rf"{scheme}://no-such-bucket/store: there is no such bucket .* Make it"):
            put()


def test_s3_without_credentials_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, anew: None) -> None:
    for name in (*FAKE_AWS, "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"s3://bucket/store: Unable to locate credentials\. Set the credentials"):
        ObjectStorage("s3", "bucket/store").create("a", b"1")


@pytest.mark.usefixtures("s3_url")
def test_a_name_that_no_bucket_has_is_refused() -> None:
    with pytest.raises(UserError, match=r"(?s)s3://A_B!/store cannot be a place in a bucket: .*[Ii]nvalid bucket name"):
        ObjectStorage("s3", "A_B!/store").create("a", b"1")


def refusals() -> Mapping[str, Exception]:
    """What the clients raise for lack of rights; the emulators let everybody in."""
    from botocore.exceptions import ClientError
    from gcsfs.retry import HttpError
    from s3fs.errors import translate_boto_error

    denied = {"Error": {"Code": "AccessDenied", "Message": "Access Denied"}}
    return {
        "s3": translate_boto_error(ClientError(denied, "PutObject")),
        "gs, known": OSError(
            "Forbidden: https://storage.googleapis.com/b\ncaller does not have storage.objects.create"
        ),
        "gs, anonymous": HttpError({"code": 401, "message": "Anonymous caller does not have access"}),
    }


class Raising:
    """A client of which everything raises the same."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __getattr__(self, name: str) -> object:
        def refuse(*given: object, **more: object) -> None:
            raise self._error

        return refuse


def with_client(storage: ObjectStorage, client: object) -> ObjectStorage:
    storage.__dict__["_fs"] = client
    return storage


@pytest.mark.parametrize("which", ["s3", "gs, known", "gs, anonymous"])
def test_access_denied_is_the_users_and_says_what_to_check(which: str) -> None:
    storage = with_client(ObjectStorage(which[:2], "bucket/store"), Raising(refusals()[which]))
    for ask in (lambda: storage.create("a", b"1"), lambda: storage.read("a"), lambda: storage.names("a")):
        with pytest.raises(
            UserError, match=r"(?s)bucket/store refuses this: .*Check the credentials and the rights"
        ) as e:
            ask()
        assert classify(e.value) == "user"
        assert isinstance(e.value, OSError), "a save that fails over it is a failed save"
    assert abs(storage.now("a") - time.time()) < 5, "who may only read is still told times"


def test_an_error_of_a_client_is_told_from_a_defect_of_ours() -> None:
    from botocore.exceptions import ReadTimeoutError

    silent = with_client(ObjectStorage("s3", "b/s"), Raising(ReadTimeoutError(endpoint_url="http://x")))
    with pytest.raises(ConnectionError, match="s3://b/s: ReadTimeoutError"):
        silent.read("a")
    with pytest.raises(ZeroDivisionError):
        with_client(ObjectStorage("s3", "b/s"), Raising(ZeroDivisionError())).read("a")


def test_a_create_whose_answer_was_lost_and_that_is_sent_again_has_won(
    s3_url: str, s3_environment: Mapping[str, str], monkeypatch: pytest.MonkeyPatch, anew: None
) -> None:
    direct = ObjectStorage("s3", s3_url.removeprefix("s3://"))
    direct.write("theirs", b"they were first")
    with LosesAnswers(int(s3_environment["AWS_ENDPOINT_URL"].rpartition(":")[2])) as way:
        anew_environment(monkeypatch, way.port)
        storage = ObjectStorage("s3", s3_url.removeprefix("s3://"))
        storage.names("")
        for key, is_won in (("ours", True), ("theirs", False)):
            once = iter([True])
            way.is_losing = lambda request, once=once: request.startswith(b"PUT") and next(once, False)
            assert storage.create(key, b"we were first") is is_won
    assert way.num_lost == 2
    assert direct.read("ours") == b"we were first"
    assert direct.read("theirs") == b"they were first"


def anew_environment(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """Clients made from now on go by another port."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")


class Deaf:
    """The client of a store that does not know conditions."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    def pipe_file(self, path: str, data: bytes, timeout: float, mode: str = "overwrite") -> None:
        self.objects[path] = data

    def cat_file(self, path: str, timeout: float) -> bytes:
        return self.objects[path]

    def exists(self, path: str, timeout: float) -> bool:
        return path in self.objects

    def rm(self, path: str, recursive: bool) -> None:
        del self.objects[path]


def test_a_store_that_ignores_conditions_is_not_made_a_store() -> None:
    client = Deaf()
    with pytest.raises(UserError, match=r"lets a file be created twice .*If-None-Match.*Use a store that heeds them"):
        Store(Place(with_client(ObjectStorage("s3", "b/s"), client))).mark()
    assert client.objects == {}


def test_a_lease_can_be_looked_at_by_who_may_only_read(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = ObjectStorage("s3", s3_url.removeprefix("s3://"))
    acquire_lease(Place(storage, "lease"), "test")

    def refuse(*given: object) -> None:
        raise RefusedError("read only")

    monkeypatch.setattr(ObjectStorage, "write", refuse)
    holder = find_holder(Place(storage, "lease"))
    assert holder is not None
    assert not holder.is_free
