"""The grammar of metrics, and each mistake in words."""

import os
import subprocess
import sys

import pytest
import yaml

from luthier.errors import UserError
from luthier.metrics import (
    Prediction,
    check_metrics,
    greater_is_better,
    parse_metrics,
    prepare_metrics,
    score_replies,
)


def test_a_list_of_names_and_settings_as_yaml_writes_it():
    given = yaml.safe_load(
        """
        - exact_match
        - regex:
            pattern: '#### (.+)'
            group: 1
        - {exact_match: {name: loose, ignore: [case, punctuation]}}
        - length:
        """
    )
    metrics = parse_metrics(given)
    assert [metric.name for metric in metrics] == ["exact_match", "regex", "loose", "length"]
    found = score_replies(metrics, [Prediction("#### A", "#### a"), Prediction("#### B", "#### B")])
    assert found.values == {"exact_match": 0.5, "regex": 0.5, "loose": 1, "length": 2}
    assert found.rows["regex"] == [0, 1]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["exact"], "there is no metric 'exact'. Did you mean exact_match? Built in: exact_match,"),
        (["rouge"], "Did you mean rouge1?"),
        ("exact_match", "'exact_match' is not a list. Write [exact_match]."),
        ([3], "3 is not a name, or a name with its settings"),
        ([None], "null is not a name"),
        ([{"regex": None, "pattern": "x"}], "has several keys. One entry is {regex: {key: value}}"),
        ([{"regex": "x"}], "regex: 'x' is not a mapping of settings to values."),
        (["regex"], "regex needs pattern: write {regex: {pattern: ...}}."),
        ([{"regex": {"patern": "x"}}], "regex has no setting 'patern'. Did you mean pattern?"),
        ([{"regex": {"pattern": "("}}], "regex: '(' is no regular expression: missing )"),
        ([{"regex": {"pattern": "(?P<one>a)", "group": "on"}}], "no group 'on'. Did you mean one?"),
        ([{"exact_match": {"ignore": ["cases"]}}], "'cases' is not an option. Did you mean case?"),
        ([{"bleu": {"tokenize": "13b"}}], "'13b' is not an option. Did you mean 13a?"),
        ([{"number": {"tolerance": -1}}], "number.tolerance: -1 does not fit"),
        (["length", {"length": {"unit": "characters"}}], "length stands 2 times"),
        ([{"length": {"name": "loss"}}], "loss is a number that the trainer logs"),
        (["python:score"], "'python:score' names no function or class. Write python:module.name"),
        (["python:no_such.score"], "there is no module no_such (looked in "),
        (["python:json.dumps2"], "json has no function or class 'dumps2'. Did you mean dumps?"),
    ],
    ids=["unknown", "family", "no list", "number", "null", "indentation", "settings", "missing",
         "unknown setting", "pattern", "group", "option in a list", "option", "range", "twice",
         "taken name", "no module", "unknown module", "unknown function"],
)  # fmt: skip
def test_mistakes(given, words):
    (mistake,) = check_metrics(given)
    assert mistake.key == "trainer.evaluation.metrics"
    assert words in mistake.text
    with pytest.raises(UserError) as caught:
        parse_metrics(given, "evaluate.metrics")
    assert str(caught.value) == f"evaluate.metrics: {mistake.text}"


def test_all_mistakes_are_told_at_once():
    assert len(check_metrics(["exact", "regex", {"length": {"unit": "pages"}}, "exact_match"])) == 3


def test_a_package_that_is_not_there_is_named_with_its_extra(tmp_path):
    # A process in which the package cannot be found, as on a machine without the extra.
    code = (
        "import sys; from importlib.machinery import PathFinder as F; find = F.find_spec\n"
        "F.find_spec = classmethod(lambda c, name, *a: "
        "None if name in ('sacrebleu', 'rouge_score', 'evaluate') else find(name, *a))\n"
        "from luthier.metrics import check_metrics\n"
        "print(*[m.text for m in check_metrics(['bleu', 'rougeL', 'evaluate:bertscore'])], sep='|')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().split("|") == [
        "bleu: sacrebleu is not installed. Install it (pip install 'luthier[metrics]').",
        "rougeL: rouge_score is not installed. Install it (pip install 'luthier[metrics]').",
        "evaluate:bertscore: evaluate is not installed. Install it (pip install evaluate).",
    ]


