"""Several runs on one page."""

import copy

from helpers.report_runs import CONFIG, PageReader, metrics_of, record_of, replies_of, write_run
from luthier.report.comparison import distinct_names, render_comparison
from luthier.report.run_files import read_run_files


def runs_of(tmp_path, count=2, **changes):
    """Runs whose rank differs."""
    runs = []
    for number in range(count):
        config = copy.deepcopy(CONFIG) | {"output_dir": f"runs/{number}"}
        config["lora"]["r"] = 8 * (number + 1)
        record = record_of(results={"eval_loss": {"before": 2.0, "after": 0.5 + number}}, **changes)
        folder = write_run(tmp_path / "notes" / f"r-{number}", record, metrics_of(10 + number),
                           replies_of(4), config=config)  # fmt: skip
        runs.append(read_run_files(folder))
    return runs


def test_runs_are_compared(tmp_path):
    runs = runs_of(tmp_path)
    page = render_comparison(runs)
    reader = PageReader(page)
    assert reader.open == [] and all(a.startswith("#") for a in reader.addresses)
    assert set(reader.sections) == {"runs", "results", "curves", "settings", "replies"}
    assert [len(points) for points in reader.lines(0).values()] == [10, 11]
    assert list(reader.lines(0)) == ["r-0", "r-1"]
    settings = reader.sections["settings"]
    assert "lora.r".replace(".", "") in settings.replace(".", "").replace(" ", "")
    assert "16" in settings and "output" not in settings
    assert "0.5" in reader.sections["results"] and "1.5" in reader.sections["results"]
    assert reader.sections["replies"].count("expected") == 4


def test_equal_runs_are_called_equal(tmp_path):
    folders = [write_run(tmp_path / name) for name in ("a", "b")]
    reader = PageReader(render_comparison([read_run_files(folder) for folder in folders]))
    assert "are the same" in reader.sections["settings"]


def test_many_runs_fit_on_a_page(tmp_path):
    page = render_comparison(runs_of(tmp_path, 40))
    assert len(page.encode()) < 2_000_000
    assert "the first 8 of 40 runs" in page


def test_what_others_wrote_is_text(tmp_path):
    script = "<script>alert(1)</script>"
    folders = []
    for name in ("a", "b"):
        config = copy.deepcopy(CONFIG) | {"model": {"path": script + name}}
        replies = [{"prompt": script, "after": script, "expected": script}]
        record = record_of(results={script: {"before": 0.0, "after": 1.0}})
        metrics = [{"step": 1, "epoch": 1, script: 1.0}]
        folders.append(write_run(tmp_path / f"{name}<i>", record, metrics, replies, config=config))
    page = render_comparison([read_run_files(folder) for folder in folders])
    assert script not in page and page.count("<script") == 1 and "<i>" not in page
    assert PageReader(page).open == []


def test_names_tell_runs_apart(tmp_path):
    folders = [tmp_path / "x" / "default", tmp_path / "y" / "default"]
    runs = [read_run_files(write_run(folder)) for folder in folders]
    assert distinct_names(runs) == ["x/default", "y/default"]
    assert len(set(distinct_names([runs[0], runs[0]]))) == 2
