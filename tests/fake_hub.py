"""A Hugging Face Hub with one data set, on this machine: as much of its interface as the libraries ask for."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

NAME = "somebody/stories"
COMMIT = "c0ffee" * 6 + "abcd"


@dataclass
class FakeHub:
    """A running server."""

    url: str
    fetched: list[str] = field(default_factory=list)  # files of the data set, in order


@contextmanager
def serving(folder: Path) -> Iterator[FakeHub]:
    """Serve the files of a folder as the data set NAME."""
    hub = FakeHub("")

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *words: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
            if parts[:1] == ["datasets"] and "resolve" in parts:
                return self.give_file("/".join(parts[5:]))
            if "/".join(parts[2:4]) != NAME:
                return self.reply(404, b"{}", "RepoNotFound")
            if parts[4:5] == ["revision"] and parts[5] not in ("main", COMMIT):
                return self.reply(404, b"{}", "RevisionNotFound")
            if parts[4:5] == ["tree"]:
                place = folder.joinpath(*parts[6:])
                return self.reply(200, json.dumps([self.described(path) for path in sorted(place.iterdir())]).encode())
            files = [{"rfilename": str(path.relative_to(folder))} for path in folder.rglob("*") if path.is_file()]
            known = {"id": NAME, "sha": COMMIT, "private": False, "gated": False, "disabled": False, "tags": []}
            return self.reply(200, json.dumps(known | {"downloads": 0, "likes": 0, "siblings": files}).encode())

        def described(self, path: Path) -> dict[str, object]:
            kind = "directory" if path.is_dir() else "file"
            return {"type": kind, "path": str(path.relative_to(folder)), "oid": "0", "size": path.stat().st_size}

        def give_file(self, name: str) -> None:
            if not (folder / name).is_file():
                return self.reply(404, b"", "EntryNotFound")
            if self.command == "GET":
                hub.fetched.append(name)
            return self.reply(200, (folder / name).read_bytes())

        def reply(self, status: int, body: bytes, error: str | None = None) -> None:
            self.send_response(status)
            headers = {"X-Error-Code": error, "ETag": f'"{hash(body)}"', "X-Repo-Commit": COMMIT}
            for header, value in (headers | {"Content-Length": str(len(body))}).items():
                if value is not None:
                    self.send_header(header, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        try:
            yield hub
        finally:
            server.shutdown()
