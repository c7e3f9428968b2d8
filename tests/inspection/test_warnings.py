"""What usually ruins a training: each rule with a run that it warns of and one that it does not."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from luthier.config import load_config
from luthier.data.batching.settings import read_batching_settings
from luthier.inspection.batch_fill import measure_batch_fill
from luthier.inspection.warnings import RULES, RunFacts, find_warnings

ROOT = Path(__file__).parents[2]
MODEL = ("model=hub", "model.path=org/model", "dataset=jsonl", "dataset.path=rows.jsonl")
LORA = (*MODEL, "lora=default")
LARGE = {"parameters": 8_000_000_000}


def facts_of(words, lengths=None, **more):
    config = load_config([*words]).config
    lengths = None if lengths is None else np.array(lengths, np.int32)
    fill = None
    if lengths is not None and config.trainer.base_method in ("sft", "pretrain"):
        fill = measure_batch_fill(lengths, config, read_batching_settings(config))
    rows = 0 if lengths is None else len(lengths)
    return RunFacts(config, lengths=lengths, rows=rows, fill=fill, **LARGE | more)


def rate(value):
    return f"trainer.args.learning_rate={value}"


UNEVEN = [16, 16, 16, 512] * 100
EVEN = [100] * 400


@pytest.mark.parametrize(
    ("words", "more", "says", "fix"),
    [
        pytest.param(
            (*MODEL, rate("2e-4")), {}, "2e-4 is too high for full fine-tuning",
            "trainer.args.learning_rate=2e-5", id="full 2e-4",
        ),
        pytest.param(
            (*LORA, rate("0")), {}, "0 is too low for an adapter",
            "trainer.args.learning_rate=2e-4", id="a rate of zero",
        ),
        pytest.param(
            (*LORA, rate("1e-6")), {}, "1e-6 is too low for an adapter",
            "trainer.args.learning_rate=2e-4", id="lora 1e-6",
        ),
        pytest.param(
            (*MODEL, "trainer=dpo", rate("1e-4")), {}, "5e-8 to 2e-5 is usual",
            "trainer.args.learning_rate=1e-6", id="full dpo",
        ),
        pytest.param(
            (*LORA, "trainer.args.num_train_epochs=40"), {"lengths": EVEN},
            "each of the 400 rows is seen 40 times", "trainer.args.num_train_epochs=4", id="epochs",
        ),
        pytest.param(
            (*LORA, "trainer.args.max_steps=4000"), {"lengths": EVEN}, "is seen 40 times",
            "trainer.args.max_steps=-1 trainer.args.num_train_epochs=4", id="steps are epochs",
        ),
        pytest.param(
            LORA, {"lengths": [100] * 8}, "training takes 2 optimizer steps in all, over 8 rows",
            "trainer.args.num_train_epochs=8", id="few steps",
        ),
        pytest.param(
            (*LORA, "trainer.args.gradient_accumulation_steps=16"), {"lengths": EVEN},
            "training takes 7 optimizer steps", "trainer.args.gradient_accumulation_steps=1",
            id="accumulation leaves few steps",
        ),
        pytest.param(
            (*LORA, "chat.max_length=512"), {"lengths": UNEVEN}, "of the tokens in a batch are",
            "trainer.args.packing=true", id="padding",
        ),
        pytest.param(
            (*LORA, "chat.max_length=null"), {"lengths": UNEVEN}, "are padding",
            "trainer.args.packing=true chat.max_length=512", id="padding without a length",
        ),
        pytest.param(
            (*LORA, "chat.max_length=512"), {"lengths": UNEVEN[:80]}, "are padding",
            "trainer.args.train_sampling_strategy=group_by_length", id="too few rows to pack",
        ),
        pytest.param(
            (*LORA, "chat.max_length=512"),
            {"lengths": UNEVEN, "model_fields": {"model_type": "bloom"}}, "are padding",
            "trainer.args.train_sampling_strategy=group_by_length", id="padding that cannot pack",
        ),
        pytest.param(
            LORA, {"similar_rows": {"": 1}}, "1 training row equals a row held out but for case",
            "dataset.deduplicate=normalised", id="held-out rows",
        ),
        pytest.param(
            LORA, {"similar_rows": {"hard": 3}}, "3 training rows equal a row of the",
            "dataset.deduplicate=normalised", id="rows of an evaluation set",
        ),
        pytest.param(
            (*LORA, "model.tokenizer=org/other"), {"end_tokens": [2, 7], "tokenizer_end": 5},
            "the tokenizer ends texts with the id 5", "model.tokenizer=null", id="end token",
        ),
        pytest.param(
            LORA, {"untrained_tokens": ["<|im_start|>", "<|im_end|>"]},
            "the chat template writes <|im_start|>, <|im_end|>",
            "'lora.trainable_token_indices=[\"<|im_start|>\",\"<|im_end|>\"]'", id="untrained",
        ),
    ],
)  # fmt: skip
def test_a_rule_warns_with_the_setting_that_mends_it(words, more, says, fix):
    (warning,) = find_warnings(facts_of(words, **more))
    assert says in warning.text
    assert warning.fix == fix
    assert not warnings_after_fix(warning, words, more)


def warnings_after_fix(warning, words, more):
    """The warnings of the same setting that are left once the fix is pasted into a shell.

    Facts that follow from the config and the lengths are made anew; others are left out.
    """
    typed = shlex.split(warning.fix)
    fixed = {word.partition("=")[0] for word in typed}
    kept = [word for word in words if word.partition("=")[0] not in fixed]
    facts = facts_of([*kept, *typed], more.get("lengths"))
    return [each for each in find_warnings(facts) if each.key == warning.key]


@pytest.mark.parametrize(
    ("words", "more"),
    [
        pytest.param((*MODEL, rate("2e-5")), {}, id="full 2e-5"),
        pytest.param((*LORA, rate("1e-3")), {}, id="lora 1e-3"),
        pytest.param((*LORA, "trainer=dpo", rate("1e-6")), {}, id="lora dpo 1e-6"),
        pytest.param((*MODEL, "lora=vera", rate("1e-2")), {}, id="vera takes more"),
        pytest.param(
            (*MODEL, rate("2e-2"), "trainer.optimizer.name=muon"), {}, id="another optimizer"
        ),
        pytest.param((*MODEL, rate("2e-3")), {"parameters": 1_000_000}, id="random weights"),
        pytest.param((*LORA, "trainer.args.num_train_epochs=4"), {"lengths": EVEN}, id="4 epochs"),
        pytest.param((*LORA, "trainer.args.max_steps=2"), {"lengths": EVEN}, id="steps are chosen"),
        pytest.param(
            (*LORA, "trainer.args.num_train_epochs=40", "dataset.max_rows=8"),
            {"lengths": [100] * 8}, id="rows are chosen",
        ),
        pytest.param((*LORA, "chat.max_length=512"), {"lengths": EVEN}, id="even rows"),
        pytest.param(
            (*LORA, "chat.max_length=512", "trainer.args.packing=true"),
            {"lengths": UNEVEN * 10}, id="packed",
        ),
        pytest.param(
            (*LORA, "trainer.args.per_device_train_batch_size=1"), {"lengths": UNEVEN},
            id="batches of one",
        ),
        pytest.param(LORA, {"similar_rows": {"": 0}}, id="no row on both sides"),
        pytest.param(LORA, {"end_tokens": [2, 7], "tokenizer_end": 7}, id="the model's end token"),
        pytest.param(LORA, {"tokenizer_end": 7}, id="no end token to compare with"),
    ],
)  # fmt: skip
def test_a_rule_is_silent_where_nothing_is_wrong(words, more):
    assert find_warnings(facts_of(words, **more)) == []


RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("name", RECIPES)
def test_no_bundled_recipe_is_warned_of(name):
    config = load_config([f"recipe={name}"]).config
    path = Path(config.dataset.path or "")
    lengths = None
    if path.is_file():
        lengths = [60] * len(path.read_text(encoding="utf-8").splitlines())
    # Recipes whose model a script draws begin with random weights.
    size = 1_000_000 if config.model.path.startswith("./") else 135_000_000
    assert find_warnings(facts_of([f"recipe={name}"], lengths, parameters=size)) == []


@pytest.mark.parametrize("name", ["quickstart", "tiny_pretrain", "tiny_distill"])
def test_check_warns_of_nothing_in_a_bundled_recipe(luthier, name):
    code, out, _ = luthier("check", f"recipe={name}", "--json")
    report = json.loads(out)
    assert (code, report["warnings"]) == (0, [])
    assert report["padding"].startswith("padding is <|im_end|> (id 2), the end token")


def test_check_prints_warnings_with_their_fixes_and_still_holds(on_rows):
    question = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    rows = [question] * 4
    code, out, _ = on_rows("check", rows, "lora=default", "trainer.args.learning_rate=1e-6")
    assert code == 0
    assert "trainer.args.learning_rate: 1e-6 is too low for an adapter (lora.method=lora)" in out
    assert "\n    trainer.args.learning_rate=2e-4\n" in out
    assert "every rule holds; 2 warnings" in out


def test_the_page_lists_every_rule():
    page = (ROOT / "docs" / "inspect.md").read_text(encoding="utf-8")
    table = page.partition("| warning | ")[2].partition("|---|---|")[2].partition("\n\n")[0]
    assert re.findall(r"^\| ([^|]+?) \|", table, re.M) == [rule.name for rule in RULES]
