"""A proxy in front of an S3 server that does to chosen requests what networks and servers do at times."""

import re
import threading
import time
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

Kind = Literal[
    "busy", "broken", "refused", "too slow", "misread", "throttled", "not offered",
    "cut", "altered", "slow", "lost", "dropped", "held",
]  # fmt: skip
ANSWERS: dict[Kind, tuple[int, str]] = {
    "busy": (503, "SlowDown"),
    "broken": (500, "InternalError"),
    "refused": (403, "AccessDenied"),
    "too slow": (400, "RequestTimeout"),
    "misread": (400, "BadDigest"),
    "throttled": (400, "ThrottlingException"),
    "not offered": (501, "NotImplemented"),
}


@dataclass
class Fault:
    """What happens to the first `times` requests whose `METHOD /bucket/key?query` matches."""

    kind: Kind
    request: str  # regular expression; keys are percent-encoded
    times: int = 10**9
    seconds: float = 0.0  # slow: before the answer
    met: int = 0  # requests so far
    released: threading.Event = field(default_factory=threading.Event)  # held: until this is set

    def wait(self) -> None:
        """Until a request has met it."""
        while not self.met:
            time.sleep(0.01)


class FaultProxy:
    """Forwards to 127.0.0.1:`port`; `requests` are all that came, `faults` what they suffer."""

    def __init__(self, port: int) -> None:
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.target = port
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self.server = _Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def add(self, fault: Fault) -> Fault:
        self.faults.append(fault)
        return fault

    def take(self, request: str) -> Fault | None:
        """The fault that this request meets."""
        self.requests.append(request)
        for fault in self.faults:
            if fault.met < fault.times and re.search(fault.request, request):
                fault.met += 1
                return fault
        return None

    def stop(self) -> None:
        for fault in self.faults:
            fault.released.set()
        self.server.shutdown()
        self.server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients that are killed hang up


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    owner: FaultProxy

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.owner.take(f"{self.command} {self.path}")
        kind = fault.kind if fault else None
        if fault and kind == "slow":
            time.sleep(fault.seconds)
        if fault and kind == "held":
            fault.released.wait(120)
        if kind == "dropped":
            self.close_connection = True
        elif kind in ANSWERS:
            self._refuse(*ANSWERS[kind])
        else:
            self._forward(body, kind)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve

    def _refuse(self, status: int, code: str) -> None:
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>by the proxy</Message></Error>".encode()
        text = b"" if self.command == "HEAD" else text
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _forward(self, body: bytes, kind: Kind | None) -> None:
        upstream = HTTPConnection("127.0.0.1", self.owner.target, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() != "expect":  # answered here already
                    upstream.putheader(name, value)
            upstream.endheaders(body)
            answer = upstream.getresponse()
            data = answer.read()
        except OSError:  # the server is not there
            self.close_connection = True
            return
        finally:
            upstream.close()
        if kind == "lost":
            self.close_connection = True
        else:
            self._answer(answer, data, kind)

    def _answer(self, answer: HTTPResponse, data: bytes, kind: Kind | None) -> None:
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server"):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        if kind == "cut":
            data, self.close_connection = data[: len(data) // 2], True
        if kind == "altered" and data:
            data = data[:-1] + bytes([data[-1] ^ 1])
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass
