"""A canary in every input, and a search of every output: no secret leaves the process as text."""

import http.server
import json
import threading
from typing import Any, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel

from helpers import train_command
from helpers.fork_server import Forks
from helpers.train_command import said, words
from luthier import redaction
from luthier.config import load_config
from luthier.config.run_names import run_folder
from luthier.config.schema import DatasetConfig, ModelConfig, RunConfig, SourceConfig
from luthier.data.sources.open import open_source
from luthier.errors import UserError
from luthier.export.write_card import write_card
from luthier.record import machine_info
from luthier.record.record import RunRecord, read_record
from luthier.record.run_dir import inspect_run, open_run
from luthier.redaction import HIDDEN, redact, redact_chat, redact_override, remember_secrets
from luthier.train.trackers import _redacted_command_line

CANARY = "CaNaRy7xQ2vL9wZ4"
"""A text that stands nowhere else, and is a secret by nothing but its place."""
TOKEN = f"hf_{CANARY}tokenOfTheHub"
"""A text that looks like a secret wherever it stands."""


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch):
    """A process remembers the secrets of its configs; each test is a process of its own."""
    monkeypatch.setattr(redaction, "_typed_secrets", set())
    monkeypatch.setattr(redaction, "_environment_values", {})


def written(folder):
    """Return all that lies below a folder, names and contents."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return b"\n".join(
        [str(path.relative_to(folder)).encode() for path in folder.rglob("*")]
        + [path.read_bytes() for path in files]
    )


@pytest.fixture(autouse=True)
def cheap_facts(monkeypatch):
    """What a record says of the machine is slow to find, and holds nothing of a config."""
    monkeypatch.setattr(machine_info, "package_versions", dict)
    monkeypatch.setattr(machine_info, "git_state", lambda *_: None)
    monkeypatch.setattr(machine_info, "hardware_facts", dict)


def write_run(folder, resolved, overrides=(), chat=None):
    """Write the files of a run as a training does."""
    remember_secrets(resolved)
    with open_run(folder, resolved, list(overrides)):
        pass
    record = RunRecord(folder)
    model, data = ModelConfig(path="m"), DatasetConfig(path="d")
    config = RunConfig(model=model, dataset=data, output_dir="o")
    record.start(config, list(overrides), resolved)
    record.update(chat=chat, launch={"config": resolved})
    record.end("failed", error=f"it failed with {json.dumps(resolved)}")


# Keys by name, in every form of Hydra's grammar.

SECRET_PLACES = {
    "a header": ("dataset.options.storage.headers", "Authorization", f"Bearer {CANARY}"),
    "a header by another name": ("dataset.options.storage.headers", "X-Anything", CANARY),
    "the key of S3": ("dataset.options.storage", "key", CANARY),
    "the secret of S3": ("dataset.options.storage", "secret", CANARY),
    "a token": ("dataset.options.storage", "token", CANARY),
    "deeper": ("dataset.options.storage.client_kwargs", "aws_secret_access_key", CANARY),
    "an account's key": ("dataset.options.storage", "account_key", CANARY),
    "a shared access signature": ("dataset.options.storage", "sas_token", CANARY),
    "a connection string": ("dataset.options.storage", "connection_string", f"Key={CANARY};A=b"),
    "a password": ("dataset.sources.a.options.storage", "password", CANARY),
    "an option that nobody knows": ("dataset.eval.sets.b.options.storage", "x1", CANARY),
    "of wandb": ("tracker.wandb.settings", "api_key", CANARY),
    "of the hub": ("trainer.args", "hub_token", CANARY),
    "of a template": ("chat.variables", "db_password", CANARY),
    "of a model": ("model.kwargs", "accessToken", CANARY),
}


def quoted(text):
    """Return a text as Hydra's grammar takes it."""
    return "'" + text.replace("'", "\\'") + "'"


