"""OpenAI-compatible HTTP servers on the loopback that behave as a test tells them to, well or badly.

They are the services outside; everything on our side of the socket is real.
"""

import email.policy
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from typing import Any

Request = dict[str, Any]


@dataclass
class Reply:
    """What to send: bytes, text, or a JSON value. `fault`: stall (never answer), cut (close at once), half
    (a part of the body), trickle (a byte at a time, for ever)."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    fault: str = ""


def completion(
    content: Any, *, finish: str = "stop", refusal: str | None = None, usage: bool = True
) -> Reply:
    text = content if isinstance(content, str) or content is None else json.dumps(content)
    message = {"role": "assistant", "content": text, "refusal": refusal}
    body = {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "finish_reason": finish, "message": message}],
    }
    if usage:
        body["usage"] = {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100}
    return Reply(body)


def failure(status: int, message: str = "no", code: str | None = None, **headers: str) -> Reply:
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply({"error": {"message": message, "code": code}}, status, headers)


class EndpointServer(ThreadingHTTPServer):
    """Answers by `reply(request)`. Requests, their times and their headers are kept.

    Attributes:
        files: of each request, the files of its form by their fields: name, bytes, media type.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, reply: Callable[[Request], Reply]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply = reply
        self.requests: list[Request] = []
        self.files: list[dict[str, tuple[str, bytes, str]]] = []
        self.paths: list[str] = []
        self.seen_headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()
        self.closing = threading.Event()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def reply_to(self, method: str, path: str, request: Request) -> Reply:
        return self.reply(request)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def close(self) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: Any) -> None:
        """A client that went away is part of these tests."""


class VideoServer(EndpointServer):
    """A service of video jobs.

    Attributes:
        make: renders the mp4 of a request's fields.
        polls: how often a job is seen before it is completed.
        fault: what to answer in place of the right thing, asked with `create`, `poll` or `content` and the
            job's fields; None for the right thing.
        jobs: the fields of every job by its id, those that were taken and that are known still.
    """

    def __init__(self, make: Callable[[Request], bytes], polls: int = 2) -> None:
        self.make, self.polls = make, polls
        self.fault: Callable[[str, Request], Reply | None] = lambda what, fields: None
        self.jobs: dict[str, Request] = {}
        self.seen: Counter[str] = Counter()
        self.numbers = count(1)
        super().__init__(lambda _: Reply())

    def reply_to(self, method: str, path: str, request: Request) -> Reply:
        job, _, content = path.partition("/videos")[2].strip("/").partition("/")
        what = "create" if method == "POST" else "content" if content else "poll"
        if what != "create" and job not in self.jobs:
            return failure(404, f"Video with id {job} not found")
        if reply := self.fault(what, request if what == "create" else self.jobs[job]):
            return reply
        if what == "content":
            return Reply(self.make(self.jobs[job]), headers={"Content-Type": "video/mp4"})
        with self.lock:
            if what == "create":
                job = f"video_{next(self.numbers)}"
                self.jobs[job] = request
            self.seen[job] += what == "poll"
        status = (
            "completed" if self.seen[job] >= self.polls else "in_progress" if self.seen[job] else "queued"
        )
        return Reply({"id": job, "object": "video", "status": status, "error": None})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: EndpointServer

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.paths.append(self.path)
        self._send(self.server.reply_to("GET", self.path, {}))

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get_content_type() == "multipart/form-data":
            head = f"Content-Type: {self.headers['Content-Type']}\n\n".encode()
            parts = email.message_from_bytes(head + data, policy=email.policy.HTTP)
            request, files = {}, {}
            for part in parts.iter_parts():
                name = part.get_param("name", header="content-disposition")
                content = part.get_payload(decode=True)
                request[name] = content.decode(errors="replace")
                if (file := part.get_filename()) is not None:
                    files[name] = file, content, part.get_content_type()
        else:
            request, files = json.loads(data), {}
        server = self.server
        with server.lock:
            server.requests.append(request)
            server.files.append(files)
            server.paths.append(self.path)
            server.seen_headers.append({name.lower(): value for name, value in self.headers.items()})
            server.times.append(time.monotonic())
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
        try:
            self._send(server.reply_to("POST", self.path, request))
        finally:
            with server.lock:
                server.under_way -= 1

    def _send(self, reply: Reply) -> None:
        data = reply.body if isinstance(reply.body, str | bytes) else json.dumps(reply.body)
        data = data.encode() if isinstance(data, str) else data
        if reply.fault == "stall":
            self.server.closing.wait(30)
        if reply.fault in ("stall", "cut"):
            self.close_connection = True
            return
        self.send_response(reply.status)
        for name, value in {"Content-Type": "application/json", **reply.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if reply.fault == "trickle":
            while not self.server.closing.wait(0.05):
                self.wfile.write(b" ")
        if reply.fault == "half":
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass
