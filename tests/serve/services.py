"""Services of somebody else that the ingress asks, as a local HTTP server that answers what a test wants."""

import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from vpo_ray.recipe import Endpoint
from vpo_ray.recipe.serve import Service

Reply = tuple[int, Any]


class Server(ThreadingHTTPServer):
    """A classifier, judge or reranker of somebody else, that answers what the test wants."""

    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """A caller that did not wait is what some tests are about."""

    def __init__(self, reply: Callable[[str, dict[str, Any]], Reply]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply = reply

    def service(self, timeout_s: float = 5) -> Service:
        url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        endpoint = Endpoint(base_url=url, api_key_env=None, timeout_s=timeout_s, retries=0)
        return Service(model="other", endpoint=endpoint)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status, body = self.server.reply(self.path, request)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def chat_reply(answer: Any) -> Reply:
    """A chat completion whose text is a JSON value, or the text itself."""
    text = answer if isinstance(answer, str) else json.dumps(answer)
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    return 200, {"id": "1", "object": "chat.completion", "created": 0, "model": "other", "choices": [choice]}
