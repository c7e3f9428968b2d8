"""What comes after a training with images: every command, held against plain transformers."""

import json
import re

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from helpers.chatml import jsonl
from helpers.vision_runs import HELD_OUT, VisionRuns, image, text, turn
from luthier.export.merge_adapter import QUESTIONS
from luthier.infer import LLM

pytestmark = pytest.mark.train

GROUPS = {
    "adapter": ["lora=default", "lora.r=4", "lora.lora_dropout=0.0", "lora.vision=true"],
    "whole": ["lora=none"],
}
ASKED = [
    [turn("user", image("wide"), text("What is it?"))],
    [turn("user", text("Name a colour."))],
    [turn("user", image("tall"), image("small"), text("Which?"))],
]
NEW_TOKENS = 5


@pytest.fixture(scope="module", params=GROUPS)
def trained(request, tmp_path_factory):
    """A run of LLaVA, whose template writes no BOS token, and what made it."""
    runs = VisionRuns(tmp_path_factory.mktemp(request.param), "llava_clip")
    words = ["trainer.evaluation.samples=2", f"trainer.evaluation.max_new_tokens={NEW_TOKENS}",
             "trainer.evaluation.rows=2", "trainer.evaluation.metrics=[exact_match, token_f1]",
             "trainer.args.save_strategy=steps", "trainer.args.save_steps=1"]  # fmt: skip
    return runs, runs.train("run", *words, *GROUPS[request.param])


def replies(runs, model, rows):
    """What plain transformers writes behind each row, greedily, from the processor's inputs."""
    written = []
    for row in rows:
        inputs = runs.inputs(row, add_generation_prompt=True)
        with torch.no_grad():
            out = model.generate(
                **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0,
                eos_token_id=runs.processor.tokenizer.eos_token_id,
            )  # fmt: skip
        reply = out[0, inputs["input_ids"].shape[1] :]
        written.append(runs.processor.tokenizer.decode(reply, skip_special_tokens=True))
    return written


def check_processor(runs, folder):
    """The processor that `AutoProcessor` reads from a folder is the base's, template and all."""
    loaded, base = AutoProcessor.from_pretrained(folder), runs.processor
    assert type(loaded) is type(base)
    assert loaded.to_dict()["image_processor"] == base.to_dict()["image_processor"]
    assert loaded.chat_template == loaded.tokenizer.chat_template == base.chat_template
    row = [turn("user", {"type": "image", "image": Image.new("RGB", (40, 30))}, text("What?"))]
    settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    made, expected = (each.apply_chat_template(row, **settings) for each in (loaded, base))
    assert made.keys() == expected.keys()
    assert all(made[name].equal(expected[name]) for name in made)


def test_the_run_is_asked_measured_merged_and_pushed(trained, luthier, tmp_path, monkeypatch):
    runs, run = trained
    monkeypatch.chdir(runs.folder)
    for folder in (run / "model", *(run / "checkpoints").glob("checkpoint-*")):
        check_processor(runs, folder)
    words = ["--out", tmp_path / "merged", "--dtype", "float32"]
    is_adapter = (run / "model" / "adapter_config.json").is_file()
    if is_adapter:
        code, out, err = luthier("merge", run, *words)
        assert code == 0, out + err
        # Two of the run's replies, the questions, and one about a picture.
        assert f"checked   {2 + len(QUESTIONS) + 1} prompts" in out
    whole = tmp_path / "merged" if is_adapter else run / "model"
    check_processor(runs, whole)
    expected = replies(runs, runs.model(whole), ASKED)

    cpu = ["model.device=cpu", "model.dtype=float32", f"max_new_tokens={NEW_TOKENS}"]
    rows = jsonl(runs.folder / "asked.jsonl", [{"messages": row} for row in ASKED])
    code, out, err = luthier("generate", run, rows, "-o", tmp_path / "out.jsonl", *cpu)
    assert code == 0, out + err
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["reply"] for line in lines] == expected
    (part, _) = lines[0]["prompt"][0]["content"]
    assert part["image"].keys() == {"sha256", "width", "height", "source"}
    with LLM(str(whole), device="cpu", dtype="float32") as llm:
        assert llm.generate(ASKED, max_new_tokens=NEW_TOKENS) == expected

    code, out, err = luthier("evaluate", run, "--json", "--alone", *cpu[:2])
    assert code == 0, out + err
    numbers, logged = json.loads(out)["sets"][0]["numbers"], runs.results(run)
    assert numbers["loss"]["tuned"]["value"] == pytest.approx(
        logged["eval_loss"]["after"], abs=1e-5
    )
    assert numbers["token_f1"]["tuned"]["value"] == pytest.approx(logged["token_f1"]["after"])
    said = [json.loads(line) for line in (run / "replies.jsonl").read_text().splitlines()]
    asked = [row[:1] for row in HELD_OUT]
    assert [each["after"] for each in said] == replies(runs, runs.model(whole), asked)

    code, out, err = luthier("check", run, "--served")
    assert code == 0, out + err

    code, out, err = luthier("push", run, "--to", "ada/pictures", "--dry-run")
    assert code == 0, err
    assert " processor_config.json\n" in out and '{"type": "image", "path": "picture.jpg"}' in out


def test_the_card_shows_python_that_works(trained, monkeypatch, capsys):
    runs, run = trained
    card = (run / "model" / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.S)[1]
    assert "AutoProcessor.from_pretrained(MODEL)" in code
    Image.open(runs.folder / "wide.png").save(run / "model" / "picture.jpg", quality=95)
    monkeypatch.chdir(run / "model")
    code = re.sub(r'BASE = "[^"]*".*', f'BASE = "{runs.base}"', code)
    exec(compile(code, "card", "exec"), {})
    assert capsys.readouterr().out
    (run / "model" / "picture.jpg").unlink()
