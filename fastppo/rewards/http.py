"""A reward that another program computes, behind HTTP.

    POST url   {"prompts": [...], "completions": [...], "columns": {"answer": [...], ...}}
    200        {"scores": [number or null, ...]}

B values in each list. The other end is not trusted: https to a host on a list or http to this
machine; no redirects, no proxies; bounds on time and size; and no word of what it answers in a
message, because it could repeat the token there.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

from fastppo.rewards.failures import RewardUnavailableError
from fastppo.rewards.limits import backoff, declare

_UNAVAILABLE = (429, 502, 503, 504)
_PAUSE = 0.25  # seconds before the first retry; doubles with each
_TOKEN = re.compile(r"[\x21-\x7e]+")  # what a header can hold
_HOST = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?|[0-9a-f:.]+")


class CircuitBreaker:
    """After `failures` failed calls in a row, calls fail at once for `cooldown` seconds.

    The first call after that is let through; if it fails too, the next pause begins.
    """

    def __init__(self, failures: int = 5, cooldown: float = 30.0) -> None:
        self.failures = failures
        self.cooldown = cooldown
        self._in_a_row = 0
        self._closed_again = 0.0  # on the monotonic clock

    def remaining(self) -> float:
        """Seconds for which calls still fail at once; 0 lets one through."""
        return max(0.0, self._closed_again - time.monotonic())

    def record(self, ok: bool) -> None:
        """The end of a call that was let through."""
        self._in_a_row = 0 if ok else self._in_a_row + 1
        if self._in_a_row >= self.failures:
            self._closed_again = time.monotonic() + self.cooldown


@dataclass(eq=False)
class _AttemptError(Exception):
    """One attempt failed: why, and whether another one may help or the endpoint is out of reach."""

    reason: str
    retry: bool = False
    unavailable: bool = True


class HTTPReward:
    """A reward function that asks an HTTP endpoint.

    Args:
        url: https with a host of `allowed_hosts`, or http to this machine (127.0.0.0/8, ::1,
            localhost). No user, password or fragment.
        allowed_hosts: names that https may go to, compared as a whole.
        timeout: seconds for a call, with its retries.
        max_bytes: of a response's body.
        retries: after a connection that failed and the statuses 429, 502, 503 and 504.
        token_env: environment variable that holds a bearer token, read at each call; none is sent
            where it is not set.

    Raises:
        ValueError: a URL or a value that is not allowed.
    """

    def __init__(
        self,
        url: str,
        *,
        allowed_hosts: Sequence[str] = (),
        timeout: float = 30.0,
        max_bytes: int = 1 << 24,
        retries: int = 3,
        token_env: str = "FASTPPO_REWARD_TOKEN",
    ) -> None:
        parts, self._port = _checked_url(url, allowed_hosts)
        if not timeout > 0 or max_bytes < 1 or retries < 0:
            raise ValueError(
                "timeout (seconds) and max_bytes must be positive and retries 0 or more, "
                f"got {timeout}, {max_bytes} and {retries}"
            )
        self._secure = parts.scheme == "https"
        self._host = parts.hostname or ""
        self._path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        # A query may hold a key: messages show the URL without it.
        self._shown = f"{parts.scheme}://{parts.netloc}{parts.path}"
        self.timeout = timeout
        self.max_bytes = max_bytes
        self.retries = retries
        self.token_env = token_env
        self.breaker = CircuitBreaker()
        self.tls = ssl.create_default_context() if self._secure else None
        self.__name__ = self._host

    def __repr__(self) -> str:
        return f"HTTPReward({self._shown!r})"

    # It has its own retries, which know what may be tried again.
    @declare(idempotent=True, retries=0)
    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Any] | None = None,
        **columns: Sequence[Any],
    ) -> list[float | int | None]:
        """B scores. Token ids are not sent.

        Raises:
            RewardUnavailableError: the endpoint cannot be reached, took too long or said so.
            RuntimeError: another status, or a response that breaks the protocol.
            ValueError: a column cannot be written as JSON, or a token as a header.
        """
        body = _encoded({"prompts": prompts, "completions": completions, "columns": columns})
        headers = self._headers()
        if (remaining := self.breaker.remaining()) > 0:
            raise RewardUnavailableError(
                f"{self._shown}: not asked, because the last {self.breaker.failures} calls failed; "
                f"the next try is in {remaining:.0f} s"
            )
        failure, answer = self._ask(body, headers)
        self.breaker.record(failure is None or not failure.unavailable)
        if failure is not None:  # not raised where it was caught: its context could hold an answer
            error = RewardUnavailableError if failure.unavailable else RuntimeError
            raise error(f"{self._shown}: {failure.reason}")
        problem, scores = _decoded(answer, len(prompts))
        if problem:
            raise RuntimeError(f"{self._shown}: {problem}")
        return scores

    def _headers(self) -> dict[str, str]:
        headers = {
            "Content-Type": "application/json",
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "User-Agent": "fastppo",
        }
        if token := os.environ.get(self.token_env):
            if not _TOKEN.fullmatch(token):
                raise ValueError(
                    f"the token in {self.token_env} must be printable ASCII without spaces; "
                    "check for a line end"
                )
            headers["Authorization"] = f"Bearer {token}"
        return headers

    def _ask(self, body: bytes, headers: dict[str, str]) -> tuple[_AttemptError | None, bytes]:
        ends = time.monotonic() + self.timeout
        for attempt in range(1 + self.retries):
            try:
                return None, self._attempt(body, headers, ends)
            except _AttemptError as error:
                failure = error
            pause = backoff(_PAUSE, 1 + attempt)
            if not failure.retry or time.monotonic() + pause >= ends:
                break
            if attempt < self.retries:
                time.sleep(pause)
        return failure, b""

    def _attempt(self, body: bytes, headers: dict[str, str], ends: float) -> bytes:
        left = ends - time.monotonic()
        connection = (
            http.client.HTTPSConnection(self._host, self._port, timeout=left, context=self.tls)
            if self._secure
            else http.client.HTTPConnection(self._host, self._port, timeout=left)
        )
        try:
            try:
                connection.connect()
            except OSError as error:  # of the network or TLS, before anything was sent
                retry = not isinstance(error, ssl.SSLError)
                raise _AttemptError(f"cannot connect: {error}", retry) from None
            peer = connection.sock.getpeername()[0]
            if not self._secure and not ipaddress.ip_address(peer).is_loopback:
                raise _AttemptError(f"{self._host} is {peer}, not this machine")
            with _shut_at(ends, connection.sock) as late:
                try:
                    connection.request("POST", self._path, body, headers)
                    answer = self._read(connection.getresponse())
                    if late.is_set():  # an answer without a length, cut off
                        raise TimeoutError
                    return answer
                except (OSError, http.client.HTTPException, ValueError) as error:
                    if late.is_set() or isinstance(error, TimeoutError):
                        raise _AttemptError(f"no full answer within {self.timeout:g} s") from None
                    # Only the type: the text may quote the answer.
                    name = type(error).__name__
                    raise _AttemptError(
                        f"the connection failed ({name})", unavailable=False
                    ) from None
        finally:
            connection.close()

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        with response:
            if response.status != 200:
                name = http.client.responses.get(response.status, "unknown")
                hint = "; redirects are not followed" if 300 <= response.status < 400 else ""
                down = response.status in _UNAVAILABLE
                raise _AttemptError(f"answered {response.status} ({name}){hint}", down, down)
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise _AttemptError(
                    "answered in a Content-Encoding, none was asked for", False, False
                )
            data = response.read(self.max_bytes + 1)
        if len(data) > self.max_bytes:
            raise _AttemptError(f"answered more than max_bytes = {self.max_bytes}", False, False)
        if response.length:  # http.client is silent about what is missing here
            raise http.client.IncompleteRead(b"")
        return data


@contextmanager
def _shut_at(ends: float, connection: socket.socket) -> Iterator[threading.Event]:
    """Ends whatever `connection` waits for at a time; a socket's own limit begins anew each byte.

    Yields:
        Set once the time is up.
    """
    late = threading.Event()

    def shut() -> None:
        late.set()
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(max(0.0, ends - time.monotonic()), shut)
    timer.daemon = True
    timer.start()
    try:
        yield late
    finally:
        timer.cancel()
        timer.join()


def _checked_url(url: str, allowed_hosts: Sequence[str]) -> tuple[SplitResult, int]:
    """The parts of a URL that may be asked, and its port; no message quotes a password."""
    if isinstance(allowed_hosts, str):
        raise ValueError("allowed_hosts must be a sequence of host names, got one string")
    for host in allowed_hosts:
        if not _HOST.fullmatch(host.lower()):
            raise ValueError(
                f"allowed_hosts must be plain host names without scheme, port or '*', got {host!r}"
            )
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = SplitResult("", "", "", "", ""), None
    host = parts.hostname or ""
    if (
        parts.scheme not in ("http", "https")
        or not _HOST.fullmatch(host)
        or not re.fullmatch(r"[\x21-\x7e]+", url)
    ):
        raise ValueError(
            "a reward's URL must be https://host/path, or http://127.0.0.1:port/path for this "
            "machine, in ASCII without spaces"
        )
    if "@" in parts.netloc or parts.fragment:
        raise ValueError(
            f"the URL of the reward at {host!r} must have no user, password or fragment; a token "
            "goes in the environment"
        )
    if parts.scheme == "http" and not _is_loopback(host):
        raise ValueError(
            f"reward at {host!r}: http is for this machine (127.0.0.1, ::1, localhost) only; use "
            "https"
        )
    if parts.scheme == "https" and host not in [name.lower() for name in allowed_hosts]:
        raise ValueError(
            f"reward at {host!r}: https goes only to hosts on a list; add {host!r} to allowed_hosts"
        )
    return parts, port or (443 if parts.scheme == "https" else 80)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _encoded(request: dict[str, Any]) -> bytes:
    def plain(value: Any) -> Any:
        if hasattr(value, "tolist"):  # NumPy and torch
            return value.tolist()
        raise TypeError(f"a value of type {type(value).__name__}")

    try:
        return json.dumps(request, default=plain, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"prompts, completions and columns must be JSON, got {error}") from None


def _decoded(body: bytes, expected: int) -> tuple[str, list[float | int | None]]:
    """(what is wrong, or nothing, the scores)."""
    try:
        answer = json.loads(body.decode(), parse_constant=_refuse)
    except (ValueError, RecursionError):
        return "must answer JSON in UTF-8, without NaN and Infinity", []
    scores = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(scores, list):
        return 'must answer {"scores": [...]}', []
    if len(scores) != expected:
        return f"must answer one score per sample: expected {expected}, got {len(scores)}", []
    for index, score in enumerate(scores):
        if score is not None and type(score) not in (int, float):
            got = type(score).__name__
            return f"scores[{index}] must be a number or null, got {got}", []
    return "", scores


def _refuse(constant: str) -> None:
    raise ValueError(constant)