GRAMMAR = {
    "key=value": lambda path, name, text: f"{path}.{name}={text}",
    "added": lambda path, name, text: f"+{path}.{name}={quoted(text)}",
    "forced": lambda path, name, text: f"++{path}.{name}={quoted(text)}",
    "in double quotes": lambda path, name, text: f'{path}.{name}="{text}"',
    "in a mapping": lambda path, name, text: f"{path}={{{name}: {quoted(text)}}}",
    "tight": lambda path, name, text: f"{path}={{a:1,{name}:{quoted(text)},b:[2]}}",
    "in nested mappings": lambda path, name, text: (
        f"{path.rpartition('.')[0]}={{{path.rpartition('.')[2]}: {{{name}: {quoted(text)}}}}}"
    ),
    "in a list": lambda path, name, text: f"{path}.{name}=[{quoted(text)},x]",
    "in a sweep": lambda path, name, text: f"{path}.{name}={quoted(text)},other",
    "in a choice": lambda path, name, text: f"{path}.{name}=choice({quoted(text)},other)",
    "that breaks off": lambda path, name, text: f"{path}.{name}={quoted(text)[:-1]}",
    "in a cast": lambda path, name, text: f"{path}.{name}=str({quoted(text)})",
}


@pytest.mark.parametrize("form", GRAMMAR.values(), ids=GRAMMAR)
@pytest.mark.parametrize(("path", "name", "text"), SECRET_PLACES.values(), ids=SECRET_PLACES)
def test_no_form_of_an_override_is_recorded_with_its_secret(path, name, text, form):
    override = form(path, name, text)
    assert CANARY in override
    assert CANARY not in redact_override(override)
    assert CANARY not in run_folder({"recipe": "x"}, [override])
    # What is no secret stays.
    assert redact_override(override).lstrip("+").startswith(path.split(".")[0])


def nested(path, value):
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


@pytest.mark.parametrize(("path", "name", "text"), SECRET_PLACES.values(), ids=SECRET_PLACES)
def test_no_file_of_a_run_holds_a_secret_by_its_key(path, name, text, tmp_path):
    resolved = nested(f"{path}.{name}", text)
    write_run(tmp_path / "run", resolved, [f"{path}.{name}={text}"])
    assert CANARY.encode() not in written(tmp_path / "run")
    # The same run, with another secret of the same place: it goes on.
    other = nested(f"{path}.{name}", "renewed-secret")
    assert inspect_run(tmp_path / "run", other).changes == []


# Every key of the config that takes text, by its look.


