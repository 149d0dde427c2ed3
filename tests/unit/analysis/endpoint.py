"""A real HTTP server that speaks the protocol of OpenAI's chat completions."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

GOOD = json.dumps({"complexity": 2, "monosemanticity": 2, "explanation": "the word cat"})


class Server:
    """Gives the answers of `script` in turn, then answers as a model that reads: a status, a text, seconds to wait, or
    raw bytes."""

    def __init__(self):
        self.script, self.asked, self.headers, self.times = [], [], [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append(body)
                outer.headers.append(dict(self.headers))
                outer.times.append(time.monotonic())
                step = outer.script.pop(0) if outer.script else outer.reads(body)
                if isinstance(step, float):
                    time.sleep(step)
                    step = outer.reads(body)
                status, text = step if isinstance(step, tuple) else (200, step)
                raw = text if isinstance(text, bytes) else completion(text)
                try:
                    self.send_response(status)
                    if status == 429:
                        self.send_header("Retry-After", "0.2")
                    self.send_header("Content-Length", str(len(raw)))
                    self.end_headers()
                    self.wfile.write(raw)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # who asked has given up waiting

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @staticmethod
    def reads(body) -> str:
        text = body["messages"][-1]["content"]
        if "Rate it" in text:
            return GOOD
        lines = [line.split(". ", 1) for line in text.splitlines() if line[:1].isdigit()]
        return json.dumps({"active": [int(n) for n, line in lines if ("<<cat>>" if "<<" in line else "cat") in line]})


def completion(text: str | None) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()
