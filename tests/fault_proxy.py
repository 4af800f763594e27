"""A small HTTP proxy that stands before a real S3 server and injects faults, by a seed.

Bytes pass unchanged, the Host header too: the AWS signature covers the one the client sent.
"""

import random
import socket
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass

SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message><RequestId>proxy</RequestId></Error>"
)
CHUNK_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Faults:
    """Shares of the requests, 0 to 1, that meet a fault, and how long each answer waits.

    Attributes:
        slow_down: Answered 503 and not passed on.
        lost: Passed on and carried out, and answered 503 all the same.
        cut: Carried out; the connection ends in the middle of the answer.
        delay_s: Wait before each request is passed on.
    """

    slow_down: float = 0.0
    lost: float = 0.0
    cut: float = 0.0
    delay_s: float = 0.0


class ConnectionCutError(Exception):
    """The other side has gone, or this side ends the connection on purpose."""


class FaultProxy:
    """Listens on a port of its own; `with` starts and stops it.

    Attributes:
        faults: What is injected from now on; set it at any time.
        injected: How often each fault was injected, and `passed` requests.
    """

    def __init__(self, server_port, *, seed=0):
        self.faults, self.injected = Faults(), Counter()
        self._server_port, self._random = server_port, random.Random(seed)
        self._lock, self._open, self._targets, self._watched = threading.Lock(), set(), [], []
        self._listener = None
        self.port = 0

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.port}"

    def fail_next(self, method, part, fault):
        """Inject `slow_down`, `lost` or `cut` into the next request of a method and path part."""
        self._targets.append((method, part, fault))

    def when(self, method, part):
        """Return an event that is set once such a request has come."""
        event = threading.Event()
        self._watched.append((method, part, event))
        return event

    def down(self):
        """Refuse connections and cut those that are open."""
        listener, self._listener = self._listener, None
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for one in list(self._open):
            _end(one)
        self.injected["down"] += 1

    def up(self):
        """Listen (again), always on the same port."""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(128)
        self.port, self._listener = listener.getsockname()[1], listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def _accept(self, listener):
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client):
        self._open.add(client)
        try:
            with client, socket.create_connection(("127.0.0.1", self._server_port)) as server:
                self._open.add(server)
                try:
                    while self._exchange(Stream(client), Stream(server)):
                        pass
                finally:
                    self._open.discard(server)
        except (OSError, ConnectionCutError):
            pass  # the client sees it as its own connection's end
        finally:
            self._open.discard(client)

    def _exchange(self, client, server):
        """Pass one request and its answer; say whether the connection goes on."""
        head = client.read_head()
        method, path, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
        fault = self._choose(method, path)
        time.sleep(self.faults.delay_s)
        headers = parse_headers(head)
        if fault == "slow_down":
            if headers.get("expect") != "100-continue":
                client.pass_body(headers, None)
            client.send(slow_down_answer(method))
            return False
        server.send(head)
        if headers.get("expect") != "100-continue":
            client.pass_body(headers, server)
        answer = server.read_head()
        while answer.startswith(b"HTTP/1.1 100"):
            client.send(answer)
            client.pass_body(headers, server)
            answer = server.read_head()
        return self._answer(fault, method, answer, client, server)

    def _answer(self, fault, method, answer, client, server):
        found = parse_headers(answer)
        bare = method == "HEAD" or answer.split(b" ", 2)[1] in (b"204", b"304")
        if fault == "lost":
            client.send(slow_down_answer(method))
            return False
        if fault == "cut":
            length = 0 if bare else int(found.get("content-length", 0))
            part = answer + server.read(length // 2) if length else answer[: len(answer) // 2]
            client.send(part)
            return False
        client.send(answer)
        if not bare:
            server.pass_body(found, client, to_end=True)
        return found.get("connection", "").lower() != "close"

    def _choose(self, method, path):
        with self._lock:
            for watched, part, event in self._watched:
                if watched == method and part in path:
                    event.set()
            for target in self._targets:
                if target[0] == method and target[1] in path:
                    self._targets.remove(target)
                    self.injected[target[2]] += 1
                    return target[2]
            drawn = self._random.random()
            for name in ("slow_down", "lost", "cut"):
                drawn -= getattr(self.faults, name)
                if drawn < 0:
                    self.injected[name] += 1
                    return name
            self.injected["delayed" if self.faults.delay_s else "passed"] += 1
            return None

    def __enter__(self):
        self.up()
        return self

    def __exit__(self, *error):
        if self._listener is not None:
            self.down()


class Stream:
    """Reads HTTP messages off a socket, never a byte more than it needs."""

    def __init__(self, connection):
        self.connection = connection

    def read_head(self):
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            seen = self.connection.recv(CHUNK_BYTES, socket.MSG_PEEK)
            if not seen:
                raise ConnectionCutError
            end = (head + seen).find(b"\r\n\r\n")
            wanted = len(seen) if end < 0 else end + 4 - len(head)
            head += self.read(wanted)
        return head

    def read(self, count):
        parts = []
        while count:
            part = self.connection.recv(min(count, CHUNK_BYTES))
            if not part:
                raise ConnectionCutError
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def read_line(self):
        line = b""
        while not line.endswith(b"\n"):
            line += self.read(1)
        return line

    def send(self, data):
        self.connection.sendall(data)

    def pass_body(self, headers, target, *, to_end=False):
        """Send a message's body on; `target` None drops it, `to_end` where nothing bounds it."""
        send = target.send if target else len
        if "chunked" in headers.get("transfer-encoding", "").lower():
            self._pass_chunks(send)
        elif "content-length" in headers:
            left = int(headers["content-length"])
            while left:
                part = self.read(min(left, CHUNK_BYTES))
                send(part)
                left -= len(part)
        elif to_end:
            while part := self.connection.recv(CHUNK_BYTES):
                send(part)
            raise ConnectionCutError

    def _pass_chunks(self, send):
        while True:
            line = self.read_line()
            send(line)
            size = int(line.split(b";")[0], 16)
            if size == 0:
                break
            send(self.read(size + 2))
        while True:
            line = self.read_line()
            send(line)
            if line == b"\r\n":
                return


def parse_headers(head):
    lines = head.decode("latin-1").split("\r\n")[1:]
    pairs = (line.partition(":") for line in lines if line)
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


def slow_down_answer(method):
    head = (
        "HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\n"
        f"Content-Length: {len(SLOW_DOWN)}\r\nConnection: close\r\n\r\n"
    ).encode()
    return head if method == "HEAD" else head + SLOW_DOWN


def _end(connection):
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
