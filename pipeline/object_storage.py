"""A bucket of S3 or Google Cloud Storage as a storage (pipeline/storage.py), through fsspec."""

import contextlib
import os
import random
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

OBJECT_STORES = {"s3": "s3fs", "gs": "gcsfs"}
"""Schemes of URLs -> package that fsspec needs for them."""
_NO_CREDENTIALS = {
    "NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError", "DefaultCredentialsError", "RefreshError",
}  # fmt: skip
_CONNECT_S, _SILENCE_S = 5.0, 10.0
"""Of one try of one request."""
_ANSWER_S = 40.0
"""Of an operation on one object or folder with all its tries: much less than a lease lives without a sign of life."""
_S3_TRIES = {"mode": "standard", "total_max_attempts": 3}
"""By botocore, which knows what passes (throttling, 5xx, silence); s3fs does so again where a body breaks off."""
_CLIENTS = {"botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "requests"}
"""Packages that raise errors of their own, some of them for connections that are OSErrors without a number."""


class RefusedError(UserError, PermissionError):
    """An object store does not allow something; to those who can do without it, an error of the storage like others."""


_CREATE_TRIES = 20
_CONFLICT = "ConditionalRequestConflict"
"""What S3 answers to a conditional PUT while another one of the same name is under way."""


@dataclass(frozen=True)
class ObjectStorage:
    """A bucket, or what lies under a prefix in one."""

    scheme: str
    root: str
    """Bucket and prefix."""

    @property
    def url(self) -> str:
        """scheme://bucket/prefix."""
        return f"{self.scheme}://{self.root}"

    @cached_property
    def _fs(self) -> Any:
        """The fsspec file system, which asks the store every time: what another machine wrote must be seen."""
        try:
            return _gs_client() if self.scheme == "gs" else _s3_client()
        except ImportError:
            raise UserError(
                f"{self.url} needs the package {OBJECT_STORES[self.scheme]}: pip install 'dlm[{self.scheme}]'"
            ) from None

    def _at(self, key: str) -> str:
        return f"{self.root}/{key}" if key else self.root

    @property
    def poll_s(self) -> float:
        """A request, which is billed."""
        return 5.0

    def path(self, key: str) -> None:
        """None: it is in no file system."""
        return

    def create(self, key: str, data: bytes) -> bool:
        """A conditional PUT.

        One whose answer was lost is sent again by the client and then finds what it has itself written: whose bytes lie
        there decides.
        """
        for _ in range(_CREATE_TRIES):
            try:
                with _translated(self.url, is_put=True):
                    self._fs.pipe_file(self._at(key), data, mode="create", timeout=_ANSWER_S)
                return True
            except OSError as error:
                if isinstance(error, FileExistsError) or _is_refused(error):
                    return self.read(key) == data
                if _CONFLICT not in str(error):
                    raise
                time.sleep(random.uniform(0.1, 0.5))  # another creation is under way: who wins is not known yet
        raise ConnectionError(f"{self.url}: {key} is being created by others all the time")

    def write(self, key: str, data: bytes, is_durable: bool = True) -> None:
        """A PUT."""
        with _translated(self.url, is_put=True):
            self._fs.pipe_file(self._at(key), data, timeout=_ANSWER_S)

    def touch(self, key: str) -> None:
        """A PUT of nothing."""
        self.write(key, b"")

    def read(self, key: str) -> bytes:
        """A GET."""
        with _translated(self.url):
            return self._fs.cat_file(self._at(key), timeout=_ANSWER_S)

    def exists(self, key: str) -> bool:
        """A HEAD, and a listing of one where there is no such object."""
        with _translated(self.url):
            return self._fs.exists(self._at(key), timeout=_ANSWER_S)

    def names(self, key: str) -> list[str]:
        """A listing up to the next slash."""
        try:
            with _translated(self.url):
                found = self._fs.ls(self._at(key), detail=False, refresh=True, timeout=_ANSWER_S)
        except FileNotFoundError:
            return []
        names = {path.rstrip("/").rpartition("/")[2] for path in found}
        return sorted(name for name in names if name and not name.startswith("."))

    def sizes(self, key: str) -> dict[str, int]:
        """A listing."""
        with _translated(self.url):
            found: dict[str, Any] = self._fs.find(self._at(key), detail=True, withdirs=False)
        start = len(self._at(key)) + 1
        return {path[start:]: info["size"] for path, info in sorted(found.items()) if len(path) > start}

    def modified(self, key: str) -> float:
        """LastModified, of whole seconds on S3."""
        with _translated(self.url):
            found = self._fs.info(self._at(key), timeout=_ANSWER_S)
        return found["mtime" if self.scheme == "gs" else "LastModified"].timestamp()

    def now(self, key: str) -> float:
        """The LastModified of an object that is made and deleted."""
        probe = f"{key}/.clock-{secrets.token_hex(4)}".lstrip("/")
        try:
            self.write(probe, b"")
        except RefusedError:
            return time.time()  # a store that can only be looked at
        now = self.modified(probe)
        self.remove(probe)
        return now

    def remove(self, key: str) -> None:
        """DELETE of every object at or below a key."""
        with _translated(self.url), contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._at(key), recursive=True)

    def upload(self, source: Path, key: str) -> None:
        """A PUT, in parts if it is large."""
        with _translated(self.url, is_put=True):
            self._fs.put_file(str(source), self._at(key))

    def download(self, key: str, target: Path) -> None:
        """A GET."""
        with _translated(self.url):
            self._fs.get_file(self._at(key), str(target))

    def copy(self, key: str, to: str) -> None:
        """A copy by the store itself."""
        with _translated(self.url):
            self._fs.cp_file(self._at(key), self._at(to))


