"""The rows and lengths that a run keeps for its report."""

import json

import pytest

from luthier.config import load_config
from luthier.data.prepare import prepare
from luthier.inspection.tokens import DisplayedImage
from luthier.model.tokenizer import load_tokenizer
from luthier.report.data_summary import MAX_TOKENS, read_data_summary, write_data_summary
from luthier.train.methods import make_row_encoders


@pytest.fixture
def summary_of(tmp_path):
    """Return what a run of these overrides keeps of its data."""

    def summary_of(*words):
        config = load_config([*words, f"dataset.cache={tmp_path / 'cache'}"]).config
        tokenizer = load_tokenizer(config.model)
        encoders = make_row_encoders(config, tokenizer)
        prepared = prepare(config.dataset, encoders, tokenizer, config.seed)
        write_data_summary(tmp_path, config, prepared, tokenizer)
        return read_data_summary(tmp_path)

    return summary_of


def marked(row):
    """A row's text, what trains between guillemets."""
    text, trains = "", False
    for piece in row.pieces():
        assert not isinstance(piece, DisplayedImage)
        if piece.trained != trains:
            text += "«" if piece.trained else "»"
            trains = piece.trained
        text += piece.text
    return text + "»" * trains


METHODS = {
    "quickstart": {"row 1": ("<|im_start|>assistant\n«{", "<|im_end|>»\n")},
    "tiny_dpo": {
        "row 1, prompt": ("<|im_start|>user\n", "<|im_start|>assistant\n"),
        "row 1, chosen": ("«Of", "<|im_end|>»"),
        "row 1, rejected": ("«You", "<|im_end|>»"),
    },
    "tiny_kto": {"row 1, a good reply": ("«", "<|im_end|>»")},
    "tiny_reward": {"row 1, chosen": ("Of", "<|im_end|>\n")},
    "tiny_classify": {"row 1, label price": ("clarinet", ".")},
    "tiny_tag": {"row 1": ("ophone« in Vienna .»", "»")},
    "tiny_grpo": {"row 1": ("<|im_start|>user\n", "<|im_start|>assistant\n")},
    "tiny_pretrain": {"row 1": ("«", "<|im_end|>»")},
}


@pytest.mark.parametrize("recipe, expected", METHODS.items(), ids=METHODS)
def test_rows_of_each_kind_of_method(recipe, expected, summary_of):
    summary = summary_of(f"recipe={recipe}")
    assert summary.remark == ""
    rows = {row.heading: row for row in summary.rows}
    for heading, (inside, end) in expected.items():
        row = rows[heading]
        assert inside in marked(row) and marked(row).endswith(end)
        assert row.counts.startswith(f"{len(row.tokens)} tokens")
    assert summary.rows[0].place.endswith(".jsonl:1")
    assert summary.quantiles["max"] == summary.histogram[-1][1] >= summary.quantiles["median"]
    assert sum(count for *_, count in summary.histogram) > 20


def test_tags_of_words_are_kept(summary_of):
    row = summary_of("recipe=tiny_tag").rows[0]
    tags = [piece.tag for piece in row.pieces()]
    assert tags[:4] == ["B-PER", None, None, "I-PER"]


def write_rows(path, *replies):
    rows = [
        {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": reply}]}
        for reply in replies
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return (
        "model=smollm2_135m", "dataset=jsonl", f"dataset.path={path}", "lora=default",
        "dataset.eval.share=null", "trainer.args.eval_strategy=no",
    )  # fmt: skip


def test_a_long_row_loses_its_middle(summary_of, tmp_path):
    (row,) = summary_of(*write_rows(tmp_path / "long.jsonl", "lute " * 6_000)).rows
    assert len(row.tokens) == MAX_TOKENS and row.left_out > 4_000
    assert row.counts.startswith(f"{MAX_TOKENS + row.left_out:,} tokens")
    assert row.tokens[0][1] == "<|im_start|>" and row.tokens[-2][1] == "<|im_end|>"
    assert (tmp_path / "data.json").stat().st_size < 200_000


def test_a_row_with_a_secret_is_not_shown(summary_of, tmp_path):
    token = "hf_" + "aB3dE5gH" * 4 + "xy"
    first, second = summary_of(*write_rows(tmp_path / "r.jsonl", token, "Fine.")).rows
    assert first.tokens == [] and "looks like a secret" in first.notes[0]
    assert "«Fine." in marked(second)
    assert token not in (tmp_path / "data.json").read_text()


def test_sources_of_a_mixture_have_a_row_each(summary_of, tmp_path):
    words = write_rows(tmp_path / "a.jsonl", *map(str, range(9)))
    write_rows(tmp_path / "b.jsonl", *"xyz")
    sources = [f"dataset.sources.{name}.path={tmp_path / name}.jsonl" for name in "ab"]
    others = [word for word in words if "dataset=" not in word and "dataset.path" not in word]
    summary = summary_of(*others, "dataset=mixture", "dataset.path=null", *sources)
    assert [row.place.rsplit("/", 1)[-1] for row in summary.rows] == ["a.jsonl:1", "b.jsonl:1"]


def test_a_run_of_an_older_luthier_has_no_rows(tmp_path):
    summary = read_data_summary(tmp_path)
    assert summary.rows == [] and "recorded no rows" in summary.remark
