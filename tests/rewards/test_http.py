"""Rewards over HTTP against real servers: the protocol, what is refused, retries and bounds."""

from __future__ import annotations

import http.server
import json
import socket
import ssl
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastppo.rewards import (
    HTTPReward,
    RewardError,
    RewardLimits,
    Rewards,
    RewardUnavailableError,
    resolve_reward,
)
from fastppo.rewards.http import CircuitBreaker

PROMPTS = ["a", "b", "c"]
TEXTS = ["1", "22", "333"]
TOKEN = "s3cr3t-t0k3n-zq8"


class Server(http.server.ThreadingHTTPServer):
    """`answers` are taken in turn, the last one for good: (status, headers, body) of a request."""

    def __init__(self, *answers: Callable[[Any], tuple[int, dict[str, str], bytes]]) -> None:
        self.answers = list(answers)
        self.requests: list[tuple[str, dict[str, str], Any]] = []  # path, headers, JSON
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/score?key=k1"

    def handle_error(self, *_: Any) -> None:
        """A client that hangs up is part of some tests."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, dict(self.headers), body))
        answers = self.server.answers
        status, headers, data = (answers.pop(0) if len(answers) > 1 else answers[0])(body)
        self.send_response(status, f"echo {self.headers['Authorization']}")
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(server: Any) -> Iterator[Any]:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def raw_server(answer: Callable[[socket.socket], Any]) -> Iterator[str]:
    """Reads a request's first bytes, then leaves the connection to `answer`."""

    def serve() -> None:
        try:
            while True:
                connection = listening.accept()[0]
                with connection:
                    connection.recv(1 << 16)
                    answer(connection)
        except OSError:
            pass

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        listening.shutdown(socket.SHUT_RDWR)
    thread.join()


def lengths(request: Any) -> tuple[int, dict[str, str], bytes]:
    scores = [len(text) if isinstance(text, str) else 7 for text in request["completions"]]
    return 200, {}, json.dumps({"scores": scores}).encode()


def status(code: int, **headers: str) -> Callable[[Any], tuple[int, dict[str, str], bytes]]:
    return lambda request: (code, headers, b"{}")


def body(data: bytes, **headers: str) -> Callable[[Any], tuple[int, dict[str, str], bytes]]:
    return lambda request: (200, headers, data)


CUT_OFF = body(b"{}", **{"Content-Length": "9", "Connection": "close"})

# The protocol


@pytest.mark.parametrize("workers", [0, 1])
def test_scores_come_back_for_prompts_completions_and_columns(workers: int) -> None:
    answer = body(b'{"scores": [1, null, -2.5e-1], "model": "judge"}')
    with (
        serving(Server(answer)) as server,
        Rewards(HTTPReward(server.url), limits=RewardLimits(workers)) as rewards,
    ):
        columns = {"answer": [1, np.float32(0.5), None]}
        batch = rewards(PROMPTS, TEXTS, columns, [[1], [2], [3]])
    np.testing.assert_array_equal(batch.scores, np.array([1, np.nan, -0.25], np.float32))
    assert batch.failures == () and list(batch.per_function) == ["127.0.0.1"]
    [(path, headers, sent)] = server.requests
    assert path == "/score?key=k1"
    assert sent == {"prompts": PROMPTS, "completions": TEXTS, "columns": {"answer": [1, 0.5, None]}}
    assert headers["Content-Type"] == "application/json" and "Authorization" not in headers


