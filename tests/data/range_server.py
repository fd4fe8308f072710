"""A web server on the loop-back address that serves byte ranges, and misbehaves when told to."""

import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class RangeServer(ThreadingHTTPServer):
    """Serves `files` (bytes by path); `faults` are used up, one a GET request; `requests` are (method, path, range)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.requests = {}, [], []
        self.etag, self.serves_ranges = '"1"', True

    def url(self, name):
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"

    def handle_error(self, request, client_address):
        """A client that hangs up is no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        path = self.path.partition("?")[0].lstrip("/")
        self.server.requests.append((self.command, path, wanted and tuple(map(int, wanted.groups()))))
        fault = self.server.faults.pop(0) if with_body and self.server.faults else None
        if isinstance(fault, float):
            time.sleep(fault)
        data = self.server.files.get(path)
        if isinstance(fault, int) or data is None:
            return self.head(fault or 404, 0)
        status, body = 200, data
        if wanted and self.server.serves_ranges:
            start, end = map(int, wanted.groups())
            if start >= len(data):
                return self.head(416, 0)
            status, body = 206, data[start : end + 1]
        self.head(status, len(body) - (fault == "short"))
        if with_body:
            self.wfile.write(body[: len(body) // 2] if fault == "drop" else body[: len(body) - (fault == "short")])
            if fault == "drop":
                self.close_connection = True
        return None

    def head(self, status, length):
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.send_header("ETag", self.server.etag)
        self.end_headers()


@contextmanager
def serving(**files):
    """Gives a running `RangeServer` with these files (`a` is served as `a.tar`)."""
    server = RangeServer()
    server.files = {f"{name}.tar": data for name, data in files.items()}
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
