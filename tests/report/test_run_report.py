"""The report of one run."""

import copy
import json

import pytest

from helpers.report_runs import (
    CONFIG,
    DATA,
    TOKENS,
    PageReader,
    metrics_of,
    record_of,
    replies_of,
    write_run,
)
from luthier.errors import UserError
from luthier.report.run_files import read_run_files
from luthier.report.run_report import REPORT_FILE, render_report, write_report
from luthier.report.scores import read_results


def page_of(folder):
    """The page of a run, and what a parser makes of it."""
    page = render_report(read_run_files(folder))
    return page, PageReader(page)


def test_the_page_has_every_part_and_stands_alone(tmp_path):
    page, reader = page_of(write_run(tmp_path / "runs" / "notes" / "default"))
    assert reader.open == []
    assert set(reader.sections) == {
        "curves", "data", "replies", "time-and-memory", "configuration", "reproduce", "warnings",
    }  # fmt: skip
    assert "http" not in page and "@import" not in page and "link" not in reader.tags
    assert all(address.startswith("#") for address in reader.addresses)
    assert "org/base, trained by sft (LoRA of rank 8 on a base in 4 bits) on 8 rows of" in page
    assert "20 steps in 4 min 10 s on Some CPU (2 cores)" in page
    assert "2 rows were left out of training: too long" in reader.sections["warnings"]
    assert "luthier reproduce" in reader.sections["reproduce"]
    assert "prefers-color-scheme: dark" in page and "@media print" in page


def test_the_numbers_are_those_of_the_run(tmp_path):
    _, reader = page_of(write_run(tmp_path / "run"))
    loss, rate = reader.lines(0), reader.lines(1)
    assert loss["train"] == [[n, float(f"{2 / n:.5g}")] for n in range(1, 21)]
    assert loss["eval"] == [[0, 2.0], [20, 0.5]]
    assert loss["code"] == [[0, 3.0], [20, 1.5]]
    assert rate == {"train": [[n, 1e-4] for n in range(1, 21)]}
    assert len(reader.charts) == 2, "times of an evaluation are no curve"


def test_results_have_intervals_where_their_rows_have_scores(tmp_path):
    run = read_run_files(write_run(tmp_path / "run", replies=replies_of(100)))
    loss, match = read_results(run)
    assert loss.interval is None and loss.is_better
    assert match.interval is not None and match.rows == 100
    assert 0.6 < match.interval.low < 0.75 < match.interval.high < 0.9


INTERVALS = {
    "all rows alike": ([1.0] * 8, 1.0),
    "no mean of the rows": ([0.0, 1.0] * 4, 0.9),
    "one row": ([1.0], 1.0),
    "none": ([], 1.0),
}


@pytest.mark.parametrize("scores, after", INTERVALS.values(), ids=INTERVALS)
def test_no_interval_is_better_than_a_wrong_one(scores, after, tmp_path):
    replies = [{"prompt": "p", "after": "a", "scores": {"m": {"after": s}}} for s in scores]
    record = record_of(results={"m": {"before": 0.0, "after": after}})
    run = read_run_files(write_run(tmp_path / "run", record, replies=replies))
    assert read_results(run)[0].interval is None


SCRIPT = "<script>alert('x')</script><img src=x onerror=alert(1)>"


def test_what_others_wrote_is_text(tmp_path):
    tokens = [[7, SCRIPT, "trained", True, SCRIPT, 0, SCRIPT]]
    row = {"heading": SCRIPT, "place": SCRIPT, "counts": SCRIPT, "notes": [SCRIPT]}
    image = {"start": 0, "tokens": 1, "width": 3, "height": 3, "source": SCRIPT, "picture": "eA=="}
    reply = {"prompt": SCRIPT, "before": SCRIPT, "after": SCRIPT, "expected": SCRIPT,
             "set": SCRIPT, "scores": {SCRIPT: {"before": 0.0, "after": 1.0}}}  # fmt: skip
    record = record_of(
        status="failed", error=SCRIPT, recipe=SCRIPT, overrides=[SCRIPT], cwd=SCRIPT,
        results={SCRIPT: {"before": 0.0, "after": 1.0}}, versions={"luthier": SCRIPT},
        warnings=[{"key": SCRIPT, "text": SCRIPT, "fix": SCRIPT}],
        peak_memory_gib={SCRIPT: 1.0}, hardware={"cpu": SCRIPT, "system": SCRIPT},
        model={"path": SCRIPT, "files": [f"{SCRIPT}.gguf"]},
        sessions=[{"status": SCRIPT, "host": SCRIPT, "signal": SCRIPT}] * 2,
        data={SCRIPT: {"tokens": 5}, "train": {"tokens": 5, "rows": 1, "dropped": {SCRIPT: 1},
              "sources": {SCRIPT: 3, "b": 2}}},
        git={"luthier": {"commit": SCRIPT, "branch": SCRIPT, "changed_files": [SCRIPT]}},
    )  # fmt: skip
    config = copy.deepcopy(CONFIG) | {"recipe": SCRIPT}
    config["dataset"] = {"sources": {SCRIPT: {}}, "path": SCRIPT}
    data = DATA | {"rows": [row | {"tokens": tokens, "images": [image]}, row | {"tokens": tokens}]}
    metrics = [{"step": 1, "epoch": 1, SCRIPT: 1.0}, {"step": 2, "epoch": 1, SCRIPT: 2.0}]
    dropped = [{"where": SCRIPT, "problem": SCRIPT}]
    # A record that a person has made may have any text where luthier writes its own.
    folder = tmp_path / "<b>run"
    write_run(folder, record_of(), metrics, [reply], data, config, dropped)
    run = read_run_files(folder)
    page = render_report(run.__class__(**{**vars(run), "record": record}))
    reader = PageReader(page)
    assert SCRIPT not in page and "<b>run" not in page
    assert page.count("<script") == 1 and "onerror=alert(1)>" not in page
    assert reader.tags.count("script") == 1
    assert reader.open == [] and all(a.startswith("#") for a in reader.addresses)
    assert reader.text.count(SCRIPT) > 20, "it is shown as the text that it is"


