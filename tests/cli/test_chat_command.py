"""The chat in the terminal: what each line does, and what is seen of it."""

import io
import json

import pytest
from rich.console import Console

from helpers import adapter_runs as material
from helpers.vision_families import picture, save_vision_family
from luthier.cli.chat import ChatRepl
from luthier.infer import LLM
from luthier.terminal import printable


@pytest.fixture
def talk(tuned_llm):
    """A conversation on a page of its own; gives back what a line prints."""
    page = io.StringIO()
    console = Console(file=page, width=80)

    def start(other=None, **settings):
        made = ChatRepl(console, tuned_llm, other, {"max_new_tokens": 9} | settings, None)

        def take(line):
            page.seek(0)
            page.truncate()
            made.take(line)
            return page.getvalue()

        return made, take

    return start


def text_of(tuned_llm, messages, **settings):
    """The content of the reply: with the control tokens that a model without sense writes."""
    (reply,) = tuned_llm.replies([messages], **{"max_new_tokens": 9} | settings)
    return printable(reply.message["content"])


def test_a_reply_is_written_and_remembered(talk, tuned_llm):
    made, take = talk()
    first = take("abc")
    asked = [{"role": "user", "content": "abc"}]
    assert first.startswith(text_of(tuned_llm, asked) + "\n")
    assert "a second" in first
    said = [*made._chats[0].messages, {"role": "user", "content": "more"}]
    assert take("more").startswith(text_of(tuned_llm, said) + "\n")


def test_commands(talk, tuned_llm, tmp_path):
    made, take = talk()
    assert "nothing was said yet" in take("/retry")
    first = take("abc")
    assert take("/retry").split("\n")[0] == first.split("\n")[0]
    assert len(made._chats[0].turns) == 2
    assert "the conversation begins anew" in take("/system Be brief.")
    assert made._chats[0].messages == [{"role": "system", "content": "Be brief."}]
    assert "system prompt: Be brief." in take("/system")
    assert take("/set temperature=0.5 seed_=1").startswith("seed_: is not a setting")
    assert "max_new_tokens=4" in take("/set max_new_tokens=4")
    take("abc")
    assert "written" in take(f"/save {tmp_path / 'chat.jsonl'}")
    (row,) = (tmp_path / "chat.jsonl").read_text().splitlines()
    assert [m["role"] for m in json.loads(row)["messages"]] == ["system", "user", "assistant"]
    assert "/reset" in take("/help")
    assert "Ctrl-C stops a reply" in take("/stop")
    assert "there is no such command" in take("/rest")
    take("/system -")
    assert made._chats[0].messages == []


def test_a_question_that_is_too_long_ends_nothing(talk):
    made, take = talk()
    assert "the model reads 128 with its reply" in take("x" * 300)
    assert made._chats[0].turns == []
    assert "a second" in take("abc")


def test_base_and_tuned_side_by_side_each_with_its_own_past(talk, tuned_llm):
    made, take = talk(other=tuned_llm)
    page = take("abc")
    assert page.split()[:2] == ["base", "tuned"]
    asked = [{"role": "user", "content": "abc"}]
    with tuned_llm.as_base():
        base = tuned_llm.generate([asked], max_new_tokens=9)[0]
    tuned = tuned_llm.generate([asked], max_new_tokens=9)[0]
    assert [chat.turns[-1]["content"] for chat in made._chats] == [base, tuned]
    assert base != tuned


def test_ctrl_c_stops_the_reply_and_not_the_chat(talk, monkeypatch):
    made, take = talk()
    chat = made._chats[0]
    answer = chat._answer

    def interrupted(prompt, **given):
        for number, piece in enumerate(answer(prompt, **given)):
            if number == 2:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(chat, "_answer", interrupted)
    assert "stopped" in take("abc")
    assert [turn["role"] for turn in chat.turns] == ["user", "assistant"]
    monkeypatch.undo()
    assert "a second" in take("go on")


