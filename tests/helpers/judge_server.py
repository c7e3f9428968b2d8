"""A judge at the HTTP edge: it answers as it is told to, and keeps what it is asked."""

import http.server
import json
import threading
import time
from contextlib import contextmanager, suppress


class Judge:
    """A server that runs in a thread, and what it was sent."""

    def __init__(self, answer):
        """`answer` takes the body of a request and its number; it returns the text of the reply,
        or a status with a text and perhaps headers."""
        self.answer = answer
        self.requests, self.keys = [], []
        self.under_way, self.most_under_way = 0, 0
        self.lock = threading.Lock()
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler_of(self))
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def questions(self):
        return [body["messages"][0]["content"] for body in self.requests]

    def close(self):
        self.server.shutdown()
        self.server.server_close()


def handler_of(judge):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with judge.lock:
                judge.requests.append(body)
                judge.keys.append(self.headers.get("Authorization"))
                number = len(judge.requests)
                judge.under_way += 1
                judge.most_under_way = max(judge.most_under_way, judge.under_way)
            if self.path == "/v1/chat/completions":
                answer = judge.answer(body, number)
            else:
                answer = 404, "no such path"
            time.sleep(0.02)
            with judge.lock:
                judge.under_way -= 1
            if isinstance(answer, str):
                message = {"role": "assistant", "content": answer}
                answer = 200, json.dumps({"choices": [{"index": 0, "message": message}]})
            status, text, *headers = answer
            self.send_response(status)
            for name, value in (headers[0] if headers else {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(text.encode())))
            with suppress(BrokenPipeError):  # nobody waits for the answer any more
                self.end_headers()
                self.wfile.write(text.encode())

        def log_message(self, *args):
            """Say nothing."""

    return Handler


@contextmanager
def judging(answer):
    """A judge that listens for as long as the block runs."""
    judge = Judge(answer)
    try:
        yield judge
    finally:
        judge.close()
