"""A server for a loaded model: in this process, or listening at a port of this machine."""

import json
import socket
import threading
import time
import urllib.request
from contextlib import contextmanager

from starlette.testclient import TestClient

from luthier.infer.server import ModelServer, ServerLimits, make_app, make_server

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
QUESTION = [{"role": "user", "content": "abc"}]


@contextmanager
def app_client(llm, settings=None, host="localhost", key=None, **limits):
    """A client of the application itself, without a network."""
    limits = ServerLimits(**limits)
    server = ModelServer(llm, "tiny", settings or {}, limits)
    app = make_app(server, host, limits, key)
    with TestClient(app, base_url="http://localhost") as client:
        yield client


@contextmanager
def listening(llm, settings=None, **limits):
    """The port of a server that runs in a thread."""
    server = make_server(llm, "tiny", "localhost", 0, settings or {}, ServerLimits(**limits))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def post(port, body, path=CHAT, begun=None):
    """The text of the answer to a request; raises HTTPError for an error.

    `begun` is an event that is set once the first line of the answer is there.
    """
    request = urllib.request.Request(
        f"http://localhost:{port}{path}",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        first = answer.readline()
        if begun is not None:
            begun.set()
        return (first + answer.read()).decode()


def send_and_leave(port, body, seconds, path=CHAT):
    """Send a request, and close the connection so many seconds later."""
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\n\r\n"
    )
    with socket.create_connection(("localhost", port)) as connection:
        connection.sendall(head.encode() + data)
        time.sleep(seconds)


def stream_events(text):
    """The JSON of each event, and whether the stream ends as OpenAI's do."""
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines[:-1]], lines[-1] == "[DONE]"
