"""`luthier explain` and `luthier schema`: keys, groups, options, and names that are no key."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from luthier.cli.explain import explain
from luthier.config.json_schema import USER_NAME, config_schema, walk_keys
from luthier.config.reference import reference_page
from luthier.errors import UserError

Q = "recipe=quickstart"

ANSWERS = {
    "own key": (
        ["chat.max_length"],
        ["chat.max_length: a whole number", "in tokens", "owner    luthier", "default  null"],
    ),
    "value in a recipe": (
        ["chat.max_length", Q],
        ["here     512, set in ", "quickstart.yaml:13", "set by   chat=default"],
    ),
    "typed value": (["lora.r", Q, "lora.r=8"], ["here     8, as typed", "peft.LoraConfig"]),
    "library's key": (
        ["trainer.args.learning_rate"],
        ["a number of at least 0", "trl.SFTConfig", "trainer=sft", "2e-4", "trainer=dpo"],
    ),
    "inherited key": (["trainer.args.weight_decay"], ["transformers.TrainingArguments"]),
    "key of another method": (["trainer.args.beta"], ["trl.DPOConfig", "add trainer=NAME"]),
    "key of a method": (
        ["trainer.args.beta", "trainer=dpo"],
        ["owner    trl.DPOConfig", "default  0.1", "here     0.1, set in ", "dpo.yaml"],
    ),
    "key without its group": (["learning_rate"], ["trainer.args.learning_rate: a number"]),
    "own key, named as a library's": (["seed"], ["seed: a whole number", "owner    luthier"]),
    "key in a source": (["dataset.sources.mine.path"], ["a list of strings", "A file, a glob"]),
    "key that luthier decides": (
        ["trainer.args.max_length"],
        ["trainer.args.max_length is not set here: use chat.max_length."],
    ),
    "group": (["lora"], ["Options: lora=NAME", "  dora ", "lora.r ", "of peft.LoraConfig"]),
    "option": (["lora=dora"], ["dora.yaml)", "use_dora: true  # lengths and directions apart"]),
    "prefix": (["trainer.evaluation"], ["trainer.evaluation.rows ", "100 "]),
    "foreign key": (
        ["micro_batch_size"],
        ["another trainer's name", "trainer.args.per_device_train_batch_size: a whole number"],
    ),
    "foreign key with a value": (
        ["load_in_4bit=true"],
        ["another trainer's name", "quantization=nf4."],
    ),
    "entry of a mapping": (
        ["dataset.columns.prompt"],
        ["dataset.columns.prompt is an entry of dataset.columns.", "dataset.columns: a mapping"],
    ),
    "entry of any value": (
        ["dataset.options.delimiter"],
        ["dataset.options.delimiter is an entry of dataset.options.", "owner    luthier"],
    ),
    "entry of a library's mapping": (
        ["lora.rank_pattern.q_proj"],
        ["is an entry of lora.rank_pattern.", "owner    peft.LoraConfig"],
    ),
    "source": (["dataset.sources.mine"], ["Where rows come from", "dataset.sources.mine.path "]),
    "group with a dot": (["lora."], ["Options: lora=NAME"]),
    "comment longer than a line": (
        ["trainer.args.learning_rate"],
        ["the highest learning rate; full fine-tuning takes a tenth"],
    ),
    "foreign key with a value that is no YAML": (
        ["micro_batch_size=[a"],
        ["another trainer's name", "'trainer.args.per_device_train_batch_size=\"[a\"'."],
    ),
    "renamed key": (["dataset.shape"], ["dataset.shape is called dataset.type now."]),
}


@pytest.mark.parametrize("words, parts", ANSWERS.values(), ids=ANSWERS)
def test_an_answer(words, parts, luthier):
    code, out, err = luthier("explain", *words)
    assert (code, err) == (0, "")
    text = f"{out} {' '.join(out.split())}"
    assert [part for part in parts if part not in text] == []
    # A path can be longer than a line.
    assert max(len(line) for line in out.splitlines() if "/" not in line) <= 100


MISTAKES = {
    "nothing": ([], "Name a key first: luthier explain trainer.args.learning_rate"),
    "dots alone": (["."], "Name a key first: luthier explain trainer.args.learning_rate"),
    "capitals": (["LoRA.R"], "there is no key LoRA.R. Did you mean lora.r?"),
    "typo": (["chat.max_lenght"], "no key chat.max_lenght. Did you mean chat.max_length?"),
    "typo without a group": (["learnin_rate"], "Did you mean trainer.args.learning_rate?"),
    "no such key": (["zzzz"], "there is no key zzzz. luthier explain GROUP lists the keys"),
    "option": (["lora=huge"], "lora: there is no lora option 'huge'."),
    "recipe": (["lora.r", "recipe=quikstart"], "Did you mean quickstart?"),
}


@pytest.mark.parametrize("words, says", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake(words, says, luthier):
    code, out, err = luthier("explain", *words)
    assert (code, out) == (2, "")
    assert says in err


def test_every_key_and_every_entry_below_it_is_explained():
    answered = []
    for key, _ in walk_keys(config_schema()):
        name = key.replace(USER_NAME, "mine")
        answered.append("\n".join(explain(name)))
        try:
            answered.append("\n".join(explain(f"{name}.entry")))
        except UserError as error:
            answered.append(str(error))
    assert len(answered) > 500 and all(answered)


@pytest.mark.parametrize("group", ["lora", "trainer", "trainer.args"])
def test_a_column_of_defaults_does_not_touch_the_names(group):
    for line in explain(group):
        if name := re.match(rf"  ({group}\.\w+)(.)", line):
            assert name[2] == " " or name[2] == ".", line


def test_a_secret_of_a_config_is_not_printed(luthier, monkeypatch):
    monkeypatch.setenv("MY_KEY", "hf_abcdefghijklmnopqrstuvwxyz0123456789")
    value = "model.kwargs={api_key: '${oc.env:MY_KEY}'}"
    _, out, _ = luthier("explain", "model.kwargs", Q, value)
    assert "abcdefghijkl" not in out


def test_the_schema_is_printed_or_written(luthier, tmp_path):
    code, out, _ = luthier("schema")
    assert code == 0
    assert json.loads(out)["properties"]["seed"]["default"] == 42
    file = tmp_path / "recipe.json"
    code, said, _ = luthier("schema", "-o", file)
    assert (code, json.loads(file.read_text())) == (0, json.loads(out))
    assert f"$schema={file}" in said


def test_the_reference_page_is_current():
    page = Path(__file__).parents[2] / "docs" / "reference.md"
    if page.read_text(encoding="utf-8") != reference_page():
        pytest.fail("docs/reference.md is not what the schema and conf/ say: make reference")


def test_an_explanation_imports_no_training_library():
    code = (
        "import sys\nfrom luthier.cli.explain import run\nrun(['trainer.args.beta'])\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'numpy', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


FLAGS = {
    "group": (["--model", "x"], "write model=x."),
    "key of a library": (["--learning-rate", "1e-4"], "write trainer.args.learning_rate=0.0001."),
    "foreign key": (["--batch_size=4"], "write trainer.args.per_device_train_batch_size=4."),
    "foreign key, no YAML": (["--batch_size=[a"], 'per_device_train_batch_size="[a"\'.'),
    "key, no YAML": (["--learning-rate", "{a"], "write 'trainer.args.learning_rate=\"{a\"'."),
    "switch": (["--dry-run"], "write dry_run=true."),
    "typo of a flag": (["--hepl"], "Did you mean --help?"),
}


@pytest.mark.parametrize("words, says", FLAGS.values(), ids=FLAGS)
def test_a_setting_with_dashes(words, says, luthier):
    code, out, err = luthier("train", *words)
    assert (code, out) == (2, "")
    assert says in err
