"""S3 over HTTP that fails: moto's server behind a proxy that injects errors, stalls and truncated bodies."""

import http.client
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.request import Request, urlopen

from moto.server import ThreadedMotoServer

BUCKET = "pairs"
STALL_SECONDS = 4.0


@dataclass
class FaultyStore:
    """Where the store is and how it fails: a share of the requests, or all of them while it is ``down``."""

    port: int
    share: float = 0.0
    down: bool = False
    injected: Counter[str] = field(default_factory=Counter)
    draw: random.Random = field(default_factory=lambda: random.Random(0))

    def uri(self, path: str) -> str:
        """A URI of the bucket through the proxy."""
        return f"s3://{BUCKET}/{path}?endpoint_override=http://127.0.0.1:{self.port}&region=us-east-1"

    def choose(self, method: str) -> str | None:
        """The fault of the next request."""
        if self.down:
            return "503"
        if self.draw.random() >= self.share:
            return None
        kinds = ["truncated", "500", "503", "reset", "stall"][0 if method == "GET" else 1 :]
        # Each kind in its turn, so that none is left out; a stall costs seconds, so its turn comes less often.
        return min(kinds, key=lambda kind: self.injected[kind] * (3 if kind == "stall" else 1))


@contextmanager
def faulty_store() -> Iterator[FaultyStore]:
    """A store with an empty bucket."""
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    urlopen(Request(f"http://{host}:{port}/{BUCKET}", method="PUT")).close()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Proxy,), {"upstream": (host, port)}))
    server.daemon_threads = True
    store = FaultyStore(server.server_port)
    server.store = store  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield store
    finally:
        server.shutdown()
        moto.stop()


class _Proxy(BaseHTTPRequestHandler):
    """Hands a request on, or fails it."""

    protocol_version = "HTTP/1.1"
    upstream: tuple[str, int]

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _serve(self) -> None:
        body = self._body()
        store: FaultyStore = self.server.store  # type: ignore[attr-defined]
        fault = store.choose(self.command)
        if fault:
            store.injected[fault] += 1
        if fault in ("500", "503"):
            self._answer(int(fault), [], b"<Error><Code>InternalError</Code></Error>")
            return
        if fault in ("reset", "stall"):
            time.sleep(STALL_SECONDS if fault == "stall" else 0)
            self.close_connection = True
            return
        upstream = http.client.HTTPConnection(*self.upstream)
        upstream.request(self.command, self.path, body, dict(self.headers.items()))
        answer = upstream.getresponse()
        data = answer.read()
        upstream.close()
        self._answer(answer.status, answer.getheaders(), data, cut=fault == "truncated")

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        del self.headers["Transfer-Encoding"]
        return body

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, *, cut: bool = False) -> None:
        self.send_response_only(status)
        length = next((value for name, value in headers if name.lower() == "content-length"), str(len(data)))
        for name, value in headers:
            if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(data)))
        self.end_headers()
        with suppress(ConnectionError):
            if self.command != "HEAD":
                self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = self.close_connection or cut

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve  # noqa: N815
