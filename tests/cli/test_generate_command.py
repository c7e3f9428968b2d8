"""`luthier generate`: every row answered once, in order, and what is said of wrong words."""

import json

import pytest

from helpers import adapter_runs as material
from helpers.chatml import jsonl
from luthier.cli.model_arguments import make_dataset_config
from luthier.infer import answer_file, questions

SETTINGS = ("max_new_tokens=6", "model.device=cpu")


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": text, "completion": "known"} for text in material.questions(9)]
    return jsonl(path, rows)


def test_a_file_is_answered_row_by_row_and_a_broken_one_goes_on(
    luthier, tuned_llm, tuned_run, rows, tmp_path
):
    out = tmp_path / "out" / "replies.jsonl"
    words = ("generate", tuned_run, rows, "-o", out, "--batch", "2", *SETTINGS)
    code, said, err = luthier(*words)
    assert code == 0 and f"written {out}: 9 rows" in said and "tokens/s (2 at once)" in said
    found = read(out)
    texts = tuned_llm.generate(material.questions(9), max_new_tokens=6)
    assert [row["reply"] for row in found] == texts
    assert [row["row"] for row in found] == list(range(1, 10))
    assert all(row["message"]["role"] == "assistant" for row in found)
    found[2].pop("parse_error", None)  # The model writes bytes that are no text.
    assert found[2] | {"reply": "", "message": {}, "finish": "", "tokens": 0} == {
        "row": 3, "where": f"{rows}:3", "expected": "known", "reply": "", "message": {},
        "finish": "", "tokens": 0,
        "prompt": [{"role": "user", "content": material.questions(9)[2]}],
    }  # fmt: skip

    whole = out.read_bytes()
    out.write_bytes(whole[: whole.rfind(b"\n", 0, -1) - 20])
    code, said, err = luthier(*words)
    assert "continues after row 7 of 9" in err and "2 rows" in said
    assert out.read_bytes() == whole
    assert "has all 9 replies; nothing is left to do" in luthier(*words)[1]

    code, _, err = luthier(*words, "temperature=0.5")
    assert code == 2 and 'settings: {"max_new_tokens": 6} -> {"max_new_tokens": 6, "temp' in err


def test_rows_are_written_as_soon_as_all_before_them_are_there(tmp_path):
    from luthier.cli.generate import _ReplyWriter
    from luthier.infer.llm import GeneratedReply

    file = answer_file.AnswerFile(tmp_path / "out.jsonl", {})
    asks = [questions.PromptRow(str(n), "q", None) for n in range(3)]
    writer = _ReplyWriter(file, asks, type("Bar", (), {"update": lambda self, n: None})())
    seen = []
    for number in (2, 0, 1):
        writer.take(number, [GeneratedReply(str(number), [1], 1, "stop", {})])
        seen.append([row["reply"] for row in read(file.path)])
    assert seen == [[], ["0"], ["0", "1", "2"]]


def test_ctrl_c_keeps_what_is_done(luthier, tuned_run, rows, tmp_path, monkeypatch):
    from luthier.infer import LLM

    out, replies = tmp_path / "replies.jsonl", LLM.replies

    def interrupted(self, prompts, *, places, **given):
        replies(self, prompts[:3], places=places[:3], **given)
        raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "replies", interrupted)
    words = ("generate", tuned_run, rows, "-o", out, "--batch", "2", *SETTINGS)
    code, _, err = luthier(*words)
    assert code == 130
    assert f"interrupted: 3 of 9 rows are in {out}. Run the same command to continue." in err
    assert len(read(out)) == 3


def test_a_file_of_others_is_left_alone(luthier, tuned_run, rows, tmp_path):
    mine = tmp_path / "mine.jsonl"
    mine.write_text("precious\n")
    code, _, err = luthier("generate", tuned_run, rows, "-o", mine)
    assert code == 2 and "not made by luthier generate" in err
    assert mine.read_text() == "precious\n"


def test_a_file_in_which_nothing_stands_yet_may_begin_anew(tmp_path):
    assert answer_file.AnswerFile(tmp_path / "out.jsonl", {"a": 1}).done == 0
    assert answer_file.AnswerFile(tmp_path / "out.jsonl", {"a": 2}).done == 0


