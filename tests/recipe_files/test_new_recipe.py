"""Which model, length, batch and share of held-out rows a new recipe begins with."""

import json

import pytest

from helpers import format_rows
from luthier.config.schema import SourceConfig
from luthier.errors import UserError
from luthier.recipe_files import model_choice
from luthier.recipe_files.model_choice import choose_model
from luthier.recipe_files.new_recipe import RecipeInputs, draft_recipe
from luthier.recipe_files.row_survey import TokenLengths, measure_tokens, survey_rows


def inputs(workplace, rows, memory=0, lengths=None, **source):
    """What a recipe of these rows is made of, with a model that is not here."""
    workplace("rows.jsonl", "\n".join(map(json.dumps, rows)))
    config = SourceConfig(path="rows.jsonl", **source)
    choice = choose_model("sft", False, memory, "owner/name")
    return RecipeInputs(survey_rows(config), config, choice, lengths, memory)


def rows(count, format_name="messages"):
    return [format_rows.ROWS[format_name](number) for number in range(count)]


HELD_OUT = {
    10: {"dataset.eval.share": None, "trainer.args.eval_strategy": None},
    60: {"dataset.eval.count": 6, "trainer.args.eval_strategy": "epoch"},
    400: {"dataset.eval.share": 0.05, "trainer.args.num_train_epochs": 3},
    3000: {"dataset.eval.share": 0.05, "trainer.args.num_train_epochs": 2},
}


@pytest.mark.parametrize("count", HELD_OUT)
def test_what_follows_from_the_number_of_rows(count, workplace):
    draft = draft_recipe(inputs(workplace, rows(count)), "luthier train recipe=rows")
    assert {key: draft.value(key) for key in HELD_OUT[count]} == HELD_OUT[count]


LENGTHS = {
    "short": (TokenLengths(20, 90, 0.2), 24, 192),
    "long": (TokenLengths(900, 30_000, 0.2), 24, 4096),
    "not counted": (None, 24, 4096),
    "on a CPU": (TokenLengths(900, 3000, 0.2), 0, 1024),
}


@pytest.mark.parametrize(("lengths", "memory", "expected"), LENGTHS.values(), ids=LENGTHS)
def test_the_longest_sequence_fits_the_rows(lengths, memory, expected, workplace):
    draft = draft_recipe(inputs(workplace, rows(30), memory, lengths), "luthier train recipe=rows")
    assert draft.value("chat.max_length") == expected


def test_many_short_rows_are_packed(workplace):
    lengths = TokenLengths(30, 300, 0.2)
    draft = draft_recipe(inputs(workplace, rows(2500), 24, lengths), "luthier train recipe=rows")
    assert draft.value("trainer.args.packing") is True
    draft = draft_recipe(inputs(workplace, rows(100), 24, lengths), "luthier train recipe=rows")
    assert draft.value("trainer.args.packing") is False


MODELS = {
    "chats, 80 GB": ("sft", False, 80, "Qwen/Qwen3-8B", None),
    "chats, 24 GB": ("sft", False, 24, "Qwen/Qwen3-8B", "nf4"),
    "chats, 12 GB": ("sft", False, 12, "Qwen/Qwen3-1.7B", None),
    "texts, 24 GB": ("pretrain", False, 24, "Qwen/Qwen3-8B-Base", "nf4"),
    "images, 12 GB": ("sft", True, 12, "Qwen/Qwen2.5-VL-3B-Instruct", None),
    "images, no GPU": ("sft", True, 0, "HuggingFaceTB/SmolVLM-256M-Instruct", None),
    "classes, 12 GB": ("classify", False, 12, "answerdotai/ModernBERT-base", None),
    "another text, no GPU": ("seq2seq", False, 0, "google/flan-t5-small", None),
    "chats, no GPU": ("sft", False, 0, "HuggingFaceTB/SmolLM2-135M-Instruct", None),
}


@pytest.mark.parametrize(
    ("method", "images", "memory", "path", "bits"), MODELS.values(), ids=MODELS
)
def test_the_model_fits_the_machine(method, images, memory, path, bits, monkeypatch):
    monkeypatch.setattr(model_choice, "_has_package", lambda: False)
    choice = choose_model(method, images, memory, None)
    assert (choice.path, choice.quantization) == (path, bits)
    assert f"hf download {path}" in choice.note, "the hub is not asked in tests"
    assert choice.lora == (method not in ("classify", "seq2seq"))


def test_the_model_of_pypi_comes_first_without_a_gpu(monkeypatch):
    monkeypatch.setattr(model_choice, "_has_package", lambda: True)
    choice = choose_model("sft", False, 0, None)
    assert choice.option == "smollm2_135m" and choice.path is None and choice.is_here
    choice = choose_model("classify", False, 0, None)
    assert choice.option == "smollm2_135m" and choice.lora


def test_a_folder_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="no such folder"):
        choose_model("sft", False, 0, "./none")


def test_the_survey_counts_what_rows_have(workplace):
    made = rows(5)
    made[0]["messages"].insert(0, {"role": "system", "content": "Be brief."})
    made[1]["tools"] = [{"name": "f", "description": "d", "parameters": {}}]
    made[2]["messages"] += format_rows.turns(9)
    made[3]["messages"][0]["content"] = "<image> what?"
    survey = inputs(workplace, made).survey
    assert (survey.rows, survey.systems, survey.tools, survey.placeholders) == (5, 1, 1, 1)
    assert (max(survey.turns), survey.median(survey.turns)) == (2, 1)
    assert survey.is_all and not survey.empty and not survey.repeated


def test_a_call_is_no_empty_reply(workplace):
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": {}}}
    made = [{"messages": [{"role": "user", "content": "x"},
                          {"role": "assistant", "content": "", "tool_calls": [call]}]}]  # fmt: skip
    assert inputs(workplace, made).survey.empty == []


@pytest.mark.parametrize("format_name", ["preference", "seq2seq", "text"])
def test_empty_replies_of_other_rows_are_counted(format_name, workplace):
    made = rows(3, format_name)
    made[1][{"preference": "chosen", "seq2seq": "target", "text": "text"}[format_name]] = " "
    assert inputs(workplace, made).survey.empty == ["rows.jsonl:2"]


def test_tokens_are_counted_of_the_longest_rows(workplace):
    made = rows(20)
    made[7]["messages"][0]["content"] = "word " * 300

    def tokenizer(text, add_special_tokens):
        return {"input_ids": text.split()}

    lengths = measure_tokens(inputs(workplace, made).survey, tokenizer)
    assert 300 < lengths.longest < 360 and lengths.median < 60
