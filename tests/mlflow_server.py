"""A real MLflow server of a test's own, started and killed at will, and what may stand before or in place of it."""

from __future__ import annotations

import http.client
import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class MlflowServer:
    """Keeps everything in one folder, at one address, however often it is started."""

    def __init__(self, folder: Path, port: int | None = None) -> None:
        self.folder, self.port = folder, port or free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.database = folder / "server.db"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it unless it runs; returns when it answers."""
        if self._process is None:
            self.begin()
        self.wait()

    def wait(self) -> None:
        """Return when it answers."""
        deadline = time.monotonic() + 90
        while not self.answers():
            assert self._process is not None
            assert self._process.poll() is None, f"the server ended\n{(self.folder / 'server.log').read_text()}"
            assert time.monotonic() < deadline, "the server did not come up"
            time.sleep(0.1)

    def begin(self) -> None:
        """Start it without waiting until it answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.database}"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "server.log").open("a") as log:
            self._process = subprocess.Popen(
                command, cwd=self.folder, stdout=log, stderr=log, start_new_session=True, env=environment
            )

    def answers(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.uri}/health", timeout=1)
        except OSError:
            return False
        return True

    def kill(self) -> None:
        """End it and its workers at once, if it runs."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(20)
            self._process = None


class SlowProxy:
    """Stands before a server and answers for it, each request after `delay` seconds."""

    def __init__(self, server_port: int, delay: float = 0.0) -> None:
        self.delay, self.requests = delay, 0
        self._port = free_port()
        self._server: http.server.ThreadingHTTPServer | None = None
        self.uri = f"http://127.0.0.1:{self._port}"
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _pass_on(self) -> None:
                try:
                    self._ask()
                except OSError:  # the server, or who asked, has gone meanwhile
                    self.close_connection = True

            def _body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length", 0)))
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return body

            def _ask(self) -> None:
                proxy.requests += 1
                body = self._body()
                time.sleep(proxy.delay)
                server = http.client.HTTPConnection("127.0.0.1", server_port, timeout=60)
                own = ("host", "transfer-encoding", "content-length")
                headers = {name: value for name, value in self.headers.items() if name.lower() not in own}
                server.request(self.command, self.path, body, headers)
                answer = server.getresponse()
                content = answer.read()
                server.close()
                self.send_response(answer.status)
                self.send_header("Content-Type", answer.headers.get("Content-Type", "application/json"))
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass_on  # noqa: N815

            def log_message(self, *arguments: object) -> None:
                pass

        self._handler = Handler

    def open(self) -> None:
        """From now on there is an answer at the address."""
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", self._port), self._handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """From now on there is none."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def __enter__(self) -> SlowProxy:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Unauthorized(http.server.BaseHTTPRequestHandler):
    """Wants to know who asks, whatever is asked."""

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(401)
        self.send_header("WWW-Authenticate", 'Basic realm="mlflow"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_GET  # noqa: N815

    def log_message(self, *arguments: object) -> None:
        pass