def test_control_characters_of_a_model_are_signs(luthier):
    assert printable("a\x1b[2Jb\r\n\tc\x9b") == "a␦[2Jb␦\n\tc␦"


def test_questions_come_through_a_pipe(luthier, tuned_run, tuned_llm, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("abc\n\n/reset\n"))
    code, out, _ = luthier("chat", tuned_run, "max_new_tokens=9", "model.device=cpu")
    assert code == 0
    assert out.startswith(text_of(tuned_llm, [{"role": "user", "content": "abc"}]) + "\n")
    assert "the conversation begins anew" in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "luthier chat: MODEL is missing."),
        (["./none"], "model=none: there is no such folder"),
        (["{tiny}", "--compare"], "is not tuned by a run here; it is a base."),
        (["{tiny}", "--base", "x"], "is a whole model and no adapter: leave out --base x"),
        (["{tiny}", "--tools", "no.json"], "--tools no.json: it cannot be read: [Errno 2] No such"),
        (["{tiny}", "--tools", "text.json"], "--tools text.json: the tools ('text.json')"),
        (["{tiny}", "--tools", "none.json"], "--tools none.json: it has no tools."),
        (["{tiny}", "--tools", "names.json"], "--tools names.json: an entry of 'names.json'"),
    ],
    ids=[
        "no model",
        "no such model",
        "nothing to compare",
        "a base of a base",
        "no file of tools",
        "tools that are no JSON",
        "no tools",
        "names of tools",
    ],
)
def test_a_mistake_is_said_in_words(luthier, base_model, tmp_path, words, says):
    (tmp_path / "text.json").write_text("{no", encoding="utf-8")
    (tmp_path / "none.json").write_text("[]", encoding="utf-8")
    (tmp_path / "names.json").write_text('["look_up"]', encoding="utf-8")
    code, out, err = luthier("chat", *(word.format(tiny=base_model) for word in words))
    assert (code, out) == (2, "") and says in err


def test_the_material_ends_some_replies(tuned_llm):
    finishes = {
        reply.finish for reply in tuned_llm.replies(material.questions(9), max_new_tokens=9)
    }
    assert finishes == {"stop", "length"}


def test_a_picture_goes_with_the_next_message_and_stays(tmp_path, tuned_llm):
    files = [tmp_path / "a picture.png", tmp_path / "b.png"]
    for number, file in enumerate(files):
        picture(40, 30, seed=number).save(file)
    page = io.StringIO()
    console = Console(file=page, width=80)
    folder = save_vision_family(tmp_path / "model", "gemma3")
    with LLM(str(folder), device="cpu", dtype="float32") as llm:
        talk = ChatRepl(console, llm, None, {"max_new_tokens": 4}, None)
        talk.add_image(str(files[0]))
        talk.take(f"/image {files[1]}")
        assert "40 x 30 pixels, which go with your next message" in page.getvalue()
        talk.take("What is it?")
        asked = [*({"type": "image", "image": str(file)} for file in files),
                 {"type": "text", "text": "What is it?"}]  # fmt: skip
        (reply,) = llm.replies([[{"role": "user", "content": asked}]], max_new_tokens=4)
        assert talk._chats[0].turns[-1] == reply.message
        talk.take("/retry")
        assert len(talk._chats[0].turns[0]["content"]) == 3
        talk.take("And now?")
        assert talk._chats[0].turns[2]["content"] == "And now?"
        talk.take(f"/save {tmp_path / 'chat.jsonl'}")
        talk.take("/image gone.png")
        assert "there is no file gone.png" in page.getvalue()
        talk.take("/image")
        assert "/image: which picture?" in page.getvalue()
    row = json.loads((tmp_path / "chat.jsonl").read_text())
    assert row["messages"][0]["content"] == asked
    talk = ChatRepl(console, tuned_llm, None, {}, None)
    talk.take(f"/image {files[1]}")
    assert "reads text alone, and no images" in page.getvalue()
