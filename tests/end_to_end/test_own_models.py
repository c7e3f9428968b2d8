"""Runs of a model class that no Auto class knows, loaded by a function beside the recipe."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from helpers import train_command
from helpers.train_command import LORA, PACKED, ROOT, metrics, record, said, weights
from luthier.python_code import load_python_object
from luthier.record import checkpoints

pytestmark = pytest.mark.train

CODE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel


class GatedConfig(LlamaConfig):
    model_type = "gated"


class GatedModel(LlamaModel):
    config_class = GatedConfig

    def __init__(self, config):
        super().__init__(config)
        self.gate = torch.nn.Parameter(torch.linspace(0.5, 2.0, config.hidden_size))

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.last_hidden_state = outputs.last_hidden_state * self.gate
        return outputs


class GatedForCausalLM(LlamaForCausalLM):
    config_class = GatedConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = GatedModel(config)
        self.post_init()


def load(path, dtype, attn_implementation=None, **settings):
    return GatedForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation=attn_implementation, **settings
    )
"""
LOADER = "model.loader=python:own_model.py:load"


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder with the class, a model of it that no Auto class loads, and rows."""
    folder = tmp_path_factory.mktemp("own")
    train_command.make(folder)
    (folder / "own_model.py").write_text(CODE)
    path = f"python:{folder / 'own_model.py'}:"
    config = load_python_object(f"{path}GatedConfig").from_pretrained(folder / "model")
    torch.manual_seed(0)
    load_python_object(f"{path}GatedForCausalLM")(config).save_pretrained(folder / "model")
    assert json.loads((folder / "model" / "config.json").read_text())["model_type"] == "gated"
    return folder


def command(folder, name, *more, **args):
    return [*train_command.words(folder, max_steps=6, **args), LOADER, f"output_dir={name}", *more]


def luthier(folder, *words):
    return subprocess.run(
        [sys.executable, "-m", "luthier", *words], cwd=folder, text=True, capture_output=True,
        env=train_command.environment(PYTHONPATH=str(ROOT / "src")), check=False,
    )  # fmt: skip


def test_a_model_that_a_function_loads_trains_goes_on_merges_and_answers(forks, own):
    words = command(own, "lora", *LORA, *PACKED)
    assert forks.run(own, *words) == 0, said(own)
    run = own / "lora"
    code = record(run)["code"]["python:own_model.py:load"]
    assert code["settings"] == ["model.loader"]
    assert code["sha256"]
    saved = {"loader": "python:own_model.py:load"}
    assert json.loads((run / "model" / "loader.json").read_text()) == saved
    losses = [line["loss"] for line in metrics(run) if "loss" in line]
    assert losses[-1] < losses[0]
    # It goes on as if it had not stopped, also from a config of a version with fewer settings.
    before = weights(run)
    for number, path in checkpoints.list_checkpoints(run / "checkpoints"):
        if number > 2:
            shutil.rmtree(path)
    shutil.rmtree(run / "model")
    (run / "run.json").write_text(json.dumps(record(run) | {"status": "running"}))
    config = yaml.safe_load((run / "config.yaml").read_text())
    for setting in ("loss", "optimizer", "tools", "environment", "callbacks"):
        config["trainer"].pop(setting, None)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert forks.run(own, *words) == 0, said(own)
    assert "resuming at step" in said(own)
    assert weights(run) == before
    # Nothing of it runs on the word of a run's folder.
    refused = luthier(own, "merge", "lora")
    assert refused.returncode == 2
    assert "model.loader: python:own_model.py:load" in refused.stderr
    merged = luthier(own, "merge", "lora", "--trust")
    assert merged.returncode == 0, merged.stdout + merged.stderr
    assert "model.loader loads its base" in merged.stdout
    assert json.loads((run / "merged" / "loader.json").read_text()) == saved
    # A folder that has left its run says itself what loads it.
    shutil.copytree(run / "merged", own / "copied")
    (own / "asked.jsonl").write_text('{"prompt": "name a colour 1"}\n')
    answers = []
    for artifact in ("lora", "copied"):
        line = ("generate", artifact, "asked.jsonl", "-o", f"{artifact}.jsonl")
        refused = luthier(own, *line)
        assert refused.returncode == 2
        assert "model.loader: python:own_model.py:load" in refused.stderr
        done = luthier(own, *line, "--trust")
        assert done.returncode == 0, done.stdout + done.stderr
        answers.append(json.loads((own / f"{artifact}.jsonl").read_text().splitlines()[0]))
    assert answers[0] == answers[1]


def test_all_weights_of_such_a_model_train_in_float32_and_are_read_back(forks, own):
    words = command(own, "full", "lora=none", "model.dtype=bfloat16", bf16="true")
    assert forks.run(own, *words) == 0, said(own)
    saved = load_file(own / "full" / "model" / "model.safetensors")
    before = load_file(own / "model" / "model.safetensors")
    assert saved.keys() == before.keys()
    assert saved["model.gate"].dtype == torch.float32
    assert not torch.equal(saved["model.gate"], before["model.gate"])
    load = load_python_object(f"python:{own / 'own_model.py'}:load")
    loaded = load(own / "full" / "model", dtype=torch.float32).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in saved.items())
