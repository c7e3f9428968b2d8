"""Images in requests: read from the request alone, within limits, and refused in OpenAI's words."""

import base64
import contextlib
import io
import socket
import struct
import threading
import time
import zlib
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("starlette")
from helpers.model_server import CHAT, RESPONSES, app_client, stream_events
from helpers.vision_families import picture, png, save_vision_family
from luthier.data.rows import RowError
from luthier.infer import LLM, request_images
from luthier.infer.request_images import ImageLimits

PICTURE = picture(60, 28)
DATA = png(PICTURE)


def address(data, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def image(url, **more):
    return {"type": "image_url", "image_url": {"url": url, **more}}


def question(*parts):
    content = [*parts, {"type": "text", "text": "What is it?"}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 6}


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """A tiny model that reads images, loaded."""
    folder = save_vision_family(tmp_path_factory.mktemp("vision") / "model", "gemma3")
    with LLM(str(folder), device="cpu", dtype="float32") as llm:
        yield llm


@pytest.fixture(scope="module")
def client(llm):
    with app_client(llm, images=ImageLimits(pixels=4000)) as client:
        yield client


def test_a_request_with_images_is_answered_as_the_model_does(client, llm):
    messages = question({"type": "image", "image": PICTURE}, {"type": "image", "image": DATA})
    (expected,) = llm.replies([messages["messages"]], max_new_tokens=6)
    asked = question(image(address(DATA)), image(address(DATA), detail="auto"))
    body = client.post(CHAT, json=asked).json()
    assert body["choices"][0]["message"]["content"] == expected.text
    assert body["usage"]["prompt_tokens"] == expected.prompt_tokens
    events, is_complete = stream_events(client.post(CHAT, json=asked | {"stream": True}).text)
    pieces = [event["choices"][0]["delta"].get("content", "") for event in events]
    assert is_complete and "".join(pieces) == expected.text
    part = {"type": "input_image", "image_url": address(DATA), "detail": "auto", "file_id": None}
    content = [part, part, {"type": "input_text", "text": "What is it?"}]
    asked = {"input": [{"role": "user", "content": content}], "max_output_tokens": 6}
    body = client.post(RESPONSES, json=asked).json()
    assert body["output"][0]["content"][0]["text"] == expected.text
    assert body["usage"]["input_tokens"] == expected.prompt_tokens


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


HUGE = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 9000, 9000, 8, 2, 0, 0, 0))
HUGE += chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
HALF = io.BytesIO()
PICTURE.save(HALF, "JPEG")
PLACE = "messages[0].content[0]"
REFUSED = {
    "a path": (image("/etc/passwd"), PLACE, "its URL must be data:image/...;base64,"),
    "a file's address": (image("file:///etc/passwd"), PLACE, "no file of the server is read"),
    "a relative path": (image("picture.png"), PLACE, "no file of the server is read"),
    "an address": (image("https://localhost/a.png"), PLACE, "luthier serve --allow-image-urls"),
    "no base64": (image("data:image/png,abc"), PLACE, "with the bytes in base64"),
    "broken base64": (image("data:image/png;base64,ab*c"), PLACE, "its base64 text is broken"),
    "no picture": (image(address(b"hello")), PLACE, "it is not a picture that can be read"),
    "a page": (image(address(b"<html>hello</html>")), PLACE, "it is not a picture but markup"),
    "half a picture": (
        image(address(HALF.getvalue()[:-300], "image/jpeg")), PLACE, "it is broken",
    ),
    "a bomb": (image(address(HUGE)), PLACE, "it says that it has 9000 x 9000 pixels, more than "),
    "too many pixels": (
        image(address(png(picture(80, 80)))), PLACE, "it says that it has 80 x 80 pixels",
    ),
    "detail": (
        image(address(DATA), detail="low"), "messages[0].content", 'detail: must be "auto"',
    ),
    "another field": (
        image(address(DATA), size=3), "messages[0].content", "a part of an image has no field",
    ),
    "no URL": (
        {"type": "image_url"}, "messages[0].content", 'must be {"type": "image_url", "image_url":',
    ),
    "a stored file": (
        {"type": "input_image", "file_id": "a"}, "messages[0].content", "keeps no files",
    ),
    "a path as an image": (
        {"type": "image", "image": "/etc/passwd"}, "messages[0].content", "must be text, or a list",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_image_of_the_request_is_refused(client, case):
    part, param, words = REFUSED[case]
    answer = client.post(CHAT, json=question(part))
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (
        400, "invalid_request_error", param,
    )  # fmt: skip
    assert error["message"].startswith(f"{param}: ") and words in error["message"]


def test_the_images_of_a_request_are_counted_together(client, llm):
    answer = client.post(CHAT, json=question(*[image(address(DATA))] * 3))
    assert answer.status_code == 400
    assert "the images of a request may have 4,000 together" in answer.json()["error"]["message"]
    with app_client(llm, images=ImageLimits(image_bytes=len(DATA) - 1)) as small:
        answer = small.post(CHAT, json=question(image(address(DATA))))
    assert answer.json()["error"]["message"] == (
        f"{PLACE}: the image: its file is larger than {len(DATA) - 1:,} bytes."
    )
    small = image(address(png(picture(1, 1))))
    answer = client.post(CHAT, json=question(*[small] * 129))
    assert "messages: has more than 128 images" in answer.json()["error"]["message"]


def test_a_model_of_text_reads_no_images(tuned_llm):
    with app_client(tuned_llm) as client:
        answer = client.post(CHAT, json=question(image("/etc/passwd")))
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == (
        "messages[0].content: the message has an image, and this model takes text only."
    )


@contextmanager
def web_server(pages):
    """A web server's address; `pages`: a status with a body or an address by path."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, body = pages[self.path]
            self.send_response(status)
            if status == 302:
                self.send_header("Location", body)
            self.end_headers()
            if status == 200:
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_model_of_text_refuses_the_image_of_a_tool(tuned_llm):
    asked = question({"type": "text", "text": "Zoom."})
    function = {"name": "zoom", "arguments": "{}"}
    asked["messages"] += [
        {
            "role": "assistant",
            "tool_calls": [{"id": "a", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "a", "content": [image(address(DATA))]},
    ]
    with app_client(tuned_llm) as client:
        answer = client.post(CHAT, json=asked)
    assert answer.status_code == 400
    assert "this model takes text only" in answer.json()["error"]["message"]


def test_a_server_that_sends_slowly_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(request_images, "_FETCH_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip():
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                for _ in range(100):
                    time.sleep(0.1)
                    connection.sendall(b"x")

        threading.Thread(target=drip, daemon=True).start()
        began = time.monotonic()
        with pytest.raises(RowError, match="it cannot be fetched: not complete after"):
            request_images._fetch(f"http://127.0.0.1:{server.getsockname()[1]}/a.png", 10**6)
    assert time.monotonic() - began < 5


def test_addresses_are_fetched_where_that_is_allowed(llm, tmp_path):
    (tmp_path / "a.png").write_bytes(DATA)
    pages = {
        "/a.png": (200, DATA), "/there": (302, "/a.png"), "/large": (200, b"x" * 9000),
        "/file": (302, (tmp_path / "a.png").as_uri()), "/gone": (404, b""),
        "/ftp": (302, "ftp://127.0.0.1/a.png"),
    }  # fmt: skip
    limits = ImageLimits(image_bytes=len(DATA), allow_urls=True)
    with web_server(pages) as server, app_client(llm, images=limits) as client:
        expected = client.post(CHAT, json=question(image(address(DATA)))).json()["choices"]
        for path in ("/a.png", "/there"):
            answer = client.post(CHAT, json=question(image(server + path)))
            assert answer.json()["choices"] == expected
        for url, words in (
            (f"{server}/large", f"its file is larger than {len(DATA):,} bytes"),
            (f"{server}/file", "it cannot be fetched"),
            (f"{server}/ftp", "it cannot be fetched"),
            (f"{server}/gone", "it cannot be fetched: HTTP Error 404"),
            ("http://[", "it cannot be fetched"),
            ((tmp_path / "a.png").as_uri(), "no file of the server is read"),
        ):
            answer = client.post(CHAT, json=question(image(url)))
            assert answer.status_code == 400
            assert words in answer.json()["error"]["message"], url