def test_a_url_is_a_reward_by_name() -> None:
    with serving(Server(lengths)) as server:
        assert resolve_reward(server.url)(PROMPTS, TEXTS) == [1, 2, 3]
        chat = [[{"role": "user", "content": "hi"}]]
        assert Rewards(resolve_reward(server.url))(chat, ["ho"]).scores.tolist() == [7]
    assert server.requests[1][2]["completions"] == [[{"role": "assistant", "content": "ho"}]]
    judge = resolve_reward("https://Judge.example/v1", allowed_hosts=["judge.example"])
    assert repr(judge) == "HTTPReward('https://Judge.example/v1')"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (body(b"no"), "must answer JSON"),
        (body(b'{"scores": [1, 2, NaN]}'), "without NaN"),
        (body(b'{"scores": [1, 2, "\xff"]}'), "UTF-8"),
        (body(b"[" * 100_000), "must answer JSON"),
        (body(b"[1, 2, 3]"), r'must answer {"scores"'),
        (body(b'{"scores": {"0": 1}}'), r'must answer {"scores"'),
        (body(b'{"scores": [1, 2]}'), "expected 3, got 2"),
        (body(b'{"scores": [1, 2, 3, 4]}'), "expected 3, got 4"),
        (body(b'{"scores": [1, "2", 3]}'), r"scores\[1\] must be a number or null, got str"),
        (body(b'{"scores": [1, 2, true]}'), r"scores\[2\] must be a number or null, got bool"),
        (body(b"{}", **{"Content-Encoding": "gzip"}), "Content-Encoding"),
        (
            body(b"{}", **{"Content-Length": "9", "Connection": "close"}),
            r"the connection failed \(IncompleteRead\)",
        ),
        (status(500), r"answered 500 \(Internal Server Error\)"),
        (status(400), r"answered 400 \(Bad Request\)"),
        (status(204), r"answered 204 \(No Content\)"),
    ],
)
def test_an_answer_that_breaks_the_protocol_is_refused_and_not_asked_again(
    answer: Any, message: str
) -> None:
    with serving(Server(answer)) as server:
        reward = HTTPReward(server.url, timeout=1)
        with pytest.raises(RuntimeError, match=message) as info:
            reward(PROMPTS, TEXTS)
        assert not isinstance(info.value, RewardUnavailableError)
        assert server.url.partition("?")[0] in str(info.value) and "k1" not in str(info.value)
        assert len(server.requests) == 1


def test_scores_beyond_float32_are_lost_like_any_others() -> None:
    with serving(Server(body(b'{"scores": [1, 1e400, 2]}'))) as server:
        limits = RewardLimits(max_failure_rate=0.5)
        with Rewards(HTTPReward(server.url), limits=limits) as rewards:
            failures = rewards(PROMPTS, TEXTS).failures
    assert [(f.sample, f.kind) for f in failures] == [(1, "not_finite")]


def test_columns_that_are_not_json_are_refused() -> None:
    reward = HTTPReward("http://127.0.0.1:9/")
    with pytest.raises(ValueError, match="columns must be JSON, got a value of type object"):
        reward(PROMPTS, TEXTS, answer=[object()] * 3)
    with pytest.raises(ValueError, match="must be JSON"):
        reward(PROMPTS, TEXTS, answer=[float("nan")] * 3)


# Where it may go


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://127.0.0.1/", "must be https://host/path"),
        ("https:///path", "must be https://host/path"),
        ("https://judge.example:99999/", "must be https://host/path"),
        ("https://judge.example/a b", "must be https://host/path"),
        ("https://judge.example/\r\nX: y", "must be https://host/path"),
        ("https://judgé.example/", "must be https://host/path"),
        ("https://u:hidden@judge.example/", "no user, password or fragment"),
        ("http://u@127.0.0.1/", "no user, password or fragment"),
        ("https://judge.example/#part", "no user, password or fragment"),
        ("https://other.example/", "'other.example' to allowed_hosts"),
        ("https://sub.judge.example/", "'sub.judge.example' to allowed_hosts"),
        ("https://judge.example.evil/", "to allowed_hosts"),
        ("https://127.0.0.1/", "to allowed_hosts"),
        ("http://judge.example/", "http is for this machine"),
        ("http://localhost.evil/", "http is for this machine"),
        ("http://10.0.0.1/", "http is for this machine"),
        ("http://0.0.0.0/", "http is for this machine"),
        ("http://127.1/", "http is for this machine"),
        ("http://[::2]/", "http is for this machine"),
    ],
)
def test_urls_that_are_refused(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as info:
        HTTPReward(url, allowed_hosts=["judge.example"])
    assert "hidden" not in str(info.value)


def test_urls_that_are_allowed() -> None:
    for url in ("http://127.8.0.1:80/", "http://[::1]/", "http://LOCALHOST:1/"):
        HTTPReward(url)
    HTTPReward("https://JUDGE.example", allowed_hosts=["Judge.Example"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"allowed_hosts": "judge.example"}, "a sequence of host names, got one string"),
        ({"allowed_hosts": ["*.example"]}, r"plain host names .* got '\*.example'"),
        ({"allowed_hosts": ["https://judge.example"]}, "plain host names"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
        ({"max_bytes": 0}, "max_bytes"),
        ({"retries": -1}, "retries"),
    ],
)
def test_arguments_that_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HTTPReward("http://127.0.0.1/", **arguments)


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(code: int) -> None:
    with serving(Server(lengths)) as other, serving(Server(status(code))) as server:
        server.answers = [status(code, Location=other.url)]
        with pytest.raises(RuntimeError, match=rf"answered {code} .*redirects are not followed"):
            HTTPReward(server.url)(PROMPTS, TEXTS)
        assert (len(server.requests), len(other.requests)) == (1, 0)


