"""A server that speaks what down- and uploads need of a Hugging Face hub's API, and serves plain files."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".bin", ".pth")  # kept by LFS: known by their SHA-256


class HubServer:
    """`models` are files by repository and name, `files` others by path; `breaks` are names whose next answer
    ends in the middle, `tags` whether files have an ETag, `gated` repositories that want a token. `asked` has
    method, path and Range of each request.
    `pushed` are the files of repositories that were made, `datasets/` before a data set's name,
    `made` what they were made with; writing takes `token`."""

    def __init__(self) -> None:
        self.models: dict[str, dict[str, bytes]] = {}
        self.files: dict[str, bytes] = {}
        self.only_get = False  # of files, as behind a signed address
        self.breaks: list[str] = []
        self.tags = True
        self.gated: set[str] = set()
        self.asked: list[tuple[str, str, str | None]] = []
        self.token = "hf_write"
        self.made: dict[str, dict[str, object]] = {}
        self.pushed: dict[str, dict[str, bytes]] = {}
        self._large: dict[str, bytes] = {}
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server.answer(self)

            def do_POST(self) -> None:
                server.take(self)

            do_HEAD = do_GET
            do_PUT = do_POST

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def downloads(self, name: str) -> list[str | None]:
        """The ranges of the downloads of a file, in their order."""
        return [span for method, path, span in self.asked if method == "GET" and path.endswith(f"/{name}")]

    def answer(self, to: BaseHTTPRequestHandler) -> None:
        path = to.path.partition("?")[0]
        if self.only_get and to.command == "HEAD" and path.strip("/") in self.files:
            return _send(to, 403, b"", {})
        self.asked.append((to.command, path, to.headers.get("Range")))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+|/tree/[^/]+)?", path):
            repo, what = found[1], found[2] or ""
            if repo not in self.models:
                _send(to, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif what.startswith("/tree/"):
                entries = [_entry(name, data) for name, data in self.models[repo].items()]
                _send(to, 200, json.dumps(entries).encode(), {"Content-Type": "application/json"})
            else:
                card = {"license": "other", "license_name": "theirs"}
                told = {"id": repo, "sha": COMMIT, "gated": "manual" if repo in self.gated else False,
                        "cardData": card, "siblings": [], "tags": []}  # fmt: skip
                _send(to, 200, json.dumps(told).encode(), {"Content-Type": "application/json"})
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            repo, name = found[1], found[2]
            if repo in self.gated and "Authorization" not in to.headers:
                _send(to, 401, b"", {"X-Error-Code": "GatedRepo"})
            else:
                data = self.models[repo][name]
                headers = {"ETag": f'"{_hash(name, data)}"', "X-Repo-Commit": COMMIT}
                self._send_file(to, name, data, headers)
        elif path.strip("/") in self.files:
            name = path.strip("/")
            tags = {"ETag": f'"{_hash(name, self.files[name])}"'} if self.tags else {}
            self._send_file(to, name, self.files[name], tags)
        else:
            _send(to, 404, b"", {})

    def take(self, to: BaseHTTPRequestHandler) -> None:
        """Answer what writes: a repository, the way each file is to go, large files, a commit."""
        path = to.path.partition("?")[0]
        body = to.rfile.read(int(to.headers.get("Content-Length") or 0))
        self.asked.append((to.command, path, None))
        if to.command == "PUT" and path.startswith("/large/"):
            self._large[path.removeprefix("/large/")] = body
            _send(to, 200, b"", {})
        elif to.headers.get("Authorization") != f"Bearer {self.token}":
            _send(to, 401, b'{"error": "Invalid credentials"}', {"Content-Type": "application/json"})
        elif path == "/api/validate-yaml":
            _json(to, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, [asked.get("organization"), asked["name"]]))
            key = f"datasets/{name}" if asked.get("type") == "dataset" else name
            self.made.setdefault(key, asked)
            self.pushed.setdefault(key, {})
            _json(to, {"url": f"{self.url}/{key}"})
        elif path.endswith("/preupload/main"):
            files = [
                {"path": file["path"], "shouldIgnore": False, "oid": None,
                 "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular"}
                for file in json.loads(body)["files"]
            ]  # fmt: skip
            _json(to, {"files": files})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**entry, "actions": {"upload": {"href": f"{self.url}/large/{entry['oid']}", "header": {}}}}
                for entry in json.loads(body)["objects"]
            ]
            _json(to, {"transfer": "basic", "objects": objects})
        elif found := re.fullmatch(r"/api/(models/|(datasets/))([^/]+/[^/]+)/commit/main", path):
            name = f"{found[2] or ''}{found[3]}"
            repo = self.pushed[name]
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    repo[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    repo[value["path"]] = self._large[value["oid"]]
            _json(to, {"commitUrl": f"{self.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            _json(to, {"error": "no such route"}, 404)

    def _send_file(self, to: BaseHTTPRequestHandler, name: str, data: bytes, headers: dict[str, str]) -> None:
        start = 0
        span = re.fullmatch(r"bytes=(\d+)-", to.headers.get("Range") or "")
        if to.headers.get("If-Range", headers.get("ETag")) != headers.get("ETag"):
            span = None
        if span:
            start = int(span[1])
            if start >= len(data):
                _send(to, 416, b"", {"Content-Range": f"bytes */{len(data)}"})
                return
            headers = {**headers, "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        part = data[start:]
        sent = len(part)
        if to.command == "GET" and name in self.breaks:
            self.breaks.remove(name)
            sent //= 2
        headers = {**headers, "Accept-Ranges": "bytes", "Content-Length": str(len(part))}
        _send(to, 206 if span else 200, part[:sent], headers)
        if sent < len(part):
            to.close_connection = True
            to.connection.close()


def _hash(name: str, data: bytes) -> str:
    if name.endswith(LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def _entry(name: str, data: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": name, "size": len(data), "oid": _hash(name, data)}
    if name.endswith(LARGE):
        entry |= {"oid": "0" * 40, "lfs": {"oid": _hash(name, data), "size": len(data), "pointerSize": 130}}
    return entry


def _json(to: BaseHTTPRequestHandler, answer: object, status: int = 200) -> None:
    _send(to, status, json.dumps(answer).encode(), {"Content-Type": "application/json"})


def _send(to: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str]) -> None:
    to.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        to.send_header(name, value)
    to.end_headers()
    if to.command != "HEAD":
        to.wfile.write(body)
