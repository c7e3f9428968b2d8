"""Rows of every format that a recipe can be written for, by the format's name."""

import json

TEXT = "the old violin in the workshop has a crack near its bridge"
WORDS = TEXT.split()


def text(number, length=6):
    """Return a few words that no other number gives."""
    return " ".join(WORDS[(number * 7 + i) % len(WORDS)] for i in range(length)) + f" {number}"


def turns(number, role="role", content="content", user="user", assistant="assistant"):
    return [{role: user, content: text(number)}, {role: assistant, content: text(number + 1)}]


ROWS = {
    "messages": lambda n: {"messages": turns(n)},
    "sharegpt": lambda n: {"conversations": turns(n, "from", "value", "human", "gpt")},
    "alpaca": lambda n: {"instruction": text(n), "input": text(n + 1), "output": text(n + 2)},
    "prompt_completion": lambda n: {"prompt": text(n), "completion": text(n + 1)},
    "prompt": lambda n: {"prompt": text(n)},
    "text": lambda n: {"text": text(n, 30)},
    "preference": lambda n: {"prompt": text(n), "chosen": text(n + 1), "rejected": text(n + 2)},
    "unpaired": lambda n: {"prompt": text(n), "completion": text(n + 1), "label": n % 2 == 0},
    "classification": lambda n: {"text": text(n), "label": ("lute", "lyre")[n % 2]},
    "tagging": lambda n: {"tokens": text(n).split(), "tags": ["O"] * 6 + ["B-NUMBER"]},
    "seq2seq": lambda n: {"source": text(n), "target": text(n + 1, 3)},
}
"""Format -> the row of a number."""
METHODS = {
    "prompt": "grpo", "text": "pretrain", "preference": "dpo", "unpaired": "kto",
    "classification": "classify", "tagging": "tag", "seq2seq": "seq2seq",
}  # fmt: skip
"""Format -> the method of its recipe; all others are `sft`."""


def write_rows(path, format_name, count=24):
    """Write so many rows of a format as JSON lines."""
    lines = [json.dumps(ROWS[format_name](number)) for number in range(count)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def init_words(format_name):
    """Return what is typed behind the file: a prompt alone is never detected."""
    return ["dataset.type=prompt"] if format_name == "prompt" else []
