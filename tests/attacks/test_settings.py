"""Settings under attack: hostile numbers, every mistake of the overrides' grammar, hints to paste.

Each ends in words with the key, before any of the training libraries is imported.
"""

import ast
import copy
import json
import os
import re
import shlex
import subprocess
import sys
import typing
from importlib.util import find_spec
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from luthier.cli.model_arguments import parse_model_arguments
from luthier.config import load_config
from luthier.config.compose import parse_overrides
from luthier.config.library_fields import read_class_fields
from luthier.config.methods import METHODS
from luthier.config.number_ranges import RANGES
from luthier.config.passthrough import PASS_THROUGH_KEYS, check_pass_through
from luthier.config.schema import RunConfig
from luthier.config.validate import validate_config
from luthier.errors import UserError, ask_nearest, format_override

Q = "recipe=quickstart"
SOURCE = Path(__file__).parents[2] / "src" / "luthier"
PARSER = OverridesParser.create()
PARSER_WORDS = re.compile(
    r"token recognition|viable alternative|mismatched input|extraneous|expecting|<EOF>"
)


def refused(overrides):
    """The message with which a config is refused."""
    with pytest.raises(UserError) as caught:
        load_config([Q, *overrides])
    return str(caught.value)


# Numbers.

NUMBERS = {
    name: method
    for method, facts in METHODS.items()
    for name, field in (read_class_fields(*facts.config) or {}).items()
    if field.types & {"int", "float"}
    and name not in {**PASS_THROUGH_KEYS[0].refused_settings, **facts.refused_settings}
}
"""Each number of `trainer.args` with a method that takes it."""
HOSTILE = [float("nan"), float("inf"), float("-inf"), -(10**30), 10**30, -2, "x", [1], {"a": 1}]


def complaints(name, value, method):
    """What is said of a setting of `trainer.args`."""
    mistakes = check_pass_through({"trainer": {"method": method, "args": {name: value}}})
    return [mistake.text for mistake in mistakes]


@pytest.mark.parametrize("value", HOSTILE, ids=repr)
def test_no_number_of_a_trainer_takes_a_hostile_value(value):
    signed = {"alpha", "f_alpha_divergence_coef", "simpo_gamma"}
    texts = {"pad_to_multiple_of"}
    silent = [
        name
        for name, method in NUMBERS.items()
        if not complaints(name, value, method)
        and not (value == -2 and name in signed)
        and not (value == "x" and name in texts)
    ]
    assert silent == []


def test_every_number_has_a_range():
    assert [name for name in NUMBERS if name not in RANGES] == []


def numbers_of(model, prefix=()):
    """The keys of a group whose values are numbers."""
    for name, field in model.model_fields.items():
        key = (*prefix, name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from numbers_of(field.annotation, key)
        elif {int, float} & {*types_in(field.annotation)}:
            yield key


def types_in(annotation):
    """The types of which an annotation is made."""
    inner = typing.get_args(annotation)
    return [annotation, *(each for part in inner for each in types_in(part))]


@pytest.mark.parametrize("value", [*HOSTILE[:5], -1, "x", [1]], ids=repr)
def test_no_number_of_luthiers_own_takes_a_hostile_value(value):
    resolved, silent = load_config([Q]).resolved, []
    for key in numbers_of(RunConfig):
        changed = copy.deepcopy(resolved)
        group = changed
        for name in key[:-1]:
            group = group[name]
        group[key[-1]] = value
        config, mistakes = validate_config(changed)
        silent += [".".join(key)] if config is not None or len(mistakes) != 1 else []
    assert silent == []


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.args.learning_rate=-1", "-1 is too small; the least is 0"),
        ("trainer.args.learning_rate=nan", "nan is not a finite number"),
        ("trainer.args.max_steps=0", r"0 is too small; the least is 1 \(or -1\)"),
        ("trainer.args.adam_beta2=1", "1 is too large; it must be less than 1"),
        ("trainer.args.logging_steps=0", "0 is too small; it must be more than 0"),
        ("lora.lora_dropout=nan", "nan is not a finite number"),
        ("seed=-1", "it must be at least 0"),
        ("seed=99999999999", "it must be less than"),
        ("trainer.args.deepspeed=ds.json", "--config zero2"),
        ("trainer.args.fsdp=full_shard", "--config fsdp2"),
        ("trainer.args.fsdp_config={a: 1}", "--config fsdp2"),
        ("trainer.args.push_to_hub=true", "luthier push RUN"),
        ("trainer.args.hub_model_id=a/b", "luthier push RUN"),
        ("trainer.args.metric_for_best_model=exact_mach", r"Did you mean exact_match\?"),
        ("trainer.args.metric_for_best_model=eval_bleu", "'eval_bleu' is not measured"),
        ("trainer.args.optim=adamw9", "Did you mean .*adamw_torch"),
        ("quantization.bnb_4bit_quant=nf4", r"Did you mean quantization\.bnb_4bit_quant_type or"),
    ],
)
def test_a_value_is_refused_in_words(override, words):
    assert re.search(words, refused([override]))


# What the grammar of overrides does not take.

UNREADABLE = [
    (["dataset.filter=len(answer) > 3"], "'dataset.filter=\"len(answer) > 3\"'"),
    (["dataset.options.delimiter=;"], "'dataset.options.delimiter=\";\"'"),
    (["dataset.options={delimiter: ;}"], "'dataset.options={delimiter: \";\"}'"),
    (["dataset.columns={prompt:", "Question}"], "'dataset.columns={prompt: Question}'"),
    (["dataset.columns={prompt:", "A,", "completion:", "B}"], "{prompt: A, completion: B}'"),
    (["lora.r", "=", "8"], "lora.r=8."),
    (["lora.r", "=8"], "lora.r=8."),
    (["lora.r=", "8"], "lora.r=8."),
    (["lora.r==8"], "lora.r=8."),
    (["lora.target_modules=[q_proj"], "'lora.target_modules=[q_proj]'"),
    (["lora.target_modules=[q_proj,,]"], "'lora.target_modules=[a, b]'"),
    (["trainer.evaluation.metrics=[regex: {pattern: (a|b)}]"], '{pattern: "(a|b)"}'),
    (["model.path='x"], "model.path=x"),
    (["card.license=a=b"], "'card.license=\"a=b\"'"),
    (["model.path=${"], "${...} cannot be read"),
    (["model.path='${x'"], "${...} cannot be read"),
    (["lora[0]=8"], "is not the name of a setting"),
    (["=8"], "is not the name of a setting"),
    (["lora.r=1,2"], "'lora.r=[1,2]'"),
    (["tracker.to=wandb"], "'tracker.to=[wandb]'"),
    (["dataset.columns=prompt: Question"], "'dataset.columns={prompt: Question}'"),
    (["dataset.columns=x"], "'dataset.columns={name: value}'"),
]


@pytest.mark.parametrize(("words", "hint"), UNREADABLE, ids=[" ".join(w) for w, _ in UNREADABLE])
def test_an_override_that_cannot_be_read_is_explained(words, hint):
    message = refused(words)
    assert message.startswith("1 mistake ")
    assert hint in message
    assert not PARSER_WORDS.search(message)


WORDS = st.text(alphabet="ab1.=[]{}()'\"\\,:;<>&|$*?#!~@%+- \t\n", max_size=12)


@settings(max_examples=150, deadline=None)
@example(["1=", ""], "")
@given(st.lists(WORDS, min_size=1, max_size=2), st.sampled_from(["lora.r=", "dataset.filter=", ""]))
def test_no_word_of_the_parser_reaches_the_user(words, key):
    words[0] = key + words[0]
    _, mistakes = parse_overrides(words)
    assert [mistake for mistake in mistakes if PARSER_WORDS.search(mistake.text)] == []