def _s3_client() -> Any:
    """The client, which does not ask before a PUT whether it may: it would wait for that answer without end."""
    from aiobotocore.session import AioSession
    from botocore.handlers import add_expect_header
    from s3fs import S3FileSystem

    session = AioSession()
    session.unregister("before-call.s3", add_expect_header)
    limits = {"connect_timeout": _CONNECT_S, "read_timeout": _SILENCE_S, "retries": _S3_TRIES}
    client = S3FileSystem(use_listings_cache=False, session=session, config_kwargs=limits, skip_instance_cache=True)
    client.retries = 2
    return client


def _gs_client() -> Any:
    """The client that speaks JSON over HTTP only: the other one asks over gRPC first what kind of bucket it has."""
    import aiohttp
    from gcsfs.core import GCSFileSystem

    limits = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_SILENCE_S)
    emulator = os.environ.get("STORAGE_EMULATOR_HOST")
    options: dict[str, Any] = {"endpoint_url": emulator, "token": "anon"} if emulator else {}
    return GCSFileSystem(use_listings_cache=False, requests_timeout=limits, **options)


def _is_refused(error: OSError) -> bool:
    """Whether a condition was not met, told in the words of stores that are not AWS's."""
    return "PreconditionFailed" in str(error) or "(412)" in str(error)


@contextlib.contextmanager
def _translated(url: str, is_put: bool = False) -> Iterator[None]:
    """Errors of the clients of object stores as those of the standard library, and of users, which have classes.

    Of what is put, only the bucket can be missing.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        kind, client = type(error).__name__, type(error).__module__.partition(".")[0]
        is_missing = isinstance(error, FileNotFoundError) and error.filename is None
        if is_missing and (is_put or "bucket does not exist" in str(error)):
            raise UserError(f"{url}: there is no such bucket ({error}). Make it, or set another --store") from error
        if kind in _NO_CREDENTIALS:
            raise UserError(
                f"{url}: {error}. Set the credentials that its client reads from the environment"
            ) from error
        if kind == "ParamValidationError":
            raise UserError(f"{url} cannot be a place in a bucket: {error}") from error
        if isinstance(error, PermissionError) or str(error).startswith("Forbidden") or getattr(error, "code", 0) == 401:
            raise RefusedError(
                f"{url} refuses this: {error}. Check the credentials and the rights on the bucket"
            ) from error
        if kind == "FSTimeoutError":
            raise ConnectionError(f"{url} did not answer in time") from error
        if client in _CLIENTS and not isinstance(error, FileNotFoundError | FileExistsError):
            raise ConnectionError(f"{url}: {kind}: {error}") from error
        raise
