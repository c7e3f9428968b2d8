"""A run's folder with all that its report reads, and a reader of the page."""

import json
from html.parser import HTMLParser

import yaml

from luthier.storage.atomic import write_json
from luthier.storage.manifest import compute_seal

CONFIG = {
    "model": {"path": "org/base"}, "lora": {"r": 8}, "quantization": {"load_in_4bit": True},
    "dataset": {"path": "notes.jsonl", "eval": {"sets": {"code": {"path": "code.jsonl"}}}},
    "chat": {"max_length": 128}, "recipe": "notes", "output_dir": "runs/notes", "seed": 42,
    "trainer": {"method": "sft", "args": {"learning_rate": 2e-4}},
}  # fmt: skip
TOKENS = [
    [1, "<s>", "control", False, None, None, None],
    [5, "Hi", "context", False, "user", 0, "content"],
    [6, "Ho", "trained", True, "assistant", 1, "content"],
    [2, "</s>", "control", True, None, None, None],
]
DATA = {
    "quantiles": {"min": 4, "median": 6, "p90": 9, "p99": 9, "max": 9},
    "histogram": [[4, 5, 2], [6, 7, 5], [8, 9, 1]],
    "rows": [
        {"heading": "row 1", "place": "notes.jsonl:1", "counts": "4 tokens", "tokens": TOKENS}
    ],
}


def record_of(**entries):
    """A finished run's record."""
    return {
        "format": 2, "status": "finished", "recipe": "notes", "overrides": ["recipe=notes"],
        "started": "2026-11-29T10:00:00+00:00", "ended": "2026-11-29T10:05:16+00:00",
        "cwd": "/work", "seeds": {"seed": 42}, "seconds": 316.0, "training_seconds": 250.0,
        "peak_memory_gib": {"host": 3.1}, "versions": {"python": "3.11", "luthier": "0.1.0"},
        "model": {"path": "org/base", "weights_sha256": "ab" * 32},
        "data": {"sha256": "cd" * 32, "train": {"rows": 8, "sequences": 8, "tokens": 50,
                 "trained_tokens": 20, "longest": 9, "dropped": {"too long": 2}}},
        "hardware": {"cpu": "Some CPU", "cores": 2, "memory_gib": 16.0},
        "launch": {"processes": 1, "precision": "no", "device": "cpu", "sharding": "none"},
        "results": {"eval_loss": {"before": 2.0, "after": 0.5},
                    "exact_match": {"before": 0.0, "after": 0.75}},
        "logs": {},
    } | entries  # fmt: skip


def metrics_of(steps=20):
    """What a run logs."""
    rows = [{"step": 0, "epoch": 0, "eval_loss": 2.0, "eval_code_loss": 3.0, "eval_runtime": 1.0}]
    for step in range(1, steps + 1):
        rows.append({"step": step, "epoch": step / steps, "loss": 2 / step, "learning_rate": 1e-4})
    return [*rows, {"step": steps, "epoch": 1, "eval_loss": 0.5, "eval_code_loss": 1.5}]


def replies_of(rows=4):
    """Replies of which three in four are right."""
    return [
        {"prompt": f"note {n}", "expected": "a", "before": "b", "after": "a" if n % 4 else "c",
         "scores": {"exact_match": {"before": 0.0, "after": float(n % 4 > 0)}}}
        for n in range(rows)
    ]  # fmt: skip


def write_run(
    folder, record=None, metrics=None, replies=None, data=DATA, config=CONFIG, dropped=()
):
    """Write a run's folder; returns it."""
    folder.mkdir(parents=True)
    entries = record_of() if record is None else record
    write_json(folder / "run.json", {"seal": compute_seal(entries), **entries})
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    logs = {
        "metrics.jsonl": metrics_of() if metrics is None else metrics,
        "replies.jsonl": replies_of() if replies is None else replies,
        "dropped.jsonl": dropped,
    }
    for name, rows in logs.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    if data is not None:
        write_json(folder / "data.json", data)
    return folder


class PageReader(HTMLParser):
    """The structure of a page: unclosed tags, text by id of a section, charts, and attributes."""

    VOID = ("meta", "img", "br", "wbr", "input", "link")

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.open, self.sections, self.charts, self.tags, self.addresses = [], {}, [], [], []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        self.addresses += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag not in self.VOID:
            self.open.append((tag, attributes.get("id")))
        if "data-chart" in attributes:
            self.charts.append(json.loads(attributes["data-chart"]))

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        name, _ = self.open.pop()
        assert name == tag, (name, tag)

    def handle_data(self, data):
        names = [tag for tag, _ in self.open]
        if "style" in names or "script" in names:
            return
        self.text += data
        for tag, id_ in self.open:
            if tag == "section" and id_:
                self.sections[id_] = self.sections.get(id_, "") + data + " "

    def lines(self, title):
        """The lines of the chart whose first line begins at a title's curve: name -> points."""
        return {line["name"]: line["points"] for line in self.charts[title]["lines"]}
