"""The exit code that a run leaves for the caller of its launcher."""

import pytest

from luthier.train.signals import write_exit_code


@pytest.mark.parametrize(
    ("rank", "code", "before", "after"),
    [
        pytest.param("0", 75, None, "75", id="the-first-was-stopped"),
        pytest.param("0", 0, None, "0", id="the-first-finished"),
        pytest.param("1", 75, None, None, id="another-was-stopped"),
        pytest.param("1", 2, None, "2", id="another-failed"),
        pytest.param("0", 75, "2", "2", id="stopped-because-another-failed"),
        pytest.param("0", 2, "75", "2", id="the-first-failed"),
        pytest.param("0", 75, "75", "75", id="stopped-again"),
    ],
)
def test_a_failure_of_any_process_stays(rank, code, before, after, monkeypatch, tmp_path):
    file = tmp_path / "code"
    if before is not None:
        file.write_text(f"{before}\n")
    monkeypatch.setenv("LUTHIER_EXIT_FILE", str(file))
    monkeypatch.setenv("RANK", rank)
    write_exit_code(code)
    assert (file.read_text().strip() if file.exists() else None) == after
