"""What strangers do to a gate: on the loopback, bounded in count and time."""

import contextlib
import http.client
import os
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

#: An address of the loopback that no node of the tests has.
ADDRESS = "127.0.0.2"
FLEET = "/v1/fleet/pull-messages"
IDLE, BAD, HUGE = 500, 10_000, 100
PROTOBUF = {"Content-Type": "application/protobuf"}


class Strangers:
    """Attackers of one port, and one who asks it honestly from another address."""

    def __init__(self, port: int, ca: Path) -> None:
        self.port = port
        self.context = ssl.create_default_context(cafile=str(ca))
        self.waited: list[float] = []

    def connection(self, address: str = ADDRESS) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection(
            "localhost",
            self.port,
            timeout=60,
            context=self.context,
            source_address=(address, 0),
        )

    def idle(self) -> Iterator[socket.socket]:
        """Yield connections that say nothing, half a header, or a body without end."""
        header = f"POST {FLEET} HTTP/1.1\r\nHost: localhost\r\n".encode()
        said = [b"", header, header + b"Content-Length: 5000000\r\n\r\nbody"]
        for number in range(IDLE):
            connection = self.connection()
            connection.connect()
            connection.sock.sendall(said[number % len(said)])
            yield connection.sock

    def bad(self, count: int) -> Counter[int]:
        """Send requests that are no calls of a node; returns how they were answered."""
        answers: Counter[int] = Counter()
        connection = self.connection()
        for number in range(count):
            method, path, body = [
                ("POST", FLEET, os.urandom(200 * (number // 4 % 2))),
                ("POST", "/v1/control/start-run", os.urandom(200)),
                ("DELETE", FLEET, b""),
                ("GET", "/" + "x" * (5000 if number % 100 < 4 else 50), b""),
            ][number % 4]
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection.request(method, path, body, PROTOBUF)
                answer = connection.getresponse()
                answer.read()
                answers[answer.status] += 1
                continue
            connection.close()  # the gate closes after some answers: connect again
        connection.close()
        return answers

    def huge(self, number: int) -> int:
        """Offer a gigabyte; returns the answer, 0 if the connection was closed."""
        connection = self.connection()
        piece = b"x" * 100_000
        with contextlib.closing(connection), contextlib.suppress(OSError):
            connection.putrequest("POST", FLEET)
            if number % 2:
                connection.putheader("Content-Length", str(10**9))
                connection.endheaders(piece)
            else:
                connection.putheader("Transfer-Encoding", "chunked")
                connection.endheaders()
                for _ in range(10**9 // len(piece)):
                    connection.send(b"%x\r\n%b\r\n" % (len(piece), piece))
            return connection.getresponse().status
        return 0

    @contextlib.contextmanager
    def honest(self) -> Iterator[None]:
        """Ask for the SuperLink's health all the time, and note how long it takes."""
        ended = threading.Event()

        def ask() -> None:
            while not ended.wait(0.1):
                began = time.monotonic()
                with contextlib.closing(self.connection("127.0.0.1")) as connection:
                    connection.request("GET", "/health")
                    assert connection.getresponse().status == 200
                self.waited.append(time.monotonic() - began)

        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(ask)
            try:
                yield
            finally:
                ended.set()
            asking.result()

    def attack(self) -> tuple[Counter[int], Counter[int]]:
        """Do all of it at once; returns the answers to bad and to huge requests."""
        with (
            contextlib.ExitStack() as open_ones,
            self.honest(),
            ThreadPoolExecutor(8) as pool,
        ):
            for idle in self.idle():
                open_ones.enter_context(idle)
            bad = [pool.submit(self.bad, BAD // 4) for _ in range(4)]
            huge = Counter(pool.map(self.huge, range(HUGE)))
            return sum((done.result() for done in bad), Counter()), huge
