"""The token of a Ray cluster: where it comes from, which addresses want one, and how secrets stay out of text.

Whoever reaches a Ray without a token can run anything on it, so nothing is sent to another machine without one.
"""

import ipaddress
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

AUTH_MODE = {"RAY_AUTH_MODE": "token"}
"""In the environment of every Ray process that we start: Ray takes it from nowhere else."""

_MIN_SECRET_CHARS = 8
_SECRET_NAME = re.compile(r"_(TOKEN|KEY|SECRET|PASSWORD)$", re.IGNORECASE)
_LIKE_A_SECRET = re.compile(
    r"TOKEN|SECRET|PASSW|PASSPHRASE|PWD|CREDENTIAL|CONNECTION_STRING|(^|_)(KEY|PAT|PASS|AUTH)(_|$)", re.IGNORECASE
)
_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MAKE_ONE = "to make one: (umask 077 && ray get-auth-token --generate), and give the cluster the same token"


class AuthError(ValueError):
    """A token that is missing or not kept as a secret.  The message says what to do, and never the token."""


@dataclass(frozen=True)
class Token:
    """A token and where it was found."""

    value: str = field(repr=False)
    source: str
    """The environment variable or the file."""


def _checked(value: str, source: str) -> Token:
    if not value:
        raise AuthError(f"the Ray token in {source} is empty; {_MAKE_ONE}")
    if any(character.isspace() or not character.isprintable() for character in value):
        raise AuthError(
            f"the Ray token in {source} has spaces, line breaks or control characters within it or around it, which "
            "a request cannot carry: write it on one line by itself"
        )
    if len(value) < _MIN_SECRET_CHARS:
        raise AuthError(
            f"the Ray token in {source} has {len(value)} characters, at least {_MIN_SECRET_CHARS} are needed; "
            f"{_MAKE_ONE}"
        )
    return Token(value, source)


def _text(path: Path) -> str:
    return path.read_bytes().decode(errors="replace")  # as it stands, with its line breaks


def _read_file(path: Path) -> Token:
    if not path.is_file():
        raise AuthError(f"RAY_AUTH_TOKEN_PATH is {path}, which is no file: correct it, or unset it")
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise AuthError(f"{path} holds the Ray token and others may use it (mode {mode:04o}): chmod 600 {path}")
    if not os.access(path, os.R_OK):
        raise AuthError(f"{path} holds the Ray token and cannot be read (mode {mode:04o}): chmod 600 {path}")
    # editors and echo end a file with a line break, which Ray does not count either
    return _checked(_text(path).removesuffix("\n"), str(path))


def _token_file(env: Mapping[str, str]) -> Path | None:
    """The file that Ray would read: the one that is named, or else the default one if it exists."""
    if named := env.get("RAY_AUTH_TOKEN_PATH"):
        return Path(named)
    default = Path(env.get("HOME") or Path.home()) / ".ray" / "auth_token"
    return default if default.exists() else None


def find_token(env: Mapping[str, str] = os.environ) -> Token | None:
    """The token that Ray would use, in its own order: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token.

    None where there is none; a token that is not one, or that others can read, is an AuthError.
    """
    if value := env.get("RAY_AUTH_TOKEN"):
        return _checked(value, "RAY_AUTH_TOKEN")
    file = _token_file(env)
    return _read_file(file) if file else None


def _host(address: str) -> str:
    """The host of ``host:port`` or of a URL, without brackets."""
    if not address or any(character.isspace() or not character.isprintable() for character in address):
        raise AuthError(f"the address of the cluster is {address!r}: write host:port or http://host:8265")
    try:
        url = urlsplit(address if "://" in address else f"//{address}")
        host, user = url.hostname, url.username
    except ValueError as error:
        raise AuthError(f"the address of the cluster is {address!r}: {error}") from None
    if user is not None:
        raise AuthError(
            "the address of the cluster carries a user name: addresses are shown in logs and plans; leave it out and "
            "set RAY_AUTH_TOKEN_PATH"
        )
    if not host:
        raise AuthError(f"the address of the cluster is {address!r}, without a host: write host:port")
    return host


def is_loopback(address: str, env: Mapping[str, str] = os.environ) -> bool:
    """Whether only processes of this machine can be at an address.  Names are not looked up: only localhost is.

    ``auto`` is what Ray makes of it: RAY_ADDRESS if that is set, otherwise the Ray that this machine is part of.
    """
    if address == "auto":
        named = env.get("RAY_ADDRESS", "auto")
        return named == "auto" or is_loopback(named, env)
    if address == "local":
        return True
    host = _host(address)
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_token(address: str, env: Mapping[str, str] = os.environ) -> Token | None:
    """The token for an address; AuthError if it is another machine's and there is none."""
    token = find_token(env)
    if token is None and not is_loopback(address, env):
        raise AuthError(
            f"{address} is not this machine, and there is no Ray token: anybody who reaches a cluster without one can "
            "run anything there. Looked for in RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH and ~/.ray/auth_token. Put the "
            f"cluster's token into a file of mode 600 and name it in RAY_AUTH_TOKEN_PATH; {_MAKE_ONE}"
        )
    return token


def names_a_secret(name: str) -> bool:
    """Whether a variable of this name would hold what others must not see, as far as a name can tell."""
    return _LIKE_A_SECRET.search(name) is not None


def secret_values(env: Mapping[str, str] = os.environ) -> list[str]:
    """What must not be in a message: the token, and values of variables that are named like secrets."""
    values = {
        value for name, value in env.items() if _SECRET_NAME.search(name) and len(value.strip()) >= _MIN_SECRET_CHARS
    }
    file = _token_file(env)
    if file and file.is_file() and os.access(file, os.R_OK):  # also one that find_token refuses
        values.add(_text(file))
    values |= {value.strip() for value in values}
    return [value for value in values if len(value) >= _MIN_SECRET_CHARS]


def redacted(text: str, secrets: Iterable[str] | None = None) -> str:
    """The text with every secret replaced by ``***``, also where it stands in a URL or in JSON.

    Whoever has many lines takes ``secret_values()`` once and passes it.
    """
    values = list(secret_values() if secrets is None else secrets)
    forms = {form for value in values for form in (value, quote(value, safe=""), quote(value), json.dumps(value)[1:-1])}
    for form in sorted(forms, key=len, reverse=True):  # a secret may be part of another one
        text = text.replace(form, "***")
    return text


def redacted_in(value: Any, secrets: Iterable[str] | None = None) -> Any:
    """A value as JSON has them, with every text in it ``redacted``."""
    hidden = list(secret_values() if secrets is None else secrets)
    if isinstance(value, str):
        return redacted(value, hidden)
    if isinstance(value, Mapping):
        return {redacted_in(key, hidden): redacted_in(one, hidden) for key, one in value.items()}  # pyright: ignore
    if isinstance(value, list | tuple):
        return type(value)(redacted_in(one, hidden) for one in value)  # pyright: ignore
    return value


def secret_env(names: Sequence[str], env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables of these names, for the environment of a process: never for a file, a plan or a command line."""
    for name in names:
        if not _VARIABLE_NAME.fullmatch(name):
            raise AuthError(f"{redacted(name)!r} is no name of an environment variable: give the name, never the value")
        if not env.get(name):
            raise AuthError(
                f"{name} should be passed on to the cluster, but is not set here: export it, or leave it out"
            )
    return {name: env[name] for name in names}
