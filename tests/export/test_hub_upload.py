"""Pushing through the hub's own library to a hub at the HTTP edge."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from helpers.export_runs import make_run, read
from helpers.hub_server import TOKEN, Hub
from luthier.export.write_card import write_card


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that this process talks to, logged in."""
    from huggingface_hub import constants

    from luthier.model.source import is_hub_unreachable

    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    is_hub_unreachable.cache_clear()
    yield server
    is_hub_unreachable.cache_clear()
    server.close()


@pytest.fixture
def run(tmp_path, base):
    """A run with its card, and with files in model/ that are none of the hub's business."""
    folder = make_run(tmp_path / "runs" / "default", base)
    assert write_card(folder) is None
    model = folder / "model"
    (model / "optimizer.pt").write_bytes(b"pickle")
    (model / "training_args.bin").write_bytes(b"pickle")
    (model / "notes.txt").write_text("for me")
    return folder


SENT = {
    "README.md", "EXPORT.md", "adapter_config.json", "adapter_model.safetensors", "chat.json",
    "chat_template.jinja", "loss.png", "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip


def test_a_link_out_of_the_folder_is_not_sent(run, hub, luthier, tmp_path):
    model, outside = run / "model", tmp_path / "outside"
    outside.mkdir()
    for name in ("processor_config.json", "merges.txt"):
        (outside / name).write_text("{}")
        (model / name).symlink_to(outside / name)
    (model / "vocab.txt").symlink_to(model / "notes.txt")
    code, out, _ = luthier("push", run, "--to", "ada/reminders", "--license", "mit")
    assert code == 0
    assert set(hub.repositories["ada/reminders"]["files"]) == SENT | {"vocab.txt"}
    assert out.count("a link out of this folder") == 2
    (model / "adapter_model.safetensors").rename(outside / "weights")
    (model / "adapter_model.safetensors").symlink_to(outside / "weights")
    code, _, err = luthier("push", run, "--to", "ada/again", "--license", "mit")
    assert code == 2 and "link out of this folder does not go (adapter_model.safetensors)" in err
    assert "ada/again" not in hub.repositories


def test_an_adapter_goes_to_a_private_repository(run, hub, luthier):
    code, out, _ = luthier("push", run, "--to", "ada/reminders", "--license", "mit")
    assert code == 0
    found = hub.repositories["ada/reminders"]
    assert found["private"] is True
    assert set(found["files"]) == SENT
    weights = (run / "model" / "adapter_model.safetensors").read_bytes()
    assert found["files"]["adapter_model.safetensors"] == weights
    card = found["files"]["README.md"].decode()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["license"] == "mit"
    assert card.split("---\n")[2].startswith("\n# reminders\n")
    assert 'MODEL = "ada/reminders"\n' in card
    assert "to        ada/reminders, private" in out
    assert f"sent      {hub.endpoint}/ada/reminders" in out


def test_no_path_of_this_machine_goes(run, hub, luthier, base, tmp_path):
    assert str(base) in (run / "model" / "adapter_config.json").read_text()
    assert luthier("push", run, "--to", "ada/reminders")[0] == 0
    files = hub.repositories["ada/reminders"]["files"]
    for name, content in files.items():
        if name.endswith((".json", ".md", ".jinja")):
            assert str(base.parent).encode() not in content, name
            assert str(tmp_path).encode() not in content, name
    config = json.loads(files["adapter_config.json"])
    assert config["base_model_name_or_path"] == "tiny-llama"
    assert config["r"] == 4


def test_a_dry_run_shows_every_file_and_the_card_and_sends_nothing(run, hub, luthier):
    code, out, _ = luthier("push", run, "--to", "ada/reminders", "--dry-run")
    assert code == 0
    for name in SENT:
        assert f"  {name}\n" in out
    assert "not uploaded: optimizer.pt (a pickle, which can run code" in out
    assert "not uploaded: notes.txt (not a model file)" in out
    assert "## How to use it" in out
    assert out.endswith("nothing was sent (--dry-run)\n")
    assert [one for one in hub.asked if one[0] != "GET"] == []


def test_a_merged_model_goes(run, hub, luthier):
    code, _, err = luthier("push", run, "--to", "ada/merged", "--merged")
    assert code == 2 and "there is no merged model yet" in err and f"luthier merge {run}" in err
    assert luthier("merge", run)[0] == 0
    assert luthier("push", run, "--to", "ada/merged", "--merged", "--public")[0] == 0
    found = hub.repositories["ada/merged"]
    assert found["private"] is False
    assert {"model.safetensors", "config.json", "generation_config.json"} <= set(found["files"])
    assert "adapter_config.json" not in found["files"]
    card = found["files"]["README.md"].decode()
    assert "library_name: transformers" in card and 'MODEL = "ada/merged"' in card


def test_licences_and_languages_are_those_that_are_typed(run, hub, luthier):
    words = ("--license", "apache-2.0", "--data-license", "cc-by-4.0", "--language", "en,de")
    assert luthier("push", run, "--to", "ada/reminders", *words)[0] == 0
    card = hub.repositories["ada/reminders"]["files"]["README.md"].decode()
    assert "| none.jsonl | cc-by-4.0 |" in card
    assert "- en\n- de\n" in card


def test_without_a_login_nothing_is_sent(run, hub, luthier, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    code, _, err = luthier("push", run, "--to", "ada/reminders")
    assert code == 2 and "You are not logged in to the hub" in err and "hf auth login" in err
    monkeypatch.setenv("HF_TOKEN", "hf_" + "b" * 34)
    code, _, err = luthier("push", run, "--to", "ada/reminders")
    assert code == 2 and "You are not logged in to the hub" in err
    assert [one for one in hub.asked if one[0] != "GET"] == []


def test_offline_nothing_is_sent(run, hub, luthier, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, _, err = luthier("push", run, "--to", "ada/reminders")
    assert code == 2 and "HF_HUB_OFFLINE is set" in err


def test_a_card_that_the_hub_refuses_is_told_in_its_words(run, hub, luthier):
    code, _, err = luthier("push", run, "--to", "ada/reminders", "--license", "mine")
    assert code == 2 and "license mine is not allowed" in err
    assert hub.repositories == {}


def test_a_repository_with_files_is_not_overwritten(run, hub, luthier):
    hub.add("ada/reminders", files=[".gitattributes", "model.safetensors"])
    code, _, err = luthier("push", run, "--to", "ada/reminders")
    assert code == 2 and "holds 1 files already (model.safetensors, ...)" in err
    assert luthier("push", run, "--to", "ada/reminders", "--overwrite")[0] == 0


def test_a_public_repository_is_not_taken_for_a_private_one(run, hub, luthier):
    hub.add("ada/reminders", private=False)
    code, _, err = luthier("push", run, "--to", "ada/reminders")
    assert code == 2 and "exists and is public" in err
    assert luthier("push", run, "--to", "ada/reminders", "--public")[0] == 0


def test_a_key_in_a_file_is_not_sent(run, hub, luthier):
    chat = read(run / "model" / "chat.json")
    chat["variables"] = {"token": TOKEN}
    (run / "model" / "chat.json").write_text(json.dumps(chat))
    code, _, err = luthier("push", run, "--to", "ada/reminders")
    assert code == 2 and "what looks like an access key" in err


def test_weights_that_are_pickles_are_not_sent(run, hub, luthier):
    weights = run / "model" / "adapter_model.safetensors"
    weights.rename(run / "model" / "adapter_model.bin")
    code, _, err = luthier("push", run, "--to", "ada/reminders", "--dry-run")
    assert code == 2 and "only pickles (adapter_model.bin" in err


@pytest.mark.parametrize(
    "words, said",
    [
        (["{run}"], "name a repository: --to USER/NAME"),
        (["{run}", "--to", "reminders"], "--to reminders: name a repository"),
        (["--to", "ada/reminders"], "name one run"),
        (["./nowhere", "--to", "ada/x"], "there is no such folder"),
        (["{run}", "--to", "ada/x", "--puplic"], "Did you mean --public?"),
    ],
    ids=["no repository", "a name without its owner", "no run", "a folder that is not there",
         "a flag"],
)  # fmt: skip
def test_a_mistake(words, said, run, luthier):
    code, _, err = luthier("push", *(word.format(run=run) for word in words))
    assert code == 2 and said in err


def test_a_template_that_is_missing_is_said(run, hub, luthier):
    """A chat run whose template is gone can no longer be served as it was trained."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["trainer"]["method"] = "dpo"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for name in ("chat.json", "chat_template.jinja"):
        (run / "model" / name).unlink()
    tokens = read(run / "model" / "tokenizer_config.json")
    tokens.pop("chat_template", None)
    (run / "model" / "tokenizer_config.json").write_text(json.dumps(tokens))
    record = read(run / "run.json") | {"chat": None}
    (run / "run.json").write_text(json.dumps(record))
    code, _, err = luthier("push", run, "--to", "ada/reminders", "--dry-run")
    assert code == 2 and "there is no chat template" in err


@pytest.mark.train
def test_the_command_itself_pushes_by_its_environment(run, tmp_path):
    server = Hub()
    try:
        environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
        environment |= {
            "HF_ENDPOINT": server.endpoint, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
        }  # fmt: skip
        luthier = "import sys; from luthier.cli.main import main; sys.argv[0] = 'luthier'; main()"
        done = subprocess.run(
            [sys.executable, "-c", luthier, "push", str(run), "--to", "ada/reminders"],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        assert set(server.repositories["ada/reminders"]["files"]) == SENT
    finally:
        server.close()
