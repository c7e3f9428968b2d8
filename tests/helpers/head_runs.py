"""Runs of classifiers, taggers, reward and encoder-decoder models, made without a training."""

import json

import yaml

from helpers import task_models as tasks
from helpers.chatml import CHAT, CHATML, byte_tokenizer
from luthier.model.adapters import add_adapter

TEXTS = [
    ("where is my lute", "lute"), ("the card is lost in Cremona", "card"),
    ("violins and guitars", "music"), ("found", "card"), ("Anna Bell found a luthier", "lute"),
    ("a plucked instrument, a lute, in Paris", "music"), ("I lost it", "card"),
]  # fmt: skip
NUMBERS = [0.5, -2.0, 3.25, 1.0, 0.0, 7.5, 2.0]
SEVERAL = [["lute"], ["card", "lost"], [], ["lost"], ["lute", "card"], ["music"], ["lost"]]
WORDS = [
    {"tokens": ["Anna", "Bell", "found", "it"], "tags": ["B-PER", "I-PER", "O", "O"]},
    {"tokens": ["a", "luthier", "in", "Cremona", "."], "tags": ["O", "O", "O", "B-LOC", "O"]},
    {"tokens": ["violins"], "tags": ["O"]},
]
TARGETS = [
    {"source": "where is my card", "target": "in Paris"},
    {"source": "a lute", "target": "a plucked instrument, and a luthier in Cremona makes it"},
    {"source": "violins", "target": "guitars and violins"},
]
PAIRS = [
    {"prompt": [{"role": "user", "content": prompt}],
     "chosen": [{"role": "assistant", "content": chosen}],
     "rejected": [{"role": "assistant", "content": rejected}]}
    for prompt, chosen, rejected in (
        ("Hi", "Hello!", "Go away, please."), ("2+2", "4", "It may be five, or it may be six."),
        ("Bye", "See you.", "x"), ("Sing", "La la la", "I do not sing, and never will."),
    )
]  # fmt: skip


def labelled(labels):
    return [{"text": text, "label": label} for (text, _), label in zip(TEXTS, labels, strict=True)]


def both(rows):
    """Rows to train on, and the same ones with other texts to hold out."""
    first = next(iter(rows[0]))
    if first == "tokens":
        return rows, [row | {"tokens": [*row["tokens"][:-1], "lute"]} for row in rows]
    if first == "prompt":
        said = {"role": "user", "content": "Well?"}
        return rows, [row | {"prompt": [said]} for row in rows]
    return rows, [row | {first: f"{row[first]} !"} for row in rows]


CASES = {
    "classes": ("classify", labelled([label for _, label in TEXTS]), {}),
    "classes of pairs": ("classify", [{"text": text, "text_pair": "a lute", "label": label}
                                      for text, label in TEXTS], {}),
    "several classes": ("classify", labelled(SEVERAL), {}),
    "numbers": ("classify", labelled(NUMBERS), {}),
    "classes by an adapter": ("classify", labelled([label for _, label in TEXTS]),
                              {"lora": {"r": 4, "target_modules": "all-linear"}}),
    "tags": ("tag", WORDS, {}),
    "tags by an adapter": ("tag", WORDS, {"lora": {"r": 4, "target_modules": "all-linear"}}),
    "rewards": ("reward", PAIRS, {}),
    "rewards by an adapter": ("reward", PAIRS, {"lora": {"r": 4, "target_modules": "all-linear"}}),
    "targets": ("seq2seq", TARGETS, {}),
}  # fmt: skip


def bases(folder, method):
    """A folder with a model for a method, and its tokenizer."""
    if method == "seq2seq":
        return tasks.saved(folder, tasks.t5, tasks.unigram()), tasks.unigram()
    if method == "reward":
        tokenizer = byte_tokenizer(("<pad>", "<|im_start|>", "<|im_end|>"), pad_token="<pad>")
        return tasks.saved(folder, tasks.llama, tokenizer), tokenizer
    return tasks.saved(folder, tasks.bert, tasks.wordpiece()), tasks.wordpiece()


def finish(folder, method, rows, also):
    """Make the folder of a run as its trainer leaves it, and what the trainer measures itself."""
    folder.mkdir()
    base, tokenizer = bases(folder / "base", method)
    config = tasks.config_of(method, folder, base, *both(rows), **also)
    task = "TOKEN_CLS" if method == "tag" else "SEQ_CLS"

    def adapt(model):
        return add_adapter(model, config.lora, 0, task) if config.lora.is_enabled else model

    trainer, _ = tasks.built(config, tokenizer, adapt)
    for weight in trainer.model.parameters():
        # Random weights of the usual size say nearly the same of every row.
        weight.data *= 3 if weight.dim() > 1 and weight.requires_grad else 1
    measured = {n.removeprefix("eval_"): v for n, v in trainer.evaluate().items()}
    run = folder / "run"
    trainer.save_model(str(run / "model"))
    tokenizer.save_pretrained(run / "model")
    chat = CHAT | {"template": CHATML} if method == "reward" else None
    for place, content in ((run / "run.json", {"status": "finished", "chat": chat}),
                           (run / "model" / "chat.json", chat)):  # fmt: skip
        place.write_text(json.dumps(content))
    (run / "config.yaml").write_text(yaml.safe_dump(config.model_dump() | {"recipe": "tiny"}))
    return run, measured