def test_nothing_heavy_is_imported_to_check(tmp_path):
    (tmp_path / "mine.py").write_text("print('imported')\ndef score(a, b, c): return 1\n")
    code = (
        "import sys; from luthier.metrics import check_metrics, parse_metrics\n"
        "given = ['exact_match', 'bleu', 'rougeL', 'macro_f1', 'python:mine.score']\n"
        "print(check_metrics(given), len(parse_metrics(given)))\n"
        "heavy = {'torch', 'numpy', 'sacrebleu', 'rouge_score', 'transformers', 'datasets'}\n"
        "print(heavy & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.split("\n")[:2] == ["[] 5", "set()"]


@pytest.mark.parametrize(
    ("name", "greater"),
    [("exact_match", True), ("json_f1/valid", True), ("score", False), ("score/part", False),
     ("words", False)],
)  # fmt: skip
def test_which_way_is_better(name, greater, module):
    module("mine", "def score(a, b, c): return 1\n")
    metrics = parse_metrics(
        ["exact_match", "json_f1", {"python:mine.score": {"greater_is_better": False}},
         {"length": {"name": "words", "greater_is_better": False}}]
    )  # fmt: skip
    assert greater_is_better(metrics, name) is greater


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("length", "neither good nor bad by itself. Say which way is better"),
        ("exact", "no metric 'exact' is measured. Did you mean exact_match?"),
    ],
)
def test_no_way_is_better(name, words):
    with pytest.raises(UserError, match=words):
        greater_is_better(parse_metrics(["exact_match", "length"]), name)


def test_no_replies_are_no_score():
    with pytest.raises(UserError, match="no replies to score"):
        score_replies(parse_metrics(["exact_match"]), [])


OWN = """
import numpy as np
def number(predictions, references, rows): return sum(len(row["words"]) for row in rows)
def mapping(predictions, references, rows): return {"mapping": 1, "half": np.float32(0.5)}
def each(predictions, references, rows, scale=1): return [scale * len(p) for p in predictions]
def array(predictions, references, rows): return np.array([1.0, 0.0])
def nan(predictions, references, rows): return float("nan")
def text(predictions, references, rows): return "good"
def few(predictions, references, rows): return [1.0]
def nothing(predictions, references, rows): return {}
def fails(predictions, references, rows): return rows[0]["absent"]
def two(predictions, references): return 1
late = None
"""


@pytest.mark.parametrize(
    ("entry", "values", "rows"),
    [
        ("python:pack.mine.number", {"number": 3}, {}),
        ("python:pack.mine.mapping", {"mapping": 1, "mapping/half": 0.5}, {}),
        ({"python:pack.mine.each": {"scale": 2}}, {"each": 3}, {"each": [2, 4]}),
        ({"python:pack.mine.each": {"name": "wide"}}, {"wide": 1.5}, {"wide": [1, 2]}),
        ("python:pack.mine.array", {"array": 0.5}, {"array": [1, 0]}),
    ],
    ids=["number", "mapping", "settings", "name", "array"],
)
def test_a_function_of_ones_own(entry, values, rows, module):
    module("pack.mine", OWN)
    metrics = parse_metrics([entry])
    prepare_metrics(metrics, ["x", "y"])
    replies = [Prediction("a", "x", {"words": [1, 2]}), Prediction("bc", "y", {"words": [3]})]
    found = score_replies(metrics, replies)
    assert (found.values, found.rows) == (values, rows)


MESSAGES = """
def thoughts(predictions, references, rows, *, reply_messages):
    return [float("reasoning_content" in message) for message in reply_messages]
def calls(predictions, references, rows, reply_messages=(), reference_messages=()):
    pairs = zip(reply_messages, reference_messages, strict=True)
    return [float(a.get("tool_calls") == b.get("tool_calls")) for a, b in pairs]
def given(predictions, references, rows, reply_messages): return len(reply_messages)
def words(predictions, references, rows, **settings): return len(settings)
"""


