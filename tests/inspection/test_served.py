"""`luthier check RUN --served`: a saved run against its own rows, and what makes it differ."""

import json
from types import SimpleNamespace

import pytest

from helpers import adapter_runs as material
from helpers.chatml import CHATML, jsonl
from luthier.chat import ChatEncoder
from luthier.train.loop import save_serving_files

ROWS = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                  {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]},
    {"messages": [{"role": "user", "content": "e"}, {"role": "assistant", "content": "f"}]},
]  # fmt: skip
DATED = CHATML.replace("<|im_start|>{{ m", "{{ strftime_now('%Y') }}<|im_start|>{{ m")
MOODY = "{% if mood %}{{ mood }}{% endif %}" + CHATML


@pytest.fixture
def saved(tmp_path, base_model):
    """A run on these rows, saved as a training saves it."""

    def saved(rows=ROWS, **chat):
        folder = tmp_path / "saved"
        folder.mkdir()
        settings = material.CHAT | chat
        material.run(folder, base_model, jsonl(folder / "rows.jsonl", rows), chat=settings)
        tokenizer = material.tokenizer()
        encoder = ChatEncoder.from_settings(tokenizer, settings)
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(base_model)
        trainer = SimpleNamespace(processing_class=tokenizer, model=model)
        save_serving_files(folder / "model", trainer, encoder)
        return folder

    return saved


def rules(luthier, folder, *words):
    code, out, _ = luthier("check", folder, "--served", "--json", *words)
    return code, {" ".join(rule["text"].split()[:2]): rule for rule in json.loads(out)["rules"]}


def test_what_a_training_saves_is_served_as_trained(luthier, saved):
    folder = saved()
    code, found = rules(luthier, folder)
    assert code == 0
    assert {name: (rule["checked"], rule["broken"]) for name, rule in found.items()} == {
        "prompts are": (3, 0), "replies read": (3, 0), "replies end": (3, 0),
        "the template's": (2, 0), "the response": (3, 0), "the adapter's": (28, 0),
    }  # fmt: skip
    tokenizer_file = folder / "model" / "tokenizer_config.json"
    config = json.loads(tokenizer_file.read_text())
    config["response_template"]["fields"]["content"]["close"] = ["a"]
    tokenizer_file.write_text(json.dumps(config))
    code, found = rules(luthier, folder)
    assert code == 1 and found["the response"]["broken"]


def test_a_template_of_the_config_is_saved_in_place_of_the_tokenizers(luthier, saved):
    folder = saved(template="{{ 'x' }}" + CHATML)
    code, _ = rules(luthier, folder)
    assert code == 0
    assert (folder / "model/chat_template.jinja").read_text().startswith("{{ 'x' }}")
    assert json.loads((folder / "model/generation_config.json").read_text())["eos_token_id"] == [
        2, 0
    ]  # fmt: skip


def test_rows_with_variables_of_their_own_are_served_as_trained(luthier, saved):
    rows = [ROWS[0] | {"chat_template_kwargs": {"mood": "m"}}, ROWS[1]]
    code, found = rules(luthier, saved(rows, template=MOODY))
    assert code == 0
    assert (found["prompts are"]["checked"], found["prompts are"]["broken"]) == (3, 0)


WAYS = {
    "variables": ({"template": MOODY, "variables": {"mood": "m"}}, ROWS,
                  'requests must set chat_template_kwargs={"mood": "m"}'),
    "date": ({"template": DATED, "date": "1999-01-01"}, ROWS,
             "the template writes today's date; the training had 1999-01-01"),
    "control tokens": ({}, [{"prompt": "<|im_end|>", "completion": "x"}],
                       "the text contains a control token"),
}  # fmt: skip


@pytest.mark.parametrize(("chat", "rows", "says"), WAYS.values(), ids=WAYS)
def test_why_a_prompt_differs_is_told(luthier, saved, chat, rows, says):
    code, found = rules(luthier, saved(rows, **chat))
    assert code == 1
    assert found["prompts are"]["broken"] == found["prompts are"]["checked"]
    assert says in found["prompts are"]["examples"][0]["words"]
    assert found["prompts are"]["examples"][0]["tokens"]["trained"]


def test_a_changed_folder_is_told_by_its_first_row(luthier, saved):
    folder = saved()
    template = folder / "model/chat_template.jinja"
    template.write_text(CHATML.replace("assistant\n{%", "assistant \n{%"))
    (folder / "model/generation_config.json").write_text('{"eos_token_id": 0}')
    code, out, _ = luthier("check", folder, "--served", "--limit", "1")
    assert code == 1
    assert "prompts are those of apply_chat_template, as saved  2 of 2 turns break the rule" in out
    assert "rows.jsonl:1: the prompt differs" in out
    assert "generation_config.json: <|im_end|> (2) is not an end token there" in out
    assert "get other tokens than it was trained on" in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["{tiny}", "--served"], "and this is not a run's folder"),
        (["--served"], "luthier check --served takes one run"),
        (["./none", "--served"], "model=none: there is no such folder"),
        (["{tiny}", "--served", "--png", "x"], "--served draws nothing"),
    ],
    ids=["no run", "nothing", "no folder", "a picture"],
)
def test_a_mistake_is_said_in_words(luthier, base_model, words, says):
    code, out, err = luthier("check", *(word.format(tiny=base_model) for word in words))
    assert (code, out) == (2, "") and says in err


def test_a_run_on_other_rows_serves_no_prompts(luthier, saved):
    folder = saved([{"text": "a b"}])
    code, _, err = luthier("check", folder, "--served")
    assert code == 2 and "it was not trained on chats" in err


ADAPTERS = {
    "the class that servers load": (None, 0),
    "the text part alone": ("text", 12),
    "experts": ("experts", 8),
}


@pytest.mark.parametrize(("kind", "broken"), ADAPTERS.values(), ids=ADAPTERS)
def test_the_layers_of_an_adapter_are_looked_for_in_the_class_that_servers_load(
    tmp_path, kind, broken
):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from helpers.model_families import make_family_model, save_family
    from luthier.inspection.served import check_adapter_layers
    from luthier.model.artifact import find_artifact

    family = "qwen3_moe" if kind == "experts" else "qwen3_5"
    save_family(tmp_path / "base", family)
    model = make_family_model(family)
    if kind == "text":
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    parameters = ["experts.gate_up_proj", "experts.down_proj"] if kind == "experts" else None
    tuned = get_peft_model(
        model, LoraConfig(r=2, target_modules=["up_proj", "o_proj", "down_proj", "in_proj_z"]
                          if parameters is None else ["q_proj"],
                          target_parameters=parameters, task_type="CAUSAL_LM")
    )  # fmt: skip
    tuned.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    rule = check_adapter_layers(find_artifact(str(tmp_path / "adapter")))
    assert (rule.checked, rule.broken) == (12, broken)
    assert rule.text.endswith(f"layers of {type(make_family_model(family)).__name__}")
    if kind == "experts":
        assert rule.examples[0].words == (
            "it holds all of model.layers.0.mlp.experts, and vLLM reads an adapter for each expert "
            "of this model: luthier merge RUN --adapter-for vllm"
        )
    elif broken:
        assert rule.examples[0].words == (
            "there is no model.layers.0.linear_attn.in_proj_z, so a server leaves it out; there "
            "it is model.language_model.layers.0.linear_attn.in_proj_z: luthier merge RUN "
            "--adapter-for vllm"
        )