def test_no_secret_is_on_the_page(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "q" * 34)
    token = "hf_" + "q" * 34
    config = CONFIG | {"tracker": {"wandb": {"api_key": "k" * 40}}}
    replies = [{"prompt": token, "before": token, "after": token, "expected": token}]
    record = record_of(overrides=[f"dataset.options.token={token}"], error=f"denied {token}")
    page, _ = page_of(write_run(tmp_path / "run", record, replies=replies, config=config))
    assert token not in page and "k" * 40 not in page and "(hidden)" in page


def test_a_large_run_makes_a_page_of_two_megabytes_at_most(tmp_path):
    long = [[n, "x" * 12, "trained", True, "assistant", 1, "content"] for n in range(1200)]
    row = {"heading": "row 1", "place": "a:1", "counts": "20,000 tokens", "tokens": long,
           "left_out_at": 800, "left_out": 18_800}  # fmt: skip
    names = [f"rewards/part_{n}" for n in range(60)]
    metrics = [{"step": n, "epoch": 0, "loss": 1 / n} for n in range(1, 100_001)]
    metrics[::50] = [row | dict.fromkeys(names, row["step"] % 97) for row in metrics[::50]]
    replies = [{"prompt": "lute " * 1800, "before": "b", "after": "a", "expected": "e"}] * 500
    folder = write_run(
        tmp_path / "run", metrics=metrics, replies=replies, data=DATA | {"rows": [row] * 4},
        record=record_of(overrides=["a=b " * 200] * 150, error="why " * 9000),
    )  # fmt: skip
    page, reader = page_of(folder)
    assert len(page.encode()) < 2_000_000
    assert "18,800 tokens left out" in page
    assert "of 100,000 points are drawn" in page
    assert "24 of 500 rows" in page and "further curves are left out" in page
    assert "7,500 more characters" in page
    assert len(reader.charts) == 48


ENDS = {
    "finished": ({}, "finished"),
    "failed": ({"status": "failed", "error": "it broke"}, "failed after step 20"),
    "stopped": (
        {"status": "stopped", "sessions": [{"to_step": 7, "signal": "SIGINT"}]},
        "stopped after step 7 by SIGINT",
    ),
    "killed": ({"status": "running"}, "killed after step 20"),
}


@pytest.mark.parametrize("entries, state", ENDS.values(), ids=ENDS)
def test_how_a_run_ended_is_said(entries, state, tmp_path):
    _, reader = page_of(write_run(tmp_path / "run", record_of(**entries)))
    assert state in reader.text
    assert entries.get("error", "") in reader.text


def test_a_run_that_has_hardly_anything_has_a_page(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text('{"status": "failed"}')
    _, reader = page_of(folder)
    assert reader.open == [] and reader.charts == []


def test_an_image_of_a_row_is_on_the_page(tmp_path):
    from base64 import b64encode
    from io import BytesIO

    from PIL import Image

    file = BytesIO()
    Image.new("RGB", (4, 4), "red").save(file, "png")
    image = {"start": 1, "tokens": 2, "width": 400, "height": 400, "source": "a.png",
             "picture": b64encode(file.getvalue()).decode()}  # fmt: skip
    row = DATA["rows"][0] | {"images": [image], "tokens": TOKENS}
    page, reader = page_of(write_run(tmp_path / "run", data=DATA | {"rows": [row]}))
    assert "image 400x400: 2 tokens" in page
    assert sum(address.startswith("data:image/png;base64,") for address in reader.addresses) == 1


def test_damage_is_named(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "data.json").write_text(json.dumps({"rows": [{"heading": 3}]}))
    with pytest.raises(UserError, match=r"data\.json"):
        read_run_files(folder)


def test_the_page_is_a_file_of_the_run(tmp_path):
    folder = write_run(tmp_path / "run", metrics=metrics_of(3))
    write_report(folder)
    assert (folder / REPORT_FILE).read_text(encoding="utf-8").startswith("<!doctype html>")
