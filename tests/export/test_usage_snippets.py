"""The Python of a card runs as it stands there, and says what luthier says."""

import json
import re

import pytest
import torch

from helpers.export_runs import make_run
from helpers.head_runs import CASES, finish
from helpers.model_families import save_family
from luthier.export.write_card import write_card
from luthier.infer import LLM

WITH_HEADS = {name: case for name, case in CASES.items() if case[0] != "seq2seq"}


@pytest.mark.parametrize(("method", "rows", "also"), WITH_HEADS.values(), ids=WITH_HEADS)
def test_it_says_a_label_or_a_number(tmp_path, monkeypatch, capsys, method, rows, also):
    run, _ = finish(tmp_path / "tiny", method, rows, also)
    assert write_card(run) is None
    text = (run / "model" / "README.md").read_text()
    (code,) = re.findall(r"(?:```|~~~)python\n(.*?)\n(?:```|~~~)", text, re.DOTALL)
    # A card does not show where the base is on this machine.
    source = code.replace("path/to/base", f"{tmp_path}/tiny/base")
    monkeypatch.chdir(run / "model")
    capsys.readouterr()
    known = {}
    exec(compile(source, "card", "exec"), known)
    said = capsys.readouterr().out.strip()
    config = known["model"].config
    labels = set(config.id2label.values())
    if method == "reward" or config.problem_type == "regression":
        assert float(said) == known["logits"].item()
    elif config.problem_type == "multi_label_classification" or method == "tag":
        assert set(json.loads(said.replace("'", '"'))) <= labels
    else:
        assert said in labels
    assert isinstance(known["logits"], torch.Tensor)


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
FAMILIES = {
    "an adapter of an image-text model": (
        "qwen3_5", {"lora": {"r": 4, "target_modules": ["o_proj"]}}, "AutoModelForImageTextToText",
    ),
    "an image-text model": ("gemma3", {"lora": {}}, "AutoModelForCausalLM"),
    "a whole image-text model that no other class loads": (
        "qwen3_vl", {"lora": {}}, "AutoModelForImageTextToText",
    ),
    "an adapter of experts": (
        "qwen3_moe",
        {"lora": {"r": 4, "target_modules": ["q_proj"], "target_parameters": EXPERTS}},
        "AutoModelForCausalLM",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("family", "groups", "loader"), FAMILIES.values(), ids=FAMILIES)
def test_it_loads_the_class_of_the_checkpoint_and_answers_text(
    tmp_path, monkeypatch, capsys, family, groups, loader
):
    save_family(tmp_path / "base", family)
    run = make_run(tmp_path / "run", tmp_path / "base", **groups)
    assert write_card(run) is None
    text = (run / "model" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)
    assert f"{loader}.from_pretrained(" in code
    monkeypatch.chdir(run / "model")
    capsys.readouterr()
    variables = {}
    source = code.replace("path/to/base", str(tmp_path / "base")).replace("256", "8")
    exec(compile(source, "card", "exec"), variables)
    with LLM(str(run), device="cpu", dtype="float32") as llm:
        (expected,) = llm.generate(["Your question."], max_new_tokens=8)
    assert capsys.readouterr().out.strip() == expected.strip()
    model = variables["model"]
    model = model.get_base_model() if hasattr(model, "peft_config") else model
    assert type(model).__name__ == json.loads((tmp_path / "base/config.json").read_text())[
        "architectures"
    ][0]  # fmt: skip
    notes = (run / "model" / "EXPORT.md").read_text()
    assert ("--adapter-for vllm" in notes) == ("target_parameters" in groups["lora"])