PATHS = [
    "runs/mine/trainer.args.max_steps=400",
    "runs/custom/model=hub+model.path=x",
    "data (1)",
    "data/[ab]",
    "a;b",
    "it's",
    "50%",
    "a&b",
    "#1",
    "ä ö",
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("key", ["output_dir", "dataset.path", "dataset.cache"])
def test_a_path_means_itself(path, key):
    config = load_config([Q, f"{key}={path}"]).config
    found = config.output_dir if key == "output_dir" else getattr(config.dataset, key.split(".")[1])
    assert found == path


BROKEN_YAML = {
    "seed: 1\n  model: x\n": "a second `:` in a line, or the indentation",
    "trainer:\n   args: {}\n  method: sft\n": "is not indented as the lines around it",
    "seed: 1\n\tmodel: x\n": "this one has a tab",
    "seed: {a: 1\n": "is not closed",
    "card: {license: '\n": "a quote is opened and not closed",
    "seed: @a\n": "text that begins with @ needs quotes",
    "seed: *a\n": "needs quotes",
    "seed: ${a\n": "${...} cannot be read",
    "seed: 1\nseed: 2\n": "found duplicate key seed",
}


@pytest.mark.parametrize(("text", "words"), BROKEN_YAML.items(), ids=repr)
def test_a_recipe_that_cannot_be_read_is_explained(text, words, tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/mine.yaml").write_text(f"# Mine.\n{text}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        load_config(["recipe=mine"])
    assert words in str(caught.value)
    assert not PARSER_WORDS.search(str(caught.value))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["dataset.filter=[a"], "For a text write 'dataset.filter=\"[a\"'"),
        (["dataset.filter={a"], "For a text write 'dataset.filter=\"{a\"'"),
        (["dataset.columns=x", "dataset.columns.prompt=y"], "dataset.columns is set as a whole"),
    ],
    ids=["list", "mapping", "twice"],
)
def test_settings_behind_a_model_are_refused_in_words(words, said):
    with pytest.raises(UserError, match=re.escape(said)):
        parse_model_arguments("generate", ["RUN", *words], ("MODEL",))


@pytest.mark.parametrize("path", PATHS)
def test_a_path_behind_a_model_means_itself(path):
    parsed = parse_model_arguments("generate", ["RUN", f"dataset.path={path}"], ("MODEL",))
    assert parsed.dataset == {"path": path}


# Hints.

VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-(10**9), 10**9), st.floats(-1e9, 1e9), st.text()
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.from_regex(r"[a-z][a-z0-9_]{0,5}", fullmatch=True), inner, max_size=3),
    ),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(VALUES)
def test_what_is_shown_to_type_reads_back_as_it_was(value):
    (word,) = shlex.split(format_override("dataset.options.x", value))
    # A pair of characters that OmegaConf takes for another setting, and what no argument can hold.
    if "${" not in word and "\0" not in word:
        assert PARSER.parse_override(word).value() == value


HINT = re.compile(
    r"'?(?<![\w.{])(?:X|model|quantization|lora|dataset|chat|trainer|tracker|card)\.[\w.]+="
    r"(?:'[^']*'|\[[^\]]*\]+|\{[^}]*\}+|\"[^\"]*\"|[^\s,;)'\"]+)'?"
)