def test_proxies_of_the_environment_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Server(lengths)) as server, serving(Server(lengths)) as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        assert HTTPReward(server.url)(PROMPTS, TEXTS) == [1, 2, 3]
        assert proxy.requests == []


def test_localhost_that_is_another_machine_gets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            pytest.skip("no network address but loopback")
        address = probe.getsockname()[0]
    real, received = socket.getaddrinfo, []

    def resolve(host: str, *args: Any, **kwargs: Any) -> Any:
        return real(address if host == "localhost" else host, *args, **kwargs)

    with socket.create_server((address, 0)) as listening:
        port = listening.getsockname()[1]

        def receive() -> None:
            with listening.accept()[0] as connection:
                received.append(connection.recv(100))

        thread = threading.Thread(target=receive)
        thread.start()
        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        with pytest.raises(RewardUnavailableError, match=f"localhost is {address}, not this"):
            HTTPReward(f"http://localhost:{port}/")(PROMPTS, TEXTS)
        thread.join()
    assert received == [b""]


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Key and certificate for `localhost`, in one file."""
    folder = tmp_path_factory.mktemp("tls")
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -keyout key -out cert "
        "-subj /CN=localhost -addext subjectAltName=DNS:localhost"
    )
    subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    both = folder / "both"
    both.write_text((folder / "key").read_text() + (folder / "cert").read_text())
    return both


@contextmanager
def serving_tls(certificate: Path) -> Iterator[tuple[Server, int]]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server = Server(lengths)
    server.socket = context.wrap_socket(
        server.socket, server_side=True, do_handshake_on_connect=False
    )
    with serving(server):
        yield server, server.server_address[1]


def test_https_sends_the_token_to_a_host_it_can_trust(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setenv("JUDGE_TOKEN", TOKEN)
    hosts = ["localhost", "127.0.0.1"]
    with serving_tls(certificate) as (server, port):
        reward = HTTPReward(
            f"https://localhost:{port}/", allowed_hosts=hosts, token_env="JUDGE_TOKEN"
        )
        with Rewards(reward, limits=RewardLimits()) as rewards:
            assert rewards(PROMPTS, TEXTS).scores.tolist() == [1, 2, 3]
        assert server.requests[0][1]["Authorization"] == f"Bearer {TOKEN}"
        other = HTTPReward(f"https://127.0.0.1:{port}/", allowed_hosts=hosts, timeout=5)
        with pytest.raises(RewardUnavailableError, match="certificate verify failed"):
            other(PROMPTS, TEXTS)  # the certificate is for another name
        monkeypatch.delenv("SSL_CERT_FILE")
        stranger = HTTPReward(f"https://localhost:{port}/", allowed_hosts=hosts, timeout=5)
        with pytest.raises(RewardUnavailableError, match="certificate verify failed"):
            stranger(PROMPTS, TEXTS)
        assert len(server.requests) == 1


# Bounds, retries, the breaker


@pytest.mark.parametrize("code", [429, 502, 503, 504])
def test_an_endpoint_that_is_busy_is_asked_again(code: int) -> None:
    with serving(Server(status(code), status(code), lengths)) as server:
        assert HTTPReward(server.url, retries=2)(PROMPTS, TEXTS) == [1, 2, 3]
        assert len(server.requests) == 3
        server.answers = [status(code, **{"Retry-After": "3600"})]
        with pytest.raises(RewardUnavailableError, match=f"answered {code}"):
            HTTPReward(server.url, retries=1)(PROMPTS, TEXTS)
        assert len(server.requests) == 5


def test_a_server_that_starts_late_is_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    reward = HTTPReward(f"http://127.0.0.1:{port}/", retries=1)
    with pytest.raises(RewardUnavailableError, match=r"cannot connect: .*refused"):
        reward(PROMPTS, TEXTS)
    server = Server(lengths)
    server.server_close()

    def open_late() -> None:
        server.socket = socket.create_server(("127.0.0.1", port))

    timer = threading.Timer(0.3, open_late)
    timer.start()
    late = HTTPReward(f"http://127.0.0.1:{port}/", retries=6)
    results: list[Any] = []
    asking = threading.Thread(target=lambda: results.append(late(PROMPTS, TEXTS)))
    asking.start()
    timer.join()
    with serving(server):
        asking.join()
    assert results == [[1, 2, 3]]


def read_all(connection: socket.socket) -> None:
    while connection.recv(1 << 16):
        pass


def drip(head: bytes) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(b"1")
            time.sleep(0.02)

    return answer


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 2",
        b"HTTP/1.1 200 OK\r\nX-",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 999999\r\n\r\n",
        b"",
    ],
    ids=["status", "header", "body", "sized body", "nothing"],
)
def test_an_answer_that_drips_ends_at_the_time_limit(head: bytes) -> None:
    with raw_server(drip(head) if head else read_all) as url:
        before = time.monotonic()
        with pytest.raises(RewardUnavailableError, match=r"no full answer within 0\.4 s"):
            HTTPReward(url, timeout=0.4)(PROMPTS, TEXTS)
        assert 0.3 < time.monotonic() - before < 1.5


def test_retries_end_at_the_time_limit() -> None:
    with serving(Server(status(503))) as server:
        before = time.monotonic()
        with pytest.raises(RewardUnavailableError, match="answered 503"):
            HTTPReward(server.url, timeout=0.8, retries=1000)(PROMPTS, TEXTS)
        assert time.monotonic() - before < 1.5
        assert 2 <= len(server.requests) <= 4


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_answer_is_not_read(chunked: bool) -> None:
    sent = 0

    def answer(connection: socket.socket) -> None:
        nonlocal sent
        kind = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 100000000"
        connection.sendall(b"HTTP/1.1 200 OK\r\n" + kind + b"\r\n\r\n")
        piece = b"1" * 65536
        while sent < 100_000_000:
            connection.sendall(b"10000\r\n" + piece + b"\r\n" if chunked else piece)
            sent += len(piece)

    with (
        raw_server(answer) as url,
        pytest.raises(RuntimeError, match="more than max_bytes = 1000"),
    ):
        HTTPReward(url, max_bytes=1000)(PROMPTS, TEXTS)
    assert sent < 50_000_000  # it hung up


def test_the_breaker_spares_an_endpoint_that_is_down() -> None:
    with serving(Server(status(503))) as server:
        reward = HTTPReward(server.url, retries=0)
        reward.breaker = CircuitBreaker(failures=2, cooldown=0.3)

        def asked() -> int:
            before = len(server.requests)
            with pytest.raises(RewardUnavailableError):
                reward(PROMPTS, TEXTS)
            return len(server.requests) - before

        assert [asked() for _ in range(4)] == [1, 1, 0, 0]
        with pytest.raises(RewardUnavailableError, match="not asked, because the last 2 calls"):
            reward(PROMPTS, TEXTS)
        time.sleep(0.31)
        assert [asked() for _ in range(2)] == [1, 0]  # one probe
        time.sleep(0.31)
        server.answers = [lengths, status(400), status(503), lengths]
        assert reward(PROMPTS, TEXTS) == [1, 2, 3]
        with pytest.raises(RuntimeError, match="400"):
            reward(PROMPTS, TEXTS)  # up, but unhappy with the request
        assert asked() == 1 and reward(PROMPTS, TEXTS) == [1, 2, 3]


# In a run


def test_a_sample_that_the_endpoint_fails_on_is_lost_alone() -> None:
    def answer(request: Any) -> tuple[int, dict[str, str], bytes]:
        return status(500)(request) if "22" in request["completions"] else lengths(request)

    with serving(Server(answer)) as server:
        limits = RewardLimits(max_failure_rate=0.5)
        with Rewards(HTTPReward(server.url), limits=limits) as rewards:
            batch = rewards(PROMPTS, TEXTS)
    assert [(f.function, f.sample, f.kind) for f in batch.failures] == [
        ("127.0.0.1", 1, "exception")
    ]
    np.testing.assert_array_equal(batch.scores, [1, np.nan, 3])


def test_a_lost_endpoint_loses_the_batch_and_stops_above_the_rate() -> None:
    with serving(Server(lengths)) as server:
        reward = HTTPReward(server.url, retries=0)
        with Rewards(reward, limits=RewardLimits(max_failure_rate=0.1)) as rewards:
            assert rewards(PROMPTS, TEXTS).lost == 0
            server.answers = [status(503)]
            assert rewards(PROMPTS, TEXTS).lost == 3
            assert len(server.requests) == 2  # and no search for a bad sample
            with pytest.raises(RewardError, match=r"'127.0.0.1'.*answered 503"):
                rewards(PROMPTS, TEXTS)


# The token


def garbage(line: str) -> Callable[[socket.socket], None]:
    return lambda connection: connection.sendall(line.format(TOKEN).encode())


@pytest.mark.parametrize(
    "answer",
    [
        status(500, Echo=TOKEN),
        status(503, Echo=TOKEN),
        status(302, Location=f"http://127.0.0.1:9/{TOKEN}"),
        body(json.dumps({"scores": [1, TOKEN, 2]}).encode()),
        body(TOKEN.encode()),
        body(b"{}", **{"Content-Encoding": TOKEN}),
        body(b"{}", **{"Content-Length": TOKEN, "Connection": "close"}),
        garbage("{}\r\n\r\n"),
        garbage("HTTP/9.{} 200 OK\r\n\r\n"),
        garbage("HTTP/1.1 {} OK\r\n\r\n"),
        garbage("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{}\r\n"),
    ],
)
def test_the_token_is_in_no_message(
    answer: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTPPO_REWARD_TOKEN", TOKEN)
    raw = answer.__qualname__.startswith("garbage")
    with raw_server(answer) if raw else serving(Server(answer)) as server:
        reward = HTTPReward(server if raw else server.url, retries=0, timeout=5)
        seen = [repr(reward), str(vars(reward))]
        for limits in (RewardLimits(0), RewardLimits(1), RewardLimits(1, max_failure_rate=1)):
            with Rewards(reward, limits=limits) as rewards:
                try:
                    seen += map(repr, rewards(PROMPTS, TEXTS).failures)
                except RewardError as error:
                    seen += everything(error)
        with pytest.raises(RuntimeError) as info:
            reward(PROMPTS, TEXTS)
        seen += everything(info.value)
        if not raw:
            assert server.requests[0][1]["Authorization"] == f"Bearer {TOKEN}"
    out = capfd.readouterr()
    assert len(seen) > 6 and not [text for text in [*seen, out.out, out.err] if TOKEN in text]


def everything(error: BaseException | None) -> list[str]:
    """What can be read off an exception and all that it is chained to."""
    if error is None:
        return []
    texts = [str(error), repr(error), repr(error.args), *traceback.format_exception(error)]
    return [*texts, *everything(error.__cause__), *everything(error.__context__)]


@pytest.mark.parametrize("token", [f"{TOKEN}\n", f"{TOKEN} x", f"{TOKEN}é"])
def test_a_token_that_no_header_can_hold_is_refused_unseen(
    token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTPPO_REWARD_TOKEN", token)
    with pytest.raises(ValueError, match="FASTPPO_REWARD_TOKEN must be printable") as info:
        HTTPReward("http://127.0.0.1:9/")(PROMPTS, TEXTS)
    assert not [text for text in everything(info.value) if TOKEN in text]
