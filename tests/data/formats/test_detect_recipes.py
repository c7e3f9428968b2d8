"""Each recipe reads the rows of its dataset: their columns, as the hub shows them."""

from pathlib import Path

import pytest

from luthier.config import load_config
from luthier.config.methods import METHODS
from luthier.data.formats import detect_format
from luthier.data.rows import Row

RECIPES = Path(__file__).parents[3] / "recipes"
ASKED = {"role": "user", "content": "Name a colour."}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("Green.", "Cheese."))
ROWS = {
    "HuggingFaceH4/ultrachat_200k": {
        "prompt": "Name a colour.", "prompt_id": "f0e3", "messages": [ASKED, GOOD],
    },
    "HuggingFaceTB/smoltalk": {"messages": [ASKED, GOOD], "source": "smol-magpie-ultra"},
    "trl-lib/ultrafeedback_binarized": {
        "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD], "score_chosen": 8.0,
        "score_rejected": 2.0,
    },
    "trl-lib/kto-mix-14k": {"prompt": [ASKED], "completion": [BAD], "label": False},
    "openai/gsm8k": {"question": "What is 2 + 2?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"},
    "wikimedia/wikipedia": {
        "id": "1", "url": "https://is.wikipedia.org/wiki/A", "title": "A", "text": "A er stafur.",
    },
    "mteb/banking77": {"text": "Where is my card?", "label": 11, "label_text": "card_arrival"},
    "unimelb-nlp/wikiann": {
        "tokens": ["Oslo", "is", "cold"], "ner_tags": ["B-LOC", "O", "O"],
        "langs": ["en", "en", "en"], "spans": ["LOC: Oslo"],
    },
    "knkarthick/dialogsum": {
        "id": "train_0", "dialogue": "#Person1#: Hi.", "summary": "They meet.", "topic": "hello",
    },
}  # fmt: skip
"""A row of each dataset with its columns; classes have their names."""
READ = {
    "HuggingFaceH4/ultrachat_200k": {"messages": [ASKED, GOOD]},
    "HuggingFaceTB/smoltalk": {"messages": [ASKED, GOOD]},
    "trl-lib/ultrafeedback_binarized": {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
    "trl-lib/kto-mix-14k": {"prompt": [ASKED], "completion": [BAD], "label": False},
    "openai/gsm8k": {},
    "wikimedia/wikipedia": {"text": "A er stafur."},
    "mteb/banking77": {"text": "Where is my card?", "label": "card_arrival"},
    "unimelb-nlp/wikiann": {"tokens": ["Oslo", "is", "cold"], "tags": ["B-LOC", "O", "O"]},
    "knkarthick/dialogsum": {"source": "#Person1#: Hi.", "target": "They meet."},
}
"""What a recipe reads of it."""


def on_the_hub():
    """The recipes whose rows come from the hub."""
    for path in sorted(RECIPES.glob("*.yaml")):
        config = load_config([f"recipe={path.stem}"]).config
        # A path that begins with a point is of a file that a script makes.
        if not Path(config.dataset.path).is_absolute() and not config.dataset.path.startswith("."):
            yield pytest.param(config, id=path.stem)


@pytest.mark.parametrize("config", list(on_the_hub()))
def test_a_recipe_reads_the_rows_of_its_dataset(config):
    name = config.dataset.path
    row = Row(ROWS[name], "row 0")
    row_format = detect_format(config.dataset, [row], name)
    example = row_format.read(row)
    assert {key: example[key] for key in READ[name]} == READ[name]
    assert row_format.example_type in METHODS[config.trainer.method].row_types
    assert config.dataset.eval.split or config.dataset.eval.count


def test_word_problems_have_a_prompt_and_the_answer_to_compare_with():
    config = load_config(["recipe=grpo_qwen"]).config
    row = Row(ROWS["openai/gsm8k"], "row 0")
    messages = detect_format(config.dataset, [row], "x").read(row)["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert messages[-1]["content"].endswith("#### 4")