def text_keys(model, prefix=""):
    """Yield each key of a config that takes text or a mapping, with such a value."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        kinds = [field.annotation, *get_args(field.annotation)]
        models = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if models and get_origin(field.annotation) is dict:
            yield from text_keys(models[0], f"{key}.some.")
        elif models:
            yield from text_keys(models[0], f"{key}.")
        elif str in kinds or field.annotation is Any:
            yield key, TOKEN
        elif any(get_origin(kind) is list for kind in kinds):
            yield key, ["a", TOKEN]
        elif any(dict in (kind, get_origin(kind)) or issubclass_of_dict(kind) for kind in kinds):
            yield key, {"some": {"deep": [TOKEN]}, TOKEN: "a key"}


def issubclass_of_dict(kind):
    return isinstance(kind, type) and issubclass(kind, dict)


KEYS = dict(text_keys(RunConfig))


def test_the_keys_are_those_of_the_whole_config():
    assert {"model.path", "model.kwargs", "dataset.options", "dataset.sources.some.path", "lora",
            "dataset.eval.sets.some.options", "chat.variables", "chat.template", "trainer.args",
            "trainer.evaluation.metrics", "tracker.wandb", "card.license"} <= set(KEYS)  # fmt: skip
    assert len(KEYS) > 60


@pytest.mark.parametrize("key", KEYS)
def test_no_file_of_a_run_holds_a_secret_by_its_look(key, tmp_path):
    resolved = nested(key, KEYS[key])
    write_run(tmp_path / "run", resolved, [f"{key}={json.dumps(KEYS[key])}"])
    text = written(tmp_path / "run").decode()
    # Of a template nothing is hidden where it is the model's own; here it is a setting.
    assert CANARY not in text
    assert HIDDEN in text


# Addresses.

ADDRESSES = {
    "a login": f"https://ada:{CANARY}@host.example/a.jsonl",
    "a token as login": f"https://{CANARY}@host.example/a.jsonl",
    "a login with an at sign": f"https://ada:p@{CANARY}@host.example/a.jsonl",
    "of S3": f"https://b.s3.example/a?X-Amz-Credential=AK%2F1&X-Amz-Signature={CANARY}",
    "of S3, older": f"https://b.s3.example/a?AWSAccessKeyId=A&Expires=1&Signature={CANARY}",
    "of Google": f"https://storage.example/a?X-Goog-Date=1&X-Goog-Signature={CANARY}",
    "of Azure": f"https://a.blob.example/c/a.jsonl?sv=2022&se=2026&sp=r&sig={CANARY}",
    "a token": f"https://host.example/a.jsonl?x=1&token={CANARY}",
    "an access token": f"https://host.example/a.jsonl?access_token={CANARY}#top",
    "an api key": f"https://host.example/a.jsonl?apikey={CANARY}",
    "behind the hash": f"https://host.example/a.jsonl#access_token={CANARY}&x=1",
    "a webhook": f"https://hooks.slack.com/services/T0/B0/{CANARY}",
    "a database": f"postgresql://ada:{CANARY}@db.example:5432/rows?sslmode=require",
    "a bot": f"https://api.telegram.org/bot1:{CANARY}/send",
}


@pytest.mark.parametrize("address", ADDRESSES.values(), ids=ADDRESSES)
def test_addresses_are_written_without_what_opens_them(address, tmp_path):
    resolved = {"dataset": {"path": address, "sources": {"a": {"path": [address]}}}}
    write_run(tmp_path / "run", resolved, [f"dataset.path={quoted(address)}"])
    assert CANARY.encode() not in written(tmp_path / "run")
    assert inspect_run(tmp_path / "run", resolved).changes == []
    renewed = json.loads(json.dumps(resolved).replace(CANARY, "renewed"))
    assert inspect_run(tmp_path / "run", renewed).changes == []
    # Another file is another run.
    old, new = (".example", ".other") if ".example" in address else ("https://", "https://other.")
    moved = json.loads(json.dumps(resolved).replace(old, new))
    assert inspect_run(tmp_path / "run", moved).state == "new"


# The environment.

VARIABLES = (
    *("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD"),
    *("MYSQL_PWD", "DB_PASS", "GITHUB_PAT", "SLACK_WEBHOOK", "AZURE_STORAGE_CONNECTION_STRING"),
    *("SENTRY_DSN", "DEPLOY_TOKEN_CI", "MY_SECRET_SAUCE", "PLAIN"),
)
TAKEN = {
    "whole": "chat.variables={x: '${oc.env:NAME}'}",
    "dotted": "chat.variables.x=${oc.env:NAME}",
    "with a default": "chat.variables.x='${oc.env:NAME,nothing}'",
    "within a text": "chat.variables.x='before ${oc.env:NAME} behind'",
    "deeper": "chat.variables={x: [a, {b: '${oc.env:NAME}'}]}",
    "by another key": "chat.variables={x: '${chat.variables.y}', y: '${oc.env:NAME}'}",
    "as text": "chat.variables.x=VALUE",
    "as a system prompt": "dataset.system='${oc.env:NAME}'",
    "as a header": "dataset.options={storage: {headers: {Authorization: 'Bearer ${oc.env:NAME}'}}}",
    "as a trainer's argument": "trainer.args.optim_args='${oc.env:NAME}'",
    "in a path": "dataset.path='https://ada:${oc.env:NAME}@host.example/a.jsonl'",
}
START = ("model=hub", "model.path=m", "dataset=jsonl", "dataset.path=a.jsonl")


BY_NAME = [(name, TAKEN[way]) for name in VARIABLES for way in ("whole", "as text")]
BY_WAY = [(name, taken) for name in ("DB_PASS", "PLAIN") for taken in TAKEN.values()]
CASES = [case for case in BY_NAME + BY_WAY if case != ("PLAIN", TAKEN["as text"])]
"""All but a text that nothing calls a secret."""


@pytest.mark.parametrize(("name", "taken"), CASES)
def test_no_file_holds_what_came_from_the_environment(name, taken, tmp_path, monkeypatch):
    monkeypatch.setenv(name, CANARY)
    override = taken.replace("NAME", name).replace("VALUE", CANARY)
    loaded = load_config([*START, override])
    chat = {"template": "{{ x }}", "variables": loaded.resolved["chat"]["variables"]}
    write_run(tmp_path / "run", loaded.recorded, loaded.overrides, chat)
    (tmp_path / "run" / "chat.json").write_text(json.dumps(redact_chat(chat)))
    (tmp_path / "run" / "card.json").write_text(json.dumps(redact(loaded.resolved)))
    text = written(tmp_path / "run").decode()
    assert CANARY not in text and CANARY not in loaded.config.output_dir
    reference = f"${{oc.env:{name}}}"
    if "VALUE" not in taken:
        assert reference in (tmp_path / "run" / "config.yaml").read_text()
        assert reference in (tmp_path / "run" / "card.json").read_text()
    # The run goes on: its config is the same.
    assert inspect_run(tmp_path / "run", loaded.recorded).changes == []


def test_a_variable_that_changes_changes_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("RATE", "1e-3")
    monkeypatch.setenv("HF_TOKEN", "first-token")
    line = [*START, "trainer.args.learning_rate='${oc.env:RATE}'",
            "dataset.options={storage: {token: '${oc.env:HF_TOKEN}'}}"]  # fmt: skip
    loaded = load_config(line)
    assert loaded.config.trainer.args["learning_rate"] == 1e-3
    write_run(tmp_path / "run", loaded.recorded)
    assert set(read_record(tmp_path / "run")["environment"]) == {"RATE"}
    monkeypatch.setenv("HF_TOKEN", "renewed-token")
    assert inspect_run(tmp_path / "run", load_config(line).recorded).changes == []
    monkeypatch.setenv("RATE", "5e-3")
    (tmp_path / "run" / "model").mkdir()
    with pytest.raises(UserError, match=r"learning_rate: \$\{oc\.env:RATE\} -> another value"):
        inspect_run(tmp_path / "run", load_config(line).recorded)


MISSING = {
    "a secret that was typed": (
        {"key": HIDDEN},
        "options.storage.key: the record of the run does not",
    ),
    "a secret that is not given out": (
        {"key": "${oc.env:DB_PASS}"},
        "from the variable DB_PASS, which is a secret of your environment",
    ),
    "a variable that is not set": ({"key": "${oc.env:NOT_SET}"}, "NOT_SET, which is not set"),
}


@pytest.mark.parametrize(("storage", "text"), MISSING.values(), ids=MISSING)
def test_rows_behind_a_missing_secret_are_an_error(storage, text, monkeypatch):
    monkeypatch.setenv("DB_PASS", CANARY)
    config = SourceConfig(path="s3://bucket/rows.jsonl", options={"storage": storage})
    with pytest.raises(UserError) as error:
        open_source(config)
    assert text in str(error.value) and CANARY not in str(error.value)


# The terminal.


def test_printing_the_config_prints_no_secret(luthier, monkeypatch):
    monkeypatch.setenv("DB_PASS", f"{CANARY}-of-the-database")
    line = [*START, f"dataset.options={{storage: {{key: {CANARY}x}}}}",
            "chat.variables.x=${oc.env:DB_PASS}", f"tracker.wandb.notes={TOKEN}"]  # fmt: skip
    for flags in (["--cfg", "job", "--resolve"], ["--cfg", "job"], ["--cfg", "all"],
                  ["--cfg", "job", "-p", "dataset.options.storage.key"]):  # fmt: skip
        code, out, err = luthier("train", *line, *flags)
        assert code == 0 and CANARY not in out + err, flags
    assert "(hidden)" in out


MISTAKES = {
    "a storage that is none": [f"dataset.options.storage='{TOKEN}'"],
    "a header in the wrong place": [
        "dataset.path=http://127.0.0.1:1/a.jsonl",
        f"dataset.options={{storage: {{headers: {{Authorization: {CANARY}}}, x: {CANARY}}}}}",
    ],
    "an address that does not answer": [f"dataset.path=http://127.0.0.1:1/a.jsonl?sig={CANARY}"],
    "an address with a login": [f"dataset.path=https://ada:{CANARY}@127.0.0.1:1/a.jsonl"],
    "a key that does not exist": [f"dataset.opshuns.token={TOKEN}"],
    "a mapping that breaks off": [f"dataset.options={{storage: {{key: {TOKEN}"],
    "an environment's secret": ["dataset.path=${oc.env:DB_PASS}/x.jsonl"],
    "a format's option": [f"dataset.options.encoding={TOKEN}"],
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_no_message_shows_a_secret(mistake, luthier, workplace, monkeypatch):
    workplace("a.jsonl", '{"prompt": "a", "completion": "b"}\n')
    monkeypatch.setenv("DB_PASS", f"{CANARY}-of-the-database")
    code, out, err = luthier("train", *START, *mistake)
    assert code == 2, out + err
    assert CANARY not in out + err
    assert len(err) > 20


def test_trackers_see_the_command_line_without_secrets(monkeypatch):
    import sys

    line = ["train.py", f"dataset.options.storage.key={CANARY}", "lora.r=8"]
    monkeypatch.setattr(sys, "argv", line)
    with _redacted_command_line():
        assert sys.argv == ["train.py", "dataset.options.storage.key=(hidden)", "lora.r=8"]
    assert sys.argv == line


# A real run.


@pytest.fixture
def guarded(tmp_path):
    """Serve rows over http to who has the header and the signature."""

    class Rows(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            is_allowed = self.headers.get("Authorization") == f"Bearer {CANARY}-header"
            is_allowed &= f"sig={CANARY}-signature" in self.path
            rows = [
                {"prompt": f"question {n}", "completion": "answer " * (1 + n % 3)}
                for n in range(32)
            ]
            content = "\n".join(map(json.dumps, rows)).encode()
            self.send_response(200 if is_allowed else 403)
            self.send_header("Content-Length", str(len(content) if is_allowed else 0))
            self.end_headers()
            if is_allowed:
                self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Rows)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/rows.jsonl"
    server.shutdown()
    server.server_close()


@pytest.fixture
def forks():
    """A process that forks runs."""
    made = Forks()
    yield made
    made.close()


@pytest.fixture
def tiny(tmp_path):
    """A folder with a model and rows; runs are written beside them."""
    train_command.make(tmp_path)
    return tmp_path


@pytest.mark.train
def test_a_run_with_trackers_leaves_no_secret_anywhere(forks, tiny, guarded, luthier, monkeypatch):
    line = [word for word in words(tiny) if not word.startswith("dataset.path")]
    # A template that reads the variable: one that nothing reads is refused.
    reading = train_command.TEMPLATE + "{% if x == 'loud' %}!{% endif %}"
    (tiny / "reading.jinja").write_text(reading, encoding="utf-8")
    line += [
        "chat.template=reading.jinja",
        f"dataset.path='{guarded}?sig={CANARY}-signature'", "dataset.format=jsonl",
        f"dataset.options={{storage: {{headers: {{Authorization: 'Bearer {CANARY}-header'}}}}}}",
        "dataset.system='${oc.env:PLAIN_TEXT}'", "chat.variables={x: '${oc.env:DB_PASS}'}",
        "trainer.args.optim_args='${oc.env:OPTIM}'", "trainer.evaluation.samples=2",
        "trainer.evaluation.metrics=[exact_match]", "tracker=wandb", "tracker.wandb.mode=offline",
        "tracker.to=[wandb,tensorboard]", "output_dir=secrets",
    ]  # fmt: skip
    environment = {
        "DB_PASS": f"{CANARY}-variable", "PLAIN_TEXT": f"{CANARY}-plain", "WANDB_SILENT": "true",
        "OPTIM": f"note={CANARY}-argument", "GITHUB_PAT": f"{CANARY}-unused",
    }  # fmt: skip
    assert forks.run(tiny, *line, **environment) == 0, said(tiny)[-3000:]
    run = tiny / "secrets"
    assert list((run / "wandb").glob("offline-run-*/run-*.wandb"))
    assert list((run / "tensorboard").rglob("events.*"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert write_card(run) is None
    assert {path.name for path in (run / "model").iterdir()} >= {
        "chat.json", "card.json", "README.md", "EXPORT.md",
    }  # fmt: skip
    for path in [path for path in run.rglob("*") if path.is_file()]:
        assert CANARY.encode() not in path.read_bytes(), path
    # The rows themselves hold the system prompt.
    for secret in ("header", "signature", "variable", "argument", "unused"):
        assert f"{CANARY}-{secret}".encode() not in written(tiny / "cache")
    assert CANARY not in said(tiny)
    chat = json.loads((run / "model" / "chat.json").read_text())
    assert chat["variables"] == {"x": "${oc.env:DB_PASS}"}
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["dataset"]["system"] == "${oc.env:PLAIN_TEXT}"
    assert config["dataset"]["path"].endswith("?sig=(hidden)")
    # The finished run is found again, and shown.
    assert forks.run(tiny, *line, **environment) == 0
    assert "This run is finished already" in said(tiny)
    code, out, err = luthier("show", run)
    assert code == 0 and CANARY not in out + err
    code, out, err = luthier("reproduce", run, "--trust")
    assert code == 2 and "a secret that was typed, and is not in the record" in err
