"""`luthier report`."""

import shutil
from pathlib import Path

from helpers.damaged_files import make_sweep
from helpers.report_runs import record_of, write_run


def test_a_page_of_one_run(luthier, tmp_path):
    write_run(tmp_path / "runs" / "notes" / "default")
    code, out, err = luthier("report", "notes/default")
    assert (code, out, err) == (0, "runs/notes/default/report.html\n", "")
    assert "notes: report" in Path("runs/notes/default/report.html").read_text(encoding="utf-8")
    assert luthier("report", "runs/notes/default", "-o", "p.html")[:2] == (0, "p.html\n")
    assert Path("p.html").is_file()


def test_a_page_of_several_runs(luthier, tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path / "runs" / "notes" / name)
    assert luthier("report", "notes/a", "notes/b")[:2] == (0, "comparison.html\n")
    assert "2 runs compared" in Path("comparison.html").read_text(encoding="utf-8")


def test_a_sweep_is_its_trials_the_best_first(luthier, tmp_path):
    make_sweep(tmp_path / "sweep")
    shutil.rmtree(tmp_path / "sweep" / "trials")
    for number, loss in enumerate([1.0, 0.5]):
        results = {"eval_loss": {"before": 2.0, "after": loss}}
        write_run(tmp_path / "sweep" / "trials" / f"{number:03d}", record_of(results=results))
    code, out, _ = luthier("report", "sweep", "-o", "s.html")
    assert (code, out) == (0, "s.html\n")
    page = Path("s.html").read_text(encoding="utf-8")
    assert page.index(">000<") < page.index(">001<") and "2 runs compared" in page


MISTAKES = {
    (): "`luthier report` needs a run",
    ("none",): "none: there is no run",
    ("notes/default", "-o", "runs"): "runs cannot be written",
}


def test_mistakes_are_said_in_words(luthier, tmp_path):
    write_run(tmp_path / "runs" / "notes" / "default")
    for words, text in MISTAKES.items():
        code, out, err = luthier("report", *words)
        assert (code, out) == (2, "") and text in err
