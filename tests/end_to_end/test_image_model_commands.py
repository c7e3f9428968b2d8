"""What is done with a trained image-text model on text: every command, by adapter and whole."""

import json

import pytest

from helpers.chatml import jsonl
from helpers.export_runs import make_run
from helpers.model_families import save_family
from luthier.storage.sizes import read_safetensors_header

CPU = ["model.device=cpu", "model.dtype=float32"]
GROUPS = {
    "adapter": {"r": 4, "lora_alpha": 8, "target_modules": ["o_proj", "down_proj"]},
    "whole": {},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Finished runs of Qwen3-VL by their kind."""
    folder = tmp_path_factory.mktemp("images")
    base = save_family(folder / "base", "qwen3_vl")
    rows = [{"prompt": "name a colour", "completion": "green"}] * 2
    file = jsonl(folder / "rows.jsonl", rows)
    dataset = {"dataset": {"path": str(file)}}
    return {
        kind: make_run(folder / kind, base, lora=lora, **dataset) for kind, lora in GROUPS.items()
    }


@pytest.mark.parametrize("kind", GROUPS)
def test_it_is_asked_measured_checked_and_packed(runs, kind, luthier, tmp_path):
    run = runs[kind]
    rows = jsonl(tmp_path / "ask.jsonl", [{"prompt": "name a colour", "completion": "green"}])
    words = [run, rows, "-o", tmp_path / "out.jsonl", "max_new_tokens=4"]
    code, out, err = luthier("generate", *words)
    assert code == 0, out + err
    (reply,) = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    code, out, err = luthier("evaluate", run, f"dataset.path={rows}", "--json", "metrics=[]")
    assert code == 0, out + err
    assert json.loads(out)["sets"][0]["numbers"]["loss"]["tuned"]["value"] > 0
    target = tmp_path / "packed"
    code, out, err = luthier("merge", run, "--quantize", "nf4", "--out", target)
    assert code == 0, out + err
    config = json.loads((target / "config.json").read_text())
    assert config["architectures"] == ["Qwen3VLForConditionalGeneration"]
    assert (target / "preprocessor_config.json").is_file()
    tensors = [read_safetensors_header(file).tensors for file in target.glob("*.safetensors")]
    packed = {name.partition(".weight.absmax")[0] for file in tensors for name in file
              if name.endswith(".absmax")}  # fmt: skip
    assert any(name.endswith("down_proj") for name in packed)
    assert all(name.startswith("model.language_model.layers.") for name in packed)
    assert any(name.startswith("model.visual.") for file in tensors for name in file)
    assert reply["reply"] is not None


@pytest.mark.parametrize("kind", GROUPS)
def test_what_is_pushed_has_the_processor_of_the_base(runs, kind, luthier):
    code, out, err = luthier("push", runs[kind], "--to", "ada/images", "--dry-run")
    assert code == 0, err
    assert " preprocessor_config.json\n" in out
    assert "AutoModelForImageTextToText.from_pretrained(" in out