def texts_of(path):
    """The texts of a module with X in place of what is put into them, without its docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inner = {
        id(value)
        for node in ast.walk(tree)
        for value in (node.values if isinstance(node, ast.JoinedStr) else ())
    }
    # Docstrings are no messages.
    inner |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield (
                node.lineno,
                "".join(
                    value.value if isinstance(value, ast.Constant) else "X" for value in node.values
                ),
            )
        elif (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner
        ):
            yield node.lineno, node.value


def unusable_hints():
    """The settings in texts of the tree that bash or Hydra do not read as they are shown."""
    for path in sorted(SOURCE.rglob("*.py")):
        for line, text in texts_of(path):
            for hint in HINT.findall(text):
                shown = hint.rstrip(".:`")
                try:
                    words = shlex.split(shown)
                    is_whole = len(words) == 1 and (shown == shlex.quote(words[0]))
                    PARSER.parse_override(words[0])
                except Exception:
                    is_whole = False
                if not is_whole:
                    yield f"{path.relative_to(SOURCE)}:{line}: {shown}"


def test_every_setting_that_a_message_shows_survives_a_shell():
    assert list(unusable_hints()) == []


@pytest.mark.parametrize(
    ("word", "options", "words"),
    [
        (
            "bnb_4bit_quant",
            ["bnb_4bit_quant_type", "bnb_4bit_quant_storage"],
            "bnb_4bit_quant_type",
        ),
        ("Learning_rate", ["learning_rate", "lr_scheduler_type"], "learning_rate"),
        ("adamw9", ["adafactor", "adamw_torch", "adamw_8bit", "sgd"], "adamw_8bit or adamw_torch"),
        ("xyz", ["adafactor", "sgd"], ""),
    ],
)
def test_the_nearest_name(word, options, words):
    assert words in ask_nearest(word, options)
    assert bool(words) == bool(ask_nearest(word, options))


# What this machine or the model lacks.

LACKING = {
    "model.device=cuda": "torch sees no CUDA device",
    "trainer.args.fp16=true": "float16 needs a GPU",
    "model.dtype=float16": "float16 needs a GPU",
    "model.attention=flash_attention_2": "pip install flash-attn",
    "model.attention=kernels-community/x": "pip install kernels",
    "trainer.args.use_liger_kernel=true": "is for a CUDA GPU",
    "chat.template=none.jinja": "neither Jinja text nor a file",
    "chat.template=.": "it is a folder",
    "chat.template=/dev/zero": "a pipe or a device",
    "chat.template=broken.jinja": r"not valid Jinja: .*\(line 2\)",
    "lora.target_modules=[q_prog]": r"nothing in the model is named q_prog\. Did you mean q_proj\?",
    "lora.target_modules=[nope]": r"nothing in the model is named nope\. It has embed_tokens, .*",
    "lora.modules_to_save=[lm_heads]": "nothing in the model is named lm_heads",
    "lora.target_modules=[q_proj] lora.modules_to_save=[lm_head,embed_tokens]": "",
    "model.path=runs/nine": r"there is no such folder. Did you mean runs/mine/nine\?",
    "model.path=runs/xyz": r"there is no such folder. There are: runs/mine/nine\.",
    "model.path=runs": "Name the folder with config.json",
    "model.path=rows/none": "the model is not on this machine",
    "model.path=model/none": "there is no such folder",
}
CHECK = """
import json, sys
from luthier.config import load_config
from luthier.config.compose import parse_overrides
from luthier.errors import UserError
from luthier.train.run import check_before_torch
said = {}
for words in json.loads(sys.argv[1]):
    try:
        check_before_torch(load_config([*json.loads(sys.argv[2]), *words.split()]).config)
        said[words] = ""
    except UserError as error:
        said[words] = str(error)
print(json.dumps([said, sorted({"torch", "transformers", "trl", "peft"} & set(sys.modules))]))
"""


def write_safetensors(file, names):
    """A file of weights of one number each."""
    head = {
        name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * at, 4 * at + 4]}
        for at, name in enumerate(names)
    }
    text = json.dumps(head).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4 * len(names)))


def test_what_is_lacking_is_said_before_torch_is_imported(tmp_path):
    """In a process of its own, as other tests import torch."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    (tmp_path / "broken.jinja").write_text("{{ a }}\n{% if x }")
    model, run = tmp_path / "model", tmp_path / "runs/mine/nine"
    model.mkdir()
    run.mkdir(parents=True)
    (run / "run.json").write_text("{}")
    (model / "config.json").write_text('{"model_type": "llama"}')
    layers = ["model.layers.0.self_attn.q_proj", "model.embed_tokens", "model.norm"]
    write_safetensors(model / "model.safetensors", [f"{layer}.weight" for layer in layers])
    start = ["model=hub", "model.path=./model", "dataset=files", "dataset.path=rows.jsonl"]
    start += ["lora=default", "trainer.evaluation.metrics=[]", "trainer.args.eval_strategy=no"]
    result = subprocess.run(
        [sys.executable, "-c", CHECK, json.dumps([*LACKING]), json.dumps(start)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    said, heavy = json.loads(result.stdout)
    assert heavy == []
    if find_spec("flash_attn") or find_spec("kernels") or has_gpu():
        pytest.skip("this machine lacks less")
    assert {words: text for words, text in said.items() if not says(LACKING[words], text)} == {}


def says(pattern, text):
    return text == "" if pattern == "" else re.search(pattern, text) is not None


def has_gpu():
    import torch

    return torch.cuda.is_available()
