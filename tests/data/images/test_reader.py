"""Every way in which a row has an image gives the same reference; what is none is said."""

import base64
import http.server
import json
import os
import threading
from hashlib import sha256
from pathlib import Path

import pytest

from helpers.image_files import image_bytes, picture
from luthier.data.images.reader import ImageReader, find_image
from luthier.data.rows import RowError
from luthier.errors import UserError

PNG = image_bytes("PNG")
BASE64 = base64.b64encode(PNG).decode()


@pytest.fixture
def server():
    """A web server on this machine: `/red.png` is there; the paths that were asked for are kept."""
    paths = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            paths.append(self.path)
            status = {"/red.png": 200, "/busy.png": 503}.get(self.path, 404)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(PNG if status == 200 else b"<html>no</html>")

        def log_message(self, *args):
            pass

    http_server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http_server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http_server.server_address[1]}", paths
    http_server.shutdown()
    http_server.server_close()


def ref(source, data=PNG, size=(32, 24)):
    digest = sha256(data).hexdigest()
    return {"sha256": digest, "width": size[0], "height": size[1], "source": source}


@pytest.fixture
def folder(tmp_path):
    """A data file in a folder of its own, with an image beside it."""
    (tmp_path / "sub" / "images").mkdir(parents=True)
    (tmp_path / "sub" / "rows.jsonl").write_text("")
    (tmp_path / "sub" / "images" / "red.png").write_bytes(PNG)
    return tmp_path


FILES = {
    "a path beside the data file": "images/red.png",
    "a path object": Path("images/red.png"),
    "an absolute path": "{}/sub/images/red.png",
    "a file address": "file://{}/sub/images/red.png",
    "what datasets stores without bytes": {"bytes": None, "path": "images/red.png"},
    "OpenAI's object": {"url": "images/red.png", "detail": "low"},
}


@pytest.mark.parametrize("value", FILES.values(), ids=FILES.keys())
def test_a_file_is_referred_to_and_its_bytes_stay_where_they_are(value, folder):
    value = value.format(folder) if isinstance(value, str) else value
    image = ImageReader(["sub/rows.jsonl"]).read(value, "sub/rows.jsonl:7")
    source = value if isinstance(value, str) else "images/red.png"
    assert image.ref == ref(source)
    assert image.data == b""
    file = folder / "sub" / "images" / "red.png"
    assert image.stamp == (file.stat().st_size, file.stat().st_mtime_ns)
    data_file = "sub/rows.jsonl" if image.folder == 0 else None
    assert find_image(image.ref["source"], data_file).samefile(file)


EMBEDDED = {
    "bytes": (PNG, "bytes"),
    "what datasets stores": ({"bytes": PNG, "path": "a.png"}, "a.png"),
    "bytes without a name": ({"bytes": PNG, "path": None}, "bytes"),
    "a data address": (f"data:image/png;base64,{BASE64}", "bytes"),
    "base64 text as such": (base64.b64encode(image_bytes("PNG", 99, 99)).decode(), "bytes"),
    "base64 text of JSON": ({"bytes": BASE64}, "bytes"),
}


@pytest.mark.parametrize(("value", "source"), EMBEDDED.values(), ids=EMBEDDED.keys())
def test_an_image_in_the_row_comes_with_its_bytes(value, source):
    image = ImageReader().read(value, "rows.parquet row 0")
    expected = image_bytes("PNG", 99, 99) if image.ref["width"] == 99 else PNG
    assert image.data == expected
    assert image.ref == ref(source, expected, (image.ref["width"], image.ref["height"]))
    assert image.folder == -1
    assert image.stamp is None
    json.dumps(image.ref)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "CMYK"])
def test_a_picture_of_pillow_becomes_the_bytes_of_what_a_model_sees(mode):
    from transformers.image_utils import load_image

    from luthier.data.images.decode import decode_image

    image = ImageReader().read(picture(mode=mode), "python:rows.py:rows row 0")
    assert decode_image(image.data).tobytes() == load_image(picture(mode=mode)).tobytes()
    assert image.ref == ref("bytes", image.data)


WRONG = {
    "a missing file": ("images/blue.png", "there is no file images/blue.png (looked for {}/sub/"),
    "a folder": ("images", "images cannot be read: Is a directory"),
    "a page under the name of a picture": ("page.jpg", "page.jpg: it is not a picture but markup"),
    "an empty file": ("empty.png", "empty.png: it is empty: it has no bytes"),
    "a number": (7, "this is a number (7); expected a path, an address, base64 text, or bytes"),
    "an object of other keys": ({"src": "x"}, "this object has neither bytes, path nor url (it ha"),
    "broken base64": ("data:image/png;base64,####", "its base64 text is broken: "),
    "a data address without data": ("data:image/png", "has no comma before its data"),
    "base64 of something else": (
        "data:image/png;base64,aGVsbG8=",
        "it is not a picture that can be",
    ),
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_what_never_ends_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for name in (str(tmp_path / "pipe.png"), "/dev/zero"):
        with pytest.raises(RowError, match=rf"{name} is a pipe or a device, and no picture's file"):
            ImageReader().read(name, "rows.jsonl:1")


@pytest.mark.parametrize(("value", "words"), WRONG.values(), ids=WRONG.keys())
def test_what_is_no_image_is_said(value, words, folder):
    (folder / "sub" / "page.jpg").write_text("<html>404</html>")
    (folder / "sub" / "empty.png").write_bytes(b"")
    with pytest.raises(RowError) as error:
        ImageReader(["sub/rows.jsonl"]).read(value, "sub/rows.jsonl:1")
    assert words.format(folder) in str(error.value)


def test_each_of_several_files_has_its_own_folder(folder):
    other = folder / "other"
    other.mkdir()
    (other / "rows.jsonl").write_text("")
    (other / "red.png").write_bytes(image_bytes("PNG", 5, 5))
    (folder / "sub" / "red.png").write_bytes(PNG)
    reader = ImageReader(["sub/rows.jsonl", "other/rows.jsonl"])
    widths = [
        reader.read("red.png", where).ref["width"]
        for where in ("sub/rows.jsonl:1", "other/rows.jsonl:1", "sub/rows.jsonl:2")
    ]
    assert widths == [32, 5, 32]


def test_an_address_is_fetched_once(server, monkeypatch):
    address, paths = server
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for _ in range(2):
        image = ImageReader().read(f"{address}/red.png", "rows.jsonl:1")
        assert image.ref == ref(f"{address}/red.png")
        assert find_image(image.ref["source"], None).read_bytes() == PNG
    assert paths == ["/red.png"]
    # What is in the cache needs no network.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert ImageReader().read({"url": f"{address}/red.png"}, "").ref["width"] == 32


def test_an_address_without_an_image_costs_its_row_and_a_broken_network_the_run(
    server, monkeypatch
):
    address, _ = server
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"is not in the cache .* and HF_HUB_OFFLINE is set"):
        ImageReader().read(f"{address}/red.png", "rows.jsonl:1")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(RowError, match="cannot be fetched: HTTP 404 Not Found"):
        ImageReader().read(f"{address}/blue.png", "rows.jsonl:1")
    with pytest.raises(UserError, match="cannot be fetched: HTTP Error 503"):
        ImageReader().read(f"{address}/busy.png", "rows.jsonl:1")
