"""A scorer's own server for `reward.kind: http`: how bright and how lively a video is.

pip install -r requirements.txt        # an environment of its own, without vpo_ray
python server.py 127.0.0.1 8900
"""

import email
import email.policy
import io
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import av
import numpy as np


def score(video: bytes, query: str) -> dict:
    with av.open(io.BytesIO(video)) as container:
        frames = np.stack([frame.to_ndarray(format="gray") for frame in container.decode(video=0)]) / 255.0
    brightness, motion = frames.mean(), np.abs(np.diff(frames, axis=0)).mean() if len(frames) > 1 else 0.0
    return {"dimensions": {"brightness": float(brightness), "motion": float(motion)}}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        known = self.path == "/identity"
        self.reply(200 if known else 404, {"name": "bright-and-lively", "version": "1"} if known else {})

    def do_POST(self) -> None:
        head = f"Content-Type: {self.headers['Content-Type']}\n\n".encode()
        form = head + self.rfile.read(int(self.headers["Content-Length"]))
        parts = email.message_from_bytes(form, policy=email.policy.HTTP).iter_parts()
        fields = {
            p.get_param("name", header="content-disposition"): p.get_payload(decode=True) for p in parts
        }
        try:
            self.reply(200, score(fields["video"], fields["query"].decode()))
        except (av.error.FFmpegError, KeyError, ValueError) as error:
            self.reply(200, {"error": f"this video has no score: {error!r}"})

    def reply(self, status: int, answer: dict) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


if __name__ == "__main__":
    server = ThreadingHTTPServer((sys.argv[1], int(sys.argv[2])), Handler)
    sys.stdout.write(f"listening on {server.server_address[1]}\n")
    sys.stdout.flush()
    server.serve_forever()
