"""Prompts of methods whose model answers them itself, in preview and check."""

from helpers.outcome_rows import LUTE, ROWS, STRINGS

GRPO = ("trainer=grpo", "trainer.rewards=[exact_match]", "trainer.args.max_completion_length=64")


def test_a_prompt_ends_where_the_model_is_to_answer(on_rows):
    code, out, err = on_rows("preview", [ROWS["plain"]], *GRPO)
    assert (code, err) == (0, "")
    assert out.splitlines()[2:8] == [
        "row 1  rows.jsonl:1  22 tokens, 0 trained (0%)",
        "{<|im_start|>}|system|↵",
        "|Be| brief|.|{<|im_end|>}|↵",
        "|{<|im_start|>}|user|↵",
        "|What| is| a| lute|?|{<|im_end|>}|↵",
        "|{<|im_start|>}|ass|istant|↵",
    ]


def test_check_counts_prompts_that_are_cut_and_dropped(on_rows):
    long = [{"role": "user", "content": "long " * 90}, STRINGS, LUTE]
    code, out, _ = on_rows("check", [ROWS["plain"], [STRINGS], long], *GRPO, "chat.max_length=128")
    assert code == 0, out
    assert "no prompt" in out
    assert "there is nothing before the reply" in out
    assert "every rule holds" in out


def test_preview_says_where_a_filter_leaves_no_row(on_rows):
    rows = [{"messages": ROWS["plain"], "id": 1}]
    code, _, err = on_rows("preview", rows, "dataset.filter='id > 1'")
    assert code == 2
    assert "dataset: there is no row to train on; the filter leaves out all of 1." in err
