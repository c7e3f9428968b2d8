"""Rollouts of several turns: the ids that a model sampled stay, and tools' results are masked."""

import pytest

from helpers.preference_trainer import SPECIAL, say, tokenizer
from helpers.tool_templates import KEEPING, PLAIN, REWRITING, TOOLS_FILE, call
from luthier.chat import ChatEncoder
from luthier.errors import UserError
from luthier.python_code import load_python_object
from luthier.train.methods.rollouts import RolloutRunner, TurnEncoder
from luthier.train.methods.tools import ToolBox

END = 260 - len(SPECIAL) + 2
QUESTION = [say("user", "What is 1 + 2?")]


@pytest.fixture
def load(tmp_path):
    """What loads a function or a class of the file of tools."""
    (tmp_path / "own.py").write_text(TOOLS_FILE)
    return lambda name: load_python_object(f"python:{tmp_path / 'own.py'}:{name}")


def ids_of(text, end=True):
    """The ids of a text as the tokenizer spells it, and the stop token."""
    words = tokenizer()
    return words(text, add_special_tokens=False).input_ids + [258] * end


def make_runner(template, functions, environment=None, **settings):
    toolbox = ToolBox(functions, environment, "python:own.py:Counter")
    encoder = ChatEncoder(tokenizer(template), empty_replies="train")
    turns = TurnEncoder(encoder, toolbox.schemas)
    defaults = {"max_completion_length": 400, "max_turns": None, "time_limit": 5.0}
    return RolloutRunner(toolbox, turns, [258], **(defaults | settings))


def rows_of(runner, *prompts, **columns):
    encoder, tools = runner._turns.encoder, runner._turns.tools
    return [
        {"prompt": p, "prompt_ids": encoder.prompt(p, tools), "row_location": f"rows.jsonl:{n}"}
        | columns
        for n, p in enumerate(prompts, start=1)
    ]


class Script:
    """Stands for the model: writes what it is told to, and keeps what it was sampled from."""

    def __init__(self, *turns):
        self.replies, self.seen = list(turns), []

    def __call__(self, contexts):
        self.seen.append([list(ids) for ids in contexts])
        return [list(ids) for ids in self.replies.pop(0)], None


def complete(runner, script, rows):
    rollouts = runner.start(rows)
    runner.complete(rollouts, script)
    return rollouts


@pytest.mark.parametrize("template", [PLAIN, KEEPING], ids=["no reasoning", "reasoning stays"])
def test_the_ids_of_a_rollout_are_those_that_it_was_sampled_from(load, template):
    runner = make_runner(template, {"add": load("add")})
    first, second, last = ids_of(call("add", a=1, b=2)), ids_of(call("add", a=3, b=4)), ids_of("7")
    script = Script([first], [second], [last])
    (rollout,) = complete(runner, script, rows_of(runner, QUESTION))
    # Each turn was sampled from exactly the ids that the rollout has before it.
    whole, start = rollout.prompt_ids + rollout.ids, 0
    for (context,), reply in zip(script.seen, (first, second, last), strict=True):
        assert whole[: len(context)] == context
        assert whole[len(context) : len(context) + len(reply)] == reply
        start = len(context) + len(reply)
    assert start == len(whole)
    assert rollout.sampled_ids == first + second + last
    # Between them stands what the template writes, as a server would.
    words = tokenizer(template)
    history = [*QUESTION, *rollout.messages]
    tools = runner._turns.tools
    for turn, (context,) in zip((0, 2, 4), script.seen, strict=True):
        served = words.apply_chat_template(
            history[: turn + 1], tools=tools, add_generation_prompt=True, tokenize=True,
            return_dict=False,
        )  # fmt: skip
        assert context == served
    roles = [message["role"] for message in rollout.messages]
    assert roles == ["assistant", "tool", "assistant", "tool", "assistant"]
    assert [m["content"] for m in rollout.messages if m["role"] == "tool"] == ["3", "7"]


