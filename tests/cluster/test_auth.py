"""Tokens: Ray's own order, which addresses want one, what is refused, and that no secret is printed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest

from cluster.auth import AuthError, Token, find_token, is_loopback, redacted, require_token, secret_env, secret_values

TOKEN = "f00d" * 16


def _token_file(path: Path, text: str = TOKEN, mode: int = 0o600) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """An environment with an empty home directory."""
    return {"HOME": str(tmp_path / "home")}


def test_the_order_is_rays(home: dict[str, str], tmp_path: Path) -> None:
    assert find_token(home) is None
    default = _token_file(Path(home["HOME"]) / ".ray" / "auth_token", "from-the-home")
    assert find_token(home) == Token("from-the-home", str(default))
    named = _token_file(tmp_path / "named", "from-the-path\n")
    env = home | {"RAY_AUTH_TOKEN_PATH": str(named)}
    assert find_token(env) == Token("from-the-path", str(named))
    assert find_token(env | {"RAY_AUTH_TOKEN": "from-the-variable"}) == Token("from-the-variable", "RAY_AUTH_TOKEN")
    assert find_token(env | {"RAY_AUTH_TOKEN": ""}) == Token("from-the-path", str(named))
    assert find_token(home | {"RAY_AUTH_TOKEN_PATH": ""}) == Token("from-the-home", str(default))


_ASK_RAY = """
import os, sys
from ray._raylet import AuthenticationTokenLoader
for names in ([], ["RAY_AUTH_TOKEN_PATH"], ["RAY_AUTH_TOKEN_PATH", "RAY_AUTH_TOKEN"]):
    os.environ.update((name, os.environ["GIVEN_" + name]) for name in names)
    AuthenticationTokenLoader.instance().reset_cache()
    print(AuthenticationTokenLoader.instance().get_raw_token(ignore_auth_mode=True))
