"""No secret gets into a record, wherever it stands."""

import json
import re
import subprocess

import pytest

from luthier import redaction
from luthier.config.schema import DatasetConfig, ModelConfig, RunConfig
from luthier.record.record import RunRecord
from luthier.record.run_dir import open_run
from luthier.redaction import redact, redact_override, redact_text

TOKEN = "hf_" + "AbCdEfGh" * 4
ENVIRONMENT = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "MY_SECRET": "correct horse battery",
    "TOKENIZERS_PARALLELISM": "true-and-more",
    "KEY": "short",
    "GOOGLE_CREDENTIALS": "/etc/hostname",
}

TEXTS = [
    ("a token by its look", f"token is {TOKEN}.", "token is (hidden)."),
    ("a key by its value", f"key={ENVIRONMENT['WANDB_API_KEY']}", "key=(hidden)"),
    ("words by their value", "say correct horse battery now", "say (hidden) now"),
    ("a login in an address", "https://anna:pw@git.example.org/x", "https://(hidden)@git.example.org/x"),
    ("a token in an address", "https://x0y@git.example.org/x", "https://(hidden)@git.example.org/x"),
    ("an address without a login", "https://git.example.org/x", "https://git.example.org/x"),
    ("an e-mail address", "anna@example.org", "anna@example.org"),
    ("no secret by that name", "true-and-more", "true-and-more"),
    ("a value too short to be one", "a short word", "a short word"),
    ("a path to one", "read /etc/hostname", "read /etc/hostname"),
    ("a commit", "1ab3bf0 0123456789abcdef0123456789abcdef0123456", None),
]  # fmt: skip


@pytest.mark.parametrize(("text", "safe"), [t[1:] for t in TEXTS], ids=[t[0] for t in TEXTS])
def test_a_text_is_scrubbed(text, safe):
    assert redact_text(text, ENVIRONMENT) == (text if safe is None else safe)


def test_an_override_and_a_config_are_scrubbed(monkeypatch):
    monkeypatch.setenv("MY_SECRET", "correct horse battery")
    assert redact_override("tracker.wandb.api_key=x1") == "tracker.wandb.api_key=(hidden)"
    assert redact_override(f"chat.date={TOKEN}") == "chat.date=(hidden)"
    given = {"a": ["correct horse battery", 3], "hub_token": "t", "tokens": "kept"}
    assert redact(given) == {
        "a": ["(hidden)", 3],
        "hub_token": "(hidden)",
        "tokens": "kept",
    }


PLAIN_LISTS = {
    "words": ("lora.target_modules=[q_proj, v_proj,a/b.c-d]", None),
    "numbers and constants": ("a.b=[1,-2,3.5,1e-4,true,null,1_000]", None),
    "below a harmless option": ("dataset.options.storage.region=[eu-1,us-2]", None),
    "of a secret key": ("a.passwords=[x1,y2]", "a.passwords=['(hidden)', '(hidden)']"),
    "of a group of secrets": ("a.storage.b=[x1,y2]", "a.storage.b=['(hidden)', '(hidden)']"),
    "of numbers below a secret key": ("a.token=[1,2]", None),
    "with a token": (f"a.b=[x,{TOKEN}]", "a.b=['x', '(hidden)']"),
    "with a value of the environment": ("a.b=[x-y-z-secret]", "a.b=['(hidden)']"),
    "of which a number is a secret": ("a.pin=[1234,x]", None),
    "of a password in digits": ("a.password=[1234]", "a.password=['(hidden)']"),
}


@pytest.mark.parametrize(("override", "safe"), PLAIN_LISTS.values(), ids=PLAIN_LISTS)
def test_a_list_that_needs_no_parser_is_scrubbed_as_by_hydras(override, safe, monkeypatch):
    monkeypatch.setenv("MY_SECRET", "x-y-z-secret")
    assert redaction._PLAIN_LIST.fullmatch(override.partition("=")[2])
    assert redact_override(override) == (override if safe is None else safe)
    monkeypatch.setattr(redaction, "_PLAIN_LIST", re.compile(r"(?!)"))
    assert redact_override(override) == (override if safe is None else safe)


def test_no_file_of_a_run_holds_a_secret(tmp_path, monkeypatch):
    """The environment, an override, the config, a remote's address and a change of the code."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("WANDB_API_KEY", ENVIRONMENT["WANDB_API_KEY"])
    code = tmp_path / "code"
    code.mkdir()

    def git(*words):
        subprocess.run(["git", "-C", code, *words], check=True, capture_output=True)

    git("init", "-q")
    git("remote", "add", "origin", "https://anna:s3cret-pw@git.example.org/luthier.git")
    (code / "train.py").write_text("a = 1\n")
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "first")
    (code / "train.py").write_text(f"a = '{TOKEN}'\n")
    monkeypatch.chdir(code)
    run = tmp_path / "run"
    resolved = {"model": {"kwargs": {"x": TOKEN}}, "tracker": {"wandb": {"api_key": "k" * 9}}}
    overrides = [f"model.kwargs.x={TOKEN}", f"seed={ENVIRONMENT['WANDB_API_KEY']}"]
    with open_run(run, resolved, overrides):
        pass
    record = RunRecord(run)
    model, data = ModelConfig(path="m"), DatasetConfig(path="d")
    record.start(RunConfig(model=model, dataset=data, output_dir="o"), overrides)
    record.end("failed", error=f"401 for {TOKEN}")
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) >= 4
    written = "".join(path.read_text() for path in files)
    for secret in (TOKEN, ENVIRONMENT["WANDB_API_KEY"], "s3cret-pw", "k" * 9):
        assert secret not in written
    here = json.loads((run / "run.json").read_text())["git"]["here"]
    assert here["remote"] == "https://(hidden)@git.example.org/luthier.git"
    assert here["changed_files"] == ["train.py"]
    assert "+a = '(hidden)'" in (run / here["diff"]).read_text()