FORMS = {
    "chats": ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                            {"role": "user", "content": "c"}]},
              [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
               {"role": "user", "content": "c"}], None),
    "questions": ({"question": "a"}, [{"role": "user", "content": "a"}], None),
    "pairs": ({"prompt": "a", "chosen": "b", "rejected": "c"},
              [{"role": "user", "content": "a"}], "b"),
    "plain text": ({"text": "a"}, "a", None),
    "classes": ({"text": "a", "label": "x"}, "a", None),
    "translations": ({"source": "a", "target": "b"}, "a", "b"),
}  # fmt: skip


@pytest.mark.parametrize(("row", "prompt", "expected"), FORMS.values(), ids=FORMS)
def test_every_form_of_row_asks_something(tmp_path, row, prompt, expected):
    path = jsonl(tmp_path / "rows.jsonl", [row, row])
    (first, _) = questions.read_prompt_rows(make_dataset_config({"path": str(path)})).rows
    assert (first.prompt, first.expected) == (prompt, expected)


def test_empty_lines_are_counted_and_the_others_keep_their_numbers(tmp_path):
    path = tmp_path / "rows.txt"
    path.write_text("one\n\n \nfour\n", encoding="utf-8")
    found = questions.read_prompt_rows(make_dataset_config({"path": str(path)}))
    assert [row.where for row in found.rows] == [f"{path}:1", f"{path}:4"]
    assert found.notes == [f"{path}: 2 empty lines, passed over: 2, 3"]


def test_malformed_lines_are_named_or_left_out(luthier, tuned_run, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": \n{"prompt": 3}\n', encoding="utf-8")
    code, _, err = luthier("generate", tuned_run, path, "-o", tmp_path / "out.jsonl")
    assert code == 2 and f"{path}:2" in err and f"{path}:3" in err and "has 2 bad rows" in err
    found = questions.read_prompt_rows(
        make_dataset_config({"path": str(path), "on_bad_row": "drop"})
    )
    assert [row.where for row in found.rows] == [f"{path}:1"]
    assert [note.split(": ")[:2] for note in found.notes] == [
        [f"{path}:2", "left out"], [f"{path}:3", "left out"]
    ]  # fmt: skip


MISTAKES = {
    "no output": (["{run}", "{rows}"], "where do the replies go? Add -o replies.jsonl."),
    "no file": (["{run}"], "luthier generate: FILE is missing. Write: luthier generate MODEL FILE"),
    "nothing": ([], "luthier generate: MODEL and FILE is missing."),
    "no such file": (["{run}", "none.jsonl", "-o", "o"], "none.jsonl"),
    "no such model": (["./none", "{rows}", "-o", "o"], "model=none: there is no such folder"),
    "a word too many": (["{run}", "{rows}", "more", "-o", "o"], "what is 'more'?"),
    "a setting": (["{run}", "{rows}", "-o", "o", "temprature=1"], "Did you mean temperature?"),
    "a model's setting": (["{run}", "{rows}", "-o", "o", "model.devise=cpu"],
                          "model.devise: Did you mean model.device?"),
    "a device": (["{run}", "{rows}", "-o", "o", "model.device=tpu"], "model.device: input should"),
    "a dataset's setting": (["{run}", "{rows}", "-o", "o", "dataset.tpe=text"],
                            "Did you mean dataset.type?"),
    "a dataset's setting, renamed": (["{run}", "{rows}", "-o", "o", "dataset.shape=text"],
                                     "It is called dataset.type now."),
    "a number": (["{run}", "{rows}", "-o", "o", "--batch", "x"], "--batch x: write a whole number"),
    "packing": (["{run}", "{rows}", "-o", "o", "quantization=nf5"], "quantization=nf5: there are"),
}  # fmt: skip


@pytest.mark.parametrize(("words", "says"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_said_in_words(luthier, tuned_run, rows, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    code, out, err = luthier("generate", *(w.format(run=tuned_run, rows=rows) for w in words))
    assert (code, out) == (2, "") and says in err
    assert not (tmp_path / "o").exists()


def test_a_prompt_longer_than_the_context_is_named_by_its_line(luthier, tuned_run, tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"prompt": "x" * 200}])
    code, _, err = luthier(
        "generate", tuned_run, path, "-o", tmp_path / "o.jsonl", "model.device=cpu"
    )
    assert code == 2 and f"{path}:2: has 219 tokens, and the model reads 128" in err