"""


def test_ray_reads_the_same_token(home: dict[str, str], tmp_path: Path) -> None:
    _token_file(Path(home["HOME"]) / ".ray" / "auth_token", "from-the-home\n")
    given = {"RAY_AUTH_TOKEN_PATH": str(_token_file(tmp_path / "named", "from-the-path")), "RAY_AUTH_TOKEN": TOKEN}
    env = home | {f"GIVEN_{name}": value for name, value in given.items()}
    answer = subprocess.run(
        [sys.executable, "-c", _ASK_RAY], env=env, capture_output=True, text=True, check=True, timeout=50
    )
    path_alone = {"RAY_AUTH_TOKEN_PATH": given["RAY_AUTH_TOKEN_PATH"]}
    found = [find_token(home | variables) for variables in ({}, path_alone, given)]
    assert answer.stdout.split() == [token.value for token in found if token]


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o601])
def test_a_token_that_others_can_read_is_refused(home: dict[str, str], mode: int) -> None:
    file = _token_file(Path(home["HOME"]) / ".ray" / "auth_token", mode=mode)
    with pytest.raises(AuthError, match=f"mode {mode:04o}.*chmod 600 {file}"):
        find_token(home)


@pytest.mark.parametrize(
    "text",
    ["", "\n", "   ", f"{TOKEN}\n\n", f" {TOKEN}", f"{TOKEN} ", f"{TOKEN}\r\n", "two words", "a\nb" * 8, f"{TOKEN}\0"],
)
def test_what_is_no_token_is_refused(home: dict[str, str], tmp_path: Path, text: str) -> None:
    with pytest.raises(AuthError) as refused:
        find_token(home | {"RAY_AUTH_TOKEN_PATH": str(_token_file(tmp_path / "named", text))})
    assert str(tmp_path / "named") in str(refused.value)
    assert TOKEN not in str(refused.value)


@pytest.mark.parametrize("text", ["   ", f"{TOKEN}\n", f"{TOKEN} x"])
def test_a_variable_that_is_no_token_is_refused(home: dict[str, str], text: str) -> None:
    with pytest.raises(AuthError, match="RAY_AUTH_TOKEN has spaces"):
        find_token(home | {"RAY_AUTH_TOKEN": text})


def test_a_token_too_short_to_be_a_secret_is_refused(home: dict[str, str]) -> None:
    with pytest.raises(AuthError, match="has 7 characters, at least 8"):
        find_token(home | {"RAY_AUTH_TOKEN": "abcdefg"})


@pytest.mark.parametrize("what", ["missing", "directory"])
def test_a_path_that_is_no_file_is_refused(home: dict[str, str], tmp_path: Path, what: str) -> None:
    (tmp_path / "directory").mkdir()
    with pytest.raises(AuthError, match=f"RAY_AUTH_TOKEN_PATH is {tmp_path / what}, which is no file"):
        find_token(home | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / what)})


@pytest.mark.parametrize(
    "address",
    [
        "local", "auto", "localhost", "localhost:6379", "127.0.0.1:6379", "127.8.9.10", "http://127.0.0.1:8265",
        "https://LOCALHOST:8265/", "ray://[::1]:10001", "[::1]:6379", "http://ray.localhost:8265",
    ],
)  # fmt: skip
def test_loopback(address: str, home: dict[str, str]) -> None:
    assert is_loopback(address, home)
    assert require_token(address, home) is None


@pytest.mark.parametrize(
    "address",
    [
        "10.0.0.1:6379", "http://10.0.0.1:8265", "head:6379", "ray://head.example.org:10001", "0.0.0.0:8265",
        "[::]:8265", "[fe80::1]:6379", "127.0.0.1.example.org:8265", "localhost.example.org", "http://notlocalhost:8265",
        "http://example.org/127.0.0.1", "http://example.org?localhost", "127.1:8265",
    ],
)  # fmt: skip
def test_other_machines_want_a_token(address: str, home: dict[str, str]) -> None:
    assert not is_loopback(address, home)
    with pytest.raises(AuthError, match=r"is not this machine, and there is no Ray token.*RAY_AUTH_TOKEN_PATH"):
        require_token(address, home)
    token = require_token(address, home | {"RAY_AUTH_TOKEN": TOKEN})
    assert token == Token(TOKEN, "RAY_AUTH_TOKEN")


def test_auto_is_the_address_of_the_environment(home: dict[str, str]) -> None:
    assert is_loopback("auto", home | {"RAY_ADDRESS": "auto"})
    assert is_loopback("auto", home | {"RAY_ADDRESS": "127.0.0.1:6379"})
    assert not is_loopback("auto", home | {"RAY_ADDRESS": "10.0.0.1:6379"})


@pytest.mark.parametrize("address", ["", " ", "127.0.0.1 :6379", "local\nhost", "http://", ":6379", "http://[::1"])
def test_an_address_that_is_none_is_refused(address: str, home: dict[str, str]) -> None:
    with pytest.raises(AuthError, match="the address of the cluster is"):
        is_loopback(address, home)


@pytest.mark.parametrize("address", ["http://me:hunter22@head:8265", "http://127.0.0.1@head:8265", "me@localhost:6379"])
def test_an_address_with_a_user_is_refused_and_not_printed(address: str, home: dict[str, str]) -> None:
    with pytest.raises(AuthError, match="carries a user name") as refused:
        is_loopback(address, home)
    assert "hunter22" not in str(refused.value)


def test_a_token_that_is_not_kept_is_refused_for_this_machine_too(home: dict[str, str]) -> None:
    _token_file(Path(home["HOME"]) / ".ray" / "auth_token", mode=0o644)
    with pytest.raises(AuthError, match="chmod 600"):
        require_token("127.0.0.1:6379", home)


SECRETS = {
    "RAY_AUTH_TOKEN": TOKEN,
    "AWS_SECRET_ACCESS_KEY": "abc/def+ghi=jkl",
    "my_password": "correct horse",
    "CLIENT_SECRET": 'quote"and\\slash',
}


def test_secrets_are_replaced_in_any_form(monkeypatch: pytest.MonkeyPatch, home: dict[str, str]) -> None:
    for name, value in (home | SECRETS).items():
        monkeypatch.setenv(name, value)
    for value in SECRETS.values():
        for form in (value, quote(value, safe=""), json.dumps({"a": value})):
            found = redacted(f"before {form} after")
            assert "***" in found, form
            assert value not in found
            assert quote(value, safe="") not in found
            assert found.startswith("before ")
            assert found.endswith(" after")


def test_a_secret_within_another_leaves_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "abcdefgh")
    monkeypatch.setenv("B_TOKEN", "xxabcdefghyy")
    assert redacted("xxabcdefghyy abcdefgh") == "*** ***"


def test_the_tokens_file_is_a_secret_also_when_it_is_refused(home: dict[str, str]) -> None:
    _token_file(Path(home["HOME"]) / ".ray" / "auth_token", f"{TOKEN}\n", mode=0o644)
    assert redacted(f"Bearer {TOKEN}", secret_values(home)) == "Bearer ***"


def test_what_is_no_secret_stays() -> None:
    env = {"HOME": "/nowhere", "EDITOR": "emacs-nox", "A_KEY": "short", "TOKENS_PATH": "/a/long/path", "B_TOKEN": ""}
    assert secret_values(env) == []
    assert redacted("emacs-nox short /a/long/path", secret_values(env)) == "emacs-nox short /a/long/path"


def test_a_token_shows_where_it_came_from_and_not_itself() -> None:
    assert repr(Token(TOKEN, "RAY_AUTH_TOKEN")) == "Token(source='RAY_AUTH_TOKEN')"


def test_variables_are_passed_on_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    env = {"WANDB_API_KEY": TOKEN, "HF_TOKEN": "", "OTHER": "x"}
    assert secret_env(["WANDB_API_KEY"], env) == {"WANDB_API_KEY": TOKEN}
    with pytest.raises(AuthError, match="HF_TOKEN should be passed on to the cluster, but is not set"):
        secret_env(["WANDB_API_KEY", "HF_TOKEN"], env)
    with pytest.raises(AuthError, match="MISSING should be passed on"):
        secret_env(["MISSING"], env)
    monkeypatch.setenv("WANDB_API_KEY", TOKEN)
    with pytest.raises(AuthError, match="give the name, never the value") as refused:
        secret_env([f"WANDB_API_KEY={TOKEN}"], os.environ)
    assert TOKEN not in str(refused.value)