@pytest.mark.parametrize(
    ("entry", "values", "rows"),
    [
        ("python:mine.thoughts", {"thoughts": 0.5}, {"thoughts": [1, 0]}),
        ("python:mine.calls", {"calls": 0.5}, {"calls": [0, 1]}),
        ({"python:mine.given": {"reply_messages": "abc"}}, {"given": 3}, {}),
        ("python:mine.words", {"words": 0}, {}),
    ],
    ids=["reply messages", "both", "a setting of that name", "only what it names"],
)
def test_a_function_gets_the_messages_that_it_names(entry, values, rows, module):
    module("mine", MESSAGES)
    assert check_metrics([entry]) == []
    metrics = parse_metrics([entry])
    prepare_metrics(metrics, ["x"])
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    replies = [
        Prediction(
            "a", "x", message={"content": "a", "reasoning_content": "hm"},
            reference_message={"content": "", "tool_calls": [call]},
        ),
        # A turn that calls a tool: there are no words to compare with.
        Prediction(
            "", "", has_reference=False, message={"content": "", "tool_calls": [call]},
            reference_message={"content": "", "tool_calls": [call]},
        ),
    ]  # fmt: skip
    scores = score_replies(metrics, replies)
    if entry in ("python:mine.thoughts", "python:mine.calls"):
        assert (scores.values, scores.rows) == (values, rows)
    else:
        assert metrics[0].takes(replies[1]) is False
        assert scores.values == values


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("python:mine.nan", "metric nan: nan is nan, and must be a finite number."),
        ("python:mine.text", "metric text: text is 'good' (str). Return a number, a mapping"),
        ("python:mine.few", "metric few: few has 1 numbers for 2 replies."),
        ("python:mine.nothing", "metric nothing: it returned no numbers."),
        ("python:mine.fails", "metric fails: it failed: KeyError: 'absent' ("),
        ("python:mine.two", "python:mine.two takes (predictions, references), and is called with"),
        ({"python:mine.each": {"scal": 1}}, "got an unexpected keyword argument 'scal'"),
        ("python:mine.late", "python:mine.late is None, and nothing that can be called"),
    ],
    ids=["NaN", "text", "too few", "nothing", "raises", "arguments", "settings", "no function"],
)
def test_a_function_that_does_not_serve(entry, words, module):
    module("mine", OWN)
    with pytest.raises(UserError) as caught:
        metrics = parse_metrics([entry])
        prepare_metrics(metrics, ["x", "y"])
        score_replies(metrics, [Prediction("a", "x"), Prediction("b", "y")])
    assert words in str(caught.value)


def test_the_place_of_a_failure_is_in_the_users_own_file(module):
    module("mine", OWN)
    with pytest.raises(
        UserError, match=rf"mine\.py:{OWN.count(chr(10), 0, OWN.index('absent')) + 1}\)"
    ):
        score_replies(parse_metrics(["python:mine.fails"]), [Prediction("a", "x")])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import no_such_package\ndef score(a, b, c): ...", "No module named 'no_such_package' ("),
        ("def score(:", "broken.py, line 1: this is no valid Python"),
        ("import sys\nsys.exit('gone')\ndef score(a, b, c): ...", "ends the program (gone) ("),
        (
            "def scores(): ...\nif True:\n    x = 1",
            "has no function or class 'score'. Did you mean scores?",
        ),
    ],
    ids=["imports what is not there", "syntax", "exits", "only told when it runs"],
)
def test_a_module_that_cannot_be_imported(text, words, module):
    module("broken", text)
    with pytest.raises(UserError) as caught:
        prepare_metrics(parse_metrics(["python:broken.score"]), [])
    assert words in str(caught.value)


def test_a_module_is_not_run_to_see_what_it_holds(module):
    module("pack.__init__", "import sys\nsys.exit('this package must not run')")
    module("pack.mine", "'''words'''\nimport sys\nsys.exit(1)\ndef score(a, b, c): return 1")
    assert check_metrics(["python:pack.mine.score"]) == []
    (mistake,) = check_metrics(["python:pack.mine.scare"])
    assert "Did you mean score?" in mistake.text


HUB = """
import datasets
import evaluate
class Mine(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(description="", citation="", inputs_description="",
            features=datasets.Features({"predictions": text, "references": text}))
    def _compute(self, predictions, references, scale=1):
        same = [float(a == b) for a, b in zip(predictions, references)]
        return {"mine": scale * sum(same) / len(same), "each": same, "hashcode": "v1"}
"""


def test_a_metric_of_evaluate(module):
    pytest.importorskip("evaluate")
    module("mine.mine", HUB)
    metrics = parse_metrics([{"evaluate:./mine": {"scale": 2}}])
    prepare_metrics(metrics, ["a", "c"])
    found = score_replies(metrics, [Prediction("a", "a"), Prediction("b", "c")])
    assert found.values == {"mine": 1, "mine/each": 0.5}
    assert found.rows == {"mine/each": [1, 0]}
    with pytest.raises(UserError, match=r"metric mine: \./mine of evaluate failed: Type"):
        score_replies(parse_metrics([{"evaluate:./mine": {"scala": 2}}]), [Prediction("a", "a")])


def test_a_metric_of_evaluate_that_cannot_be_had():
    pytest.importorskip("evaluate")
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(UserError, match=r"cannot be loaded \(HF_HUB_OFFLINE is set\)"):
        prepare_metrics(parse_metrics(["evaluate:no_such_metric"]), ["a"])