def test_another_spelling_of_the_same_text_stays(load):
    runner = make_runner(PLAIN, {"add": load("add")})
    runner._turns.encoder = ChatEncoder(_with_word(PLAIN), empty_replies="train")
    text = call("add", a=1, b=2)
    spelled = ids_of(text)  # letter by letter, where the tokenizer has a token for the name
    assert spelled != [*runner._turns.encoder.tokenizer(text).input_ids, 258]
    (rollout,) = complete(runner, Script([spelled], [ids_of("3")]), rows_of(runner, QUESTION))
    assert rollout.ids[: len(spelled)] == spelled
    assert rollout.end == "" and rollout.calls == 1


def _with_word(template):
    words = tokenizer(template)
    words.add_tokens(["add"])
    return words


def test_several_calls_in_a_turn_and_rows_of_other_lengths(load):
    runner = make_runner(PLAIN, {"add": load("add"), "add_later": load("add_later")})
    both = ids_of(call("add", a=1, b=1) + call("add_later", a=2, b=2) + call("add", a=3, b=3))
    script = Script([both, ids_of("5")], [ids_of("done")])
    with_calls, without = complete(
        runner, script, rows_of(runner, QUESTION, [say("user", "hello")])
    )
    results = [m["content"] for m in with_calls.messages if m["role"] == "tool"]
    assert results == ["2", '{"sum": 4}', "6"]
    assert without.messages == [{"role": "assistant", "content": "5"}]
    assert [len(contexts) for contexts in script.seen] == [2, 1]


@pytest.mark.parametrize(
    ("name", "arguments", "error", "printed"),
    [
        ("gone", {}, "Tool gone not found. There are: fail, sleep.", ""),
        ("fail", {"b": 1}, "fail: missing a required argument: 'a'", ""),
        ("fail", {"a": 1}, "no luck", "RuntimeError: no luck"),
        ("sleep", {"a": 1}, "it took longer than 0.2 s", "sleep failed"),
    ],
    ids=["no such tool", "bad arguments", "it raises", "it never returns"],
)
def test_a_call_that_fails_gives_an_error_to_read(load, capsys, name, arguments, error, printed):
    tools = {"fail": load("fail"), "sleep": load("sleep")}
    runner = make_runner(PLAIN, tools, time_limit=0.2)
    script = Script([ids_of(call(name, **arguments))], [ids_of("I see")])
    (rollout,) = complete(runner, script, rows_of(runner, QUESTION))
    assert rollout.messages[1]["content"] == f'{{"error": "{error}"}}'
    assert (rollout.calls, rollout.failures, rollout.end) == (1, 1, "")
    said = capsys.readouterr().out.replace("\n", "")
    assert (
        (printed in said and "rows.jsonl:1" in said and "own.py:" in said) if printed else not said
    )


CALL = len(ids_of(call("add", a=1, b=2)))


@pytest.mark.parametrize(
    ("replies", "longest", "end", "kept"),
    [
        ([ids_of(call("add", a=1, b=2)[:30], end=False)], 30, "cut", 30),
        ([ids_of(call("add", a=1, b=2))], CALL + 4, "no room", CALL),
        ([ids_of(call("add", a=1, b=2)), ids_of("x" * 80, end=False)], 150, "cut", 150),
    ],
    ids=["in the middle of a call", "before a result", "behind a result"],
)
def test_a_completion_that_is_too_long(load, replies, longest, end, kept):
    runner = make_runner(PLAIN, {"add": load("add")}, max_completion_length=longest)
    script = Script(*[[reply] for reply in replies])
    (rollout,) = complete(runner, script, rows_of(runner, QUESTION))
    assert (rollout.end, len(rollout.ids)) == (end, kept)
    assert len(rollout.is_sampled) == len(rollout.logps) == kept
    assert rollout.messages[-1]["role"] == "assistant"


def test_turns_with_calls_are_limited(load):
    runner = make_runner(PLAIN, {"add": load("add")}, max_turns=1)
    again = ids_of(call("add", a=1, b=2))
    (rollout,) = complete(runner, Script([again], [again]), rows_of(runner, QUESTION))
    assert (rollout.end, rollout.calls) == ("turns", 1)


