"""A proxy in front of an S3 server that does to chosen requests what networks and servers do at times."""

import re
import threading
import time
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ANSWERS = {  # kind: status, S3's code
    "busy": (503, "SlowDown"),
    "broken": (500, "InternalError"),
    "refused": (403, "AccessDenied"),
    "too slow": (400, "RequestTimeout"),
    "misread": (400, "BadDigest"),
    "throttled": (400, "ThrottlingException"),
    "not offered": (501, "NotImplemented"),
}
ERROR = "<?xml version='1.0'?><Error><Code>{}</Code><Message>by the proxy</Message></Error>"


@dataclass
class Fault:
    """What happens to the first `times` requests whose `METHOD /bucket/key?query` matches."""

    kind: str  # of ANSWERS; or dropped, lost, slow, held: no answer or a late one; cut, altered: a damaged one
    request: str  # regular expression; keys are percent-encoded
    times: int = 10**9
    seconds: float = 0.0  # slow: before the answer
    met: int = 0  # requests so far
    released: threading.Event = field(default_factory=threading.Event)  # held: until this is set

    def wait(self) -> None:
        """Until a request has met it."""
        while not self.met:
            time.sleep(0.01)


class FaultProxy(ThreadingHTTPServer):
    """Forwards to 127.0.0.1:`port`; `requests` are all that came, `faults` what they suffer."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = port
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def add(self, fault: Fault) -> Fault:
        self.faults.append(fault)
        return fault

    def take(self, request: str) -> Fault:
        """The fault that this request meets; one of no kind if there is none."""
        self.requests.append(request)
        for fault in self.faults:
            if fault.met < fault.times and re.search(fault.request, request):
                fault.met += 1
                return fault
        return Fault("", "")

    def stop(self) -> None:
        for fault in self.faults:
            fault.released.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients that are killed hang up


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FaultProxy

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.take(f"{self.command} {self.path}")
        time.sleep(fault.seconds)
        if fault.kind == "held":
            fault.released.wait(120)
        if fault.kind == "dropped":
            self.close_connection = True
            return
        if fault.kind in ANSWERS:
            status, code = ANSWERS[fault.kind]
            data = b"" if self.command == "HEAD" else ERROR.format(code).encode()
            self._answer(status, {"Content-Length": str(len(data))}, data)
            return
        try:
            status, headers, data = self._ask_server(body)
        except OSError:  # it is not there
            self.close_connection = True
            return
        if fault.kind == "lost":
            self.close_connection = True
            return
        if fault.kind == "cut":
            data, self.close_connection = data[: len(data) // 2], True
        if fault.kind == "altered" and data:
            data = data[:-1] + bytes([data[-1] ^ 1])
        self._answer(status, headers, data)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve

    def _ask_server(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        upstream = HTTPConnection("127.0.0.1", self.server.target, timeout=60)
        try:
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() != "expect":  # answered here already
                    upstream.putheader(name, value)
            upstream.endheaders(body)
            answer = upstream.getresponse()
            data = answer.read()
        finally:
            upstream.close()
        replaced = ("connection", "transfer-encoding", "content-length", "date", "server")
        headers = {name: value for name, value in answer.getheaders() if name.lower() not in replaced}
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        return answer.status, {**headers, "Content-Length": length or "0"}, data

    def _answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass
