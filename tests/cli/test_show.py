"""`luthier show RUN --rollouts`: the completions that a run recorded, as a person reads them."""

import json

import pytest

from luthier.cli import show
from luthier.errors import UserError

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
ROLLOUT = {
    "step": 3, "prompt": [{"role": "user", "content": "1 + 2?"}],
    "completion": [
        {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [CALL]},
        {"role": "tool", "name": "add", "content": "[3]"},
        {"role": "assistant", "content": "3"},
    ],
    "rewards": {"number": 1.0, "length": None}, "advantage": 0.5, "end": "stopped",
}  # fmt: skip


def test_the_last_rollouts_are_printed(tmp_path, capsys):
    lines = [json.dumps(ROLLOUT | {"step": step}) for step in range(9)]
    (tmp_path / "rollouts.jsonl").write_text("\n".join(lines) + "\n")
    show.print_rollouts(tmp_path)
    shown = capsys.readouterr().out
    assert "step 3 " not in shown
    block = shown[shown.index("step 8") :].splitlines()
    assert [line.strip() for line in block] == [
        "step 8  number 1.0000  length -  advantage +0.50  stopped",
        "user: 1 + 2?",
        "assistant thinks: hm",
        'assistant calls add {"a": 1, "b": 2}',
        "tool add: [3]",
        "assistant: 3",
    ]


def test_a_run_without_any_says_how_to_record_some(tmp_path):
    with pytest.raises(UserError, match=r"trainer\.rollouts\.record=4"):
        show.print_rollouts(tmp_path)


@pytest.mark.parametrize(
    ("counts", "shown"),
    [
        ({"images": 1200}, "3 rows, 9 tokens, 1,200 images"),
        ({"images": 0}, "3 rows, 9 tokens"),
        ({}, "3 rows, 9 tokens"),
    ],
    ids=["images", "texts", "an older record"],
)
def test_images_of_the_training_rows_are_counted(counts, shown):
    record = {"data": {"train": {"rows": 3, "tokens": 9, **counts}}}
    assert ("training rows", shown) in show._material(record)