def test_environments_begin_anew_with_each_row(load):
    Counter = load("Counter")
    runner = make_runner(PLAIN, {}, Counter)
    up = ids_of(call("count_up", by=3))
    script = Script([up, up], [ids_of("ok"), ids_of("ok")])
    rows = rows_of(runner, QUESTION, QUESTION)
    rows = [row | {"goal": goal} for row, goal in zip(rows, (3, 4), strict=True)]
    rollouts = complete(runner, script, rows)
    assert [rollout.environment.get_reward() for rollout in rollouts] == [1.0, 0.0]
    assert rollouts[0].prompt[-1]["content"].endswith("Goal: 3.")
    encoder, tools = runner._turns.encoder, runner._turns.tools
    assert rollouts[1].prompt_ids == encoder.prompt(rollouts[1].prompt, tools)
    assert rollouts[0].messages[1]["content"] == "at 3"
    again = runner.start(rows)
    assert again[0].environment is rollouts[0].environment
    assert (again[0].environment.resets, again[0].environment.count) == (2, 0)


def test_a_row_without_what_its_environment_needs_is_named(load):
    runner = make_runner(PLAIN, {}, load("Counter"))
    with pytest.raises(UserError, match=r"Counter\.reset needs goal"):
        runner.start(rows_of(runner, QUESTION))


@pytest.mark.parametrize("template", [PLAIN, KEEPING], ids=["no reasoning", "reasoning stays"])
def test_a_template_that_goes_on_is_taken(load, template):
    make_runner(template, {"add": load("add")})._turns.check_template([258])


def test_a_template_that_rewrites_history_is_refused(load):
    turns = make_runner(REWRITING, {"add": load("add")})._turns
    with pytest.raises(UserError, match="does not go on from the model's own tokens") as refused:
        turns.check_template([258])
    assert "<think>1</think>" in str(refused.value)


def test_history_that_is_rewritten_all_the_same_ends_the_rollout(load, capsys):
    runner = make_runner(REWRITING, {"add": load("add")})
    thought = ids_of("<think>hm</think>" + call("add", a=1, b=2))
    (rollout,) = complete(runner, Script([thought]), rows_of(runner, QUESTION))
    assert (rollout.end, rollout.ids) == ("rewritten", thought)
    assert "does not go on" in capsys.readouterr().out


@pytest.mark.parametrize("template", [PLAIN, KEEPING], ids=["no reasoning", "reasoning stays"])
def test_a_rollout_as_a_row_of_sft_trains_what_the_model_wrote(load, template):
    """Several calls in a turn and their results: the same ids, and the same ones train."""
    runner = make_runner(template, {"add": load("add")})
    both = ids_of(call("add", a=1, b=2) + call("add", a=3, b=4))
    script = Script([both], [ids_of("3 and 7")])
    (rollout,) = complete(runner, script, rows_of(runner, QUESTION))
    encoder, tools = runner._turns.encoder, runner._turns.tools
    (row,) = encoder.encode([*QUESTION, *rollout.messages], tools)
    whole = rollout.prompt_ids + rollout.ids
    rest = row.input_ids[len(whole) :]
    assert row.input_ids == whole + rest
    assert tokenizer().decode(rest) == "\n"  # behind the last stop token, and does not train
    trained = [label != -100 for label in row.labels[: len(whole)]]
    assert set(row.labels[len(whole) :]) == {-100}
    assert trained == [False] * len(rollout.prompt_ids) + list(map(bool, rollout.is_sampled))


def test_rows_of_their_own_variables_go_on_with_them(load):
    template = "{{ style }}" + PLAIN
    runner = make_runner(template, {"add": load("add")})
    encoder, tools = runner._turns.encoder, runner._turns.tools
    (row,) = rows_of(runner, QUESTION)
    variables = {"style": "short"}
    row |= {
        "template_variables": variables,
        "prompt_ids": encoder.prompt(QUESTION, tools, variables),
    }
    script = Script([ids_of(call("add", a=1, b=2))], [ids_of("3")])
    (rollout,) = complete(runner, script, [row])
    assert rollout.end == ""
    assert script.seen[1][0] == encoder.prompt([*QUESTION, *rollout.messages[:2]], tools, variables)
