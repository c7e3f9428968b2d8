"""The model card: what it tells, what it keeps to itself, and that its Python runs."""

import os
import re
import subprocess
import sys

import pytest
import torch
import yaml

from helpers.adapter_models import NF4
from helpers.chatml import CHATML
from helpers.export_runs import make_base, make_run, read
from luthier.config.schema import DatasetConfig
from luthier.export import model_facts
from luthier.export.card import card_metadata, write_model_card
from luthier.export.model_facts import BaseModelFacts, DataFacts, ModelFacts, data_of
from luthier.export.usage_snippets import python_snippet
from luthier.export.write_card import write_card
from luthier.model.artifact import find_artifact


@pytest.fixture(scope="module")
def run(tmp_path_factory, base):
    """A run of a tiny model, with its card."""
    folder = make_run(tmp_path_factory.mktemp("runs") / "default", base)
    assert write_card(folder) is None
    return folder


def make_facts(**changes):
    known = {"title": "mine", "kind": "adapter", "base": BaseModelFacts("org/base", "org/base")}
    return ModelFacts(**known | {"method": "sft"} | changes)


def head_of(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_a_run_leaves_card_notes_and_plot(run):
    names = {path.name for path in (run / "model").iterdir()}
    assert {"README.md", "EXPORT.md", "card.json", "loss.png"} <= names


def test_a_card_tells_what_was_done(run):
    text = (run / "model" / "README.md").read_text()
    for part in (
        "An adapter for tiny-llama, trained with luthier (sft, LoRA of rank 4) from the recipe "
        "`tiny`.",
        "| exact_match | 0.0% | 87.5% |",
        "![The loss over the steps](loss.png)",
        "| none.jsonl | not stated |",
        "40 rows, 900 tokens, of which 450 trained.",
        "| `lora.lora_alpha` | 8 |",
        "Training took 75 s on A CPU.",
        "luthier 0.1.0",
    ):
        assert part in text


def test_a_model_that_trained_whole_is_told_as_one(tmp_path, base):
    run = make_run(tmp_path / "default", base, lora={})
    assert write_card(run) is None
    text = (run / "model" / "README.md").read_text()
    assert "A fine-tuned tiny-llama, trained with luthier (sft, all weights)" in text
    assert head_of(text)["library_name"] == "transformers"
    assert "peft" not in python_of(text)
    assert 'AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto"' in python_of(text)


EXAMPLES = {
    "a held-out prompt": (
        "Lunch at noon: who pays?",
        True,
        '"content": "Lunch at noon: who pays?"',
    ),
    "quotes": ('Say "no"', True, '"content": "Say \\"no\\"'),
    "not wanted": ("Lunch at noon.", False, '"content": "Your question."'),
    "a path": ("Read /home/me/notes.txt", True, '"content": "Your question."'),
    "a secret": ("Use hf_" + "q" * 34, True, '"content": "Your question."'),
    "none": ("", True, '"content": "Your question."'),
}


@pytest.mark.parametrize("prompt, is_shown, line", EXAMPLES.values(), ids=EXAMPLES)
def test_the_python_asks_a_held_out_prompt(prompt, is_shown, line):
    from luthier.export.model_facts import find_example

    facts = make_facts(prompt=find_example({"example": prompt}) if is_shown else None)
    assert line in python_snippet(facts, [2], has_template=True)


@pytest.mark.parametrize(
    "told, lines",
    [
        (
            make_facts(quantization={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
            [
                "packing = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4')",
                '    BASE, dtype="auto", device_map="auto", quantization_config=packing',
            ],
        ),
        (
            make_facts(base=BaseModelFacts("x", package="llm_x", file="x.gguf")),
            [
                'gguf = importlib.util.find_spec("llm_x").submodule_search_locations[0]',
                '    gguf, gguf_file="x.gguf",',
                "base.save_pretrained(BASE)",
            ],
        ),
        (
            make_facts(base=BaseModelFacts("org/base", "org/base", "v2"), rows=300),
            ['    BASE, dtype="auto", device_map="auto", revision="v2"',
             "base.resize_token_embeddings(300)"],
        ),
        (
            make_facts(loader="my.py:load", rows=300),
            ["# load is the function that it was trained with (my.py:load).",
             "base = load(BASE)", "base.resize_token_embeddings(300)",
             "model = PeftModel.from_pretrained(base, MODEL)"],
        ),
        (
            make_facts(task="SEQ_CLS", method="classify"),
            ['labels = json.loads((Path(MODEL) / "labels.json").read_text())',
             "print(model.config.id2label[logits.argmax().item()])"],
        ),
        (
            make_facts(system="Be brief.", variables={"enable_thinking": False}),
            ['    {"role": "system", "content": "Be brief."},',
             "    messages, add_generation_prompt=True, return_dict=True, return_tensors=\"pt\", "
             "enable_thinking=False"],
        ),
        (
            make_facts(kind="model", task="SEQ_2_SEQ_LM"),
            [
                "model = AutoModelForSeq2SeqLM.from_pretrained("
                'MODEL, dtype="auto", device_map="auto")'
            ],
        ),
    ],
    ids=["4 bits", "a GGUF file of a package", "a revision and new tokens", "a function",
         "a classifier",
         "a system prompt and a variable", "an encoder-decoder"],
)  # fmt: skip
def test_the_python_for(told, lines):
    import ast

    code = python_snippet(told, [2], True)
    ast.parse(code)
    for line in lines:
        assert line in code.splitlines()


def test_the_notes_have_template_stop_tokens_and_commands(run):
    notes = (run / "model" / "EXPORT.md").read_text()
    for part in (
        "- `<|im_end|>`, id 2\n",
        f"~~~jinja\n{CHATML}\n~~~",
        "vllm serve path/to/tiny-llama --enable-lora --max-lora-rank 8 \\\n"
        "        --lora-modules tiny=.",
        """--override-generation-config '{"eos_token_id": [2]}'""",
        "text-generation-launcher --model-id merged",
        'FROM ./merged\nTEMPLATE """{{ range .Messages }}',
        'PARAMETER stop "<|im_end|>"',
    ):
        assert part in notes
    assert "Merge it first" not in notes


def test_the_notes_say_why_an_adapter_must_be_merged_first(tmp_path, base):
    lora = {"r": 4, "use_dora": True, "trainable_token_indices": [5]}
    run = make_run(tmp_path / "default", base, lora=lora, quantization=NF4)
    assert write_card(run) is None
    notes = (run / "model" / "EXPORT.md").read_text()
    assert (
        "a merge for the logits that it was trained to: it is a DoRA; it holds whole layers or "
        "rows of the embeddings; it was trained on quantized weights, which servers do not have."
    ) in notes


def test_no_path_of_this_machine_is_in_card_notes_or_facts(run, base, tmp_path_factory):
    for name in ("README.md", "EXPORT.md", "card.json"):
        text = (run / "model" / name).read_text()
        for path in (base.parent, run.parent, tmp_path_factory.getbasetemp(), "/tmp"):
            assert str(path) not in text


def test_the_head_is_read_by_the_hubs_own_library(run):
    from huggingface_hub import ModelCard

    read_back = ModelCard.load(run / "model" / "README.md")
    assert read_back.data.to_dict()["library_name"] == "peft"
    assert read_back.data.pipeline_tag == "text-generation"
    found = {one.metric_type: one.metric_value for one in read_back.data.eval_results}
    assert found == {"loss": 0.25, "exact_match": 0.875}


@pytest.mark.parametrize(
    "told, head",
    [
        (
            make_facts(adapter={"peft_type": "LORA"}),
            {"library_name": "peft", "base_model": "org/base", "base_model_relation": "adapter"},
        ),
        (
            make_facts(kind="model"),
            {"library_name": "transformers", "base_model_relation": "finetune"},
        ),
        (
            make_facts(kind="model", method=None, packed={"bits": 4, "method": "bitsandbytes"}),
            {"base_model_relation": "quantized", "tags": ["luthier", "4-bit", "bitsandbytes"]},
        ),
        (
            make_facts(task="SEQ_CLS", method="classify"),
            {"pipeline_tag": "text-classification", "tags": ["luthier", "classify"]},
        ),
        (
            make_facts(data=[DataFacts("org/rows", True), DataFacts("own.jsonl")], licence="mit"),
            {"datasets": ["org/rows"], "license": "mit"},
        ),
        (make_facts(language=["en", "de"]), {"language": ["en", "de"]}),
    ],
    ids=[
        "an adapter", "a fine-tuned model", "a base that was quantized", "a classifier",
        "hub data and a licence", "languages",
    ],
)  # fmt: skip
def test_the_head_for(told, head):
    found = card_metadata(told)
    assert {name: found[name] for name in head} == head


def test_what_is_not_known_is_not_in_the_head():
    found = card_metadata(make_facts(base=BaseModelFacts("tiny")))
    assert not {"license", "datasets", "base_model", "base_model_relation"} & set(found)
    assert head_of(write_model_card(make_facts(base=BaseModelFacts("tiny")), [2], True)) == found


def test_licences_of_data_are_those_of_the_config():
    dataset = DatasetConfig.model_validate(
        {"sources": {"a": {"path": "/data/a.jsonl"}, "b": {"path": "b.csv"}}}
    )
    found = data_of(dataset, {"a": "cc-by-4.0"})
    assert found == [DataFacts("a: a.jsonl", licence="cc-by-4.0"), DataFacts("b: b.csv")]


def test_a_hub_dataset_is_named_with_its_part():
    dataset = DatasetConfig(path="org/rows", name="all", split="train_sft")
    assert data_of(dataset, {}) == [DataFacts("org/rows", True, "all, train_sft")]


def test_a_licence_in_the_card_of_a_cached_dataset_is_taken(tmp_path, monkeypatch):
    import huggingface_hub

    from luthier.export import model_facts

    file = tmp_path / "README.md"
    file.write_text("---\nlicense: odc-by\n---\n# Rows\n")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: str(file))
    assert model_facts.stated_licence("org/rows", "dataset") == "odc-by"


def test_a_card_that_cannot_be_written_is_said_and_fails_nothing(tmp_path, base):
    run = make_run(tmp_path / "default", base)
    (run / "model" / "README.md").mkdir()
    assert "README.md" in write_card(run)


def test_the_facts_beside_the_weights_make_the_same_card(run):
    found = find_artifact(str(run))
    assert model_facts.read_facts(run / "model") == model_facts.collect_facts(found)


def python_of(text):
    return re.search(r"```python\n(.*?)```", text, re.S).group(1)


RUN = """
import sys
from huggingface_hub import constants
{code}
import json
ids = inputs["input_ids"][0].tolist()
print("RESULT" + json.dumps({{"ids": ids, "reply": reply.tolist()}}))
"""


@pytest.mark.train
def test_the_python_of_a_card_gives_the_adapters_reply_in_a_fresh_process(tmp_path):
    """The base lies in the hub's cache under its name; nothing of the snippet is changed."""
    import json

    from peft import PeftModel

    from helpers.adapter_models import load

    cache = tmp_path / "hub"
    snapshot = cache / "models--org--tiny" / "snapshots" / ("a" * 40)
    make_base(snapshot)
    (cache / "models--org--tiny" / "refs").mkdir()
    (cache / "models--org--tiny" / "refs" / "main").write_text("a" * 40)
    run = make_run(tmp_path / "run", snapshot)
    assert write_card(run) is None
    text = (run / "model" / "README.md").read_text()
    assert head_of(text)["base_model"] == "org/tiny"
    done = subprocess.run(
        [sys.executable, "-c", RUN.format(code=python_of(text))],
        cwd=run / "model", env=os.environ | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    got = json.loads(done.stdout.split("RESULT")[1])
    model = PeftModel.from_pretrained(load(snapshot), run / "model").eval()
    ids = torch.tensor([got["ids"]])
    wanted = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=256, do_sample=False,
        eos_token_id=[2],
    )[0, ids.shape[1] :]  # fmt: skip
    assert got["reply"] == wanted.tolist()
    # The prompt is the one that luthier's own encoder starts a reply from.
    from luthier.model.artifact import build_chat_encoder
    from luthier.model.tokenizer import load_tokenizer

    found = find_artifact(str(run))
    encoder = build_chat_encoder(found, load_tokenizer(found.base))
    assert got["ids"] == encoder.prompt([{"role": "user", "content": "Your question."}])
    assert read(run / "model" / "card.json")["base"]["hub"] == "org/tiny"
