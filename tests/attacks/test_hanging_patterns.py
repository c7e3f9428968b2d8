"""No pattern that somebody writes hangs luthier: each search ends, or is stopped in words."""

import json
import re
import time

import pytest

from luthier import patterns
from luthier.data.filter import SearchTimeoutError, compile_filter
from luthier.errors import UserError
from luthier.metrics.metric import Prediction
from luthier.metrics.parse import parse_metrics
from luthier.metrics.rewards import FormatReward
from luthier.model.adapter_patterns import check_adapter_patterns
from luthier.model.model_files import read_adapter_config
from luthier.model.trainable import match_parameters

SLOW = {
    "plus of plus": r"^(a+)+$",
    "star of star": r"^(a*)*b",
    "alternatives": r"^(a|a)+$",
    "overlapping": r"^(a|aa)+$",
    "one or nothing": "(a?)" * 40 + "a" * 40,
    "three stars": r"^(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)=\1$",
    "words": r"^(\w+\s?)*$",
    "lookahead": r"^(?=(a+)+$)",
    "counted": r"^(a{1,30}){1,30}$",
    "many dots": r"(.*a){20}b",
    "backreference": r"^(a+)+\1b$",
    "conditional": r"^((a)?(?(2)a|b)+)+$",
}
TEXT = "a" * 60 + "!"
NAMES = [f"{'a' * 60}.layers.{n}.aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!" for n in range(3)]


@pytest.fixture(autouse=True)
def short_limits(monkeypatch):
    monkeypatch.setattr(patterns, "SEARCH_SECONDS", 0.1)
    monkeypatch.setattr(patterns, "NAMES_SECONDS", 0.5)


def ends(run):
    """Run what may be stopped in words; fail where it takes long."""
    start = time.process_time()
    try:
        run()
    except (SearchTimeoutError, UserError, TimeoutError) as error:
        assert "takes more than" in str(error)
    assert time.process_time() - start < 3


@pytest.mark.parametrize("name", SLOW)
def test_a_filter_ends(name):
    pattern = SLOW[name].replace("\\", "\\\\")
    filter_ = compile_filter(f"matches(prompt, '{pattern}')", "dataset.filter")
    ends(lambda: filter_({"prompt": TEXT}))


@pytest.mark.parametrize("name", SLOW)
def test_a_metric_ends(name):
    (metric,) = parse_metrics([{"regex": {"pattern": SLOW[name]}}])
    ends(lambda: metric.score([Prediction(TEXT, "a")]))


@pytest.mark.parametrize("name", SLOW)
def test_parameters_by_pattern_end(name):
    # Patterns of parameters begin anywhere in a name.
    ends(lambda: match_parameters("model.train", [f"{SLOW[name]}"], dict.fromkeys(NAMES)))


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize("name", SLOW)
def test_layers_of_an_adapter_by_pattern_end(name, key):
    ends(lambda: check_adapter_patterns("lora.", {key: SLOW[name]}, NAMES))


EVERYWHERE = r"(\w|\w\w|\.)+!"
"""A pattern that takes years on any name."""


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": EVERYWHERE},
        {"exclude_modules": EVERYWHERE},
        {"rank_pattern": {EVERYWHERE: 8}},
        {"alpha_pattern": {EVERYWHERE: 8}},
        {"layers_pattern": EVERYWHERE},
        {"layers_pattern": [EVERYWHERE]},
        {"modules_to_save": [EVERYWHERE]},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_the_adapter_of_somebody_else_is_refused(settings, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **settings}))
    with pytest.raises(UserError, match=rf"adapter_config.json: {next(iter(settings))}: .* takes"):
        read_adapter_config(tmp_path)


def test_the_patterns_of_people_are_left_alone(tmp_path):
    settings = {
        "target_modules": r".*\.(q|v)_proj",
        "rank_pattern": {r"^model\.layers\.\d+\.mlp\..*": 8},
        "layers_pattern": "layers",
        "modules_to_save": ["lm_head", "score"],
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **settings}))
    assert read_adapter_config(tmp_path) == {"peft_type": "LORA", **settings}


@pytest.mark.parametrize("method", ["search", "match", "fullmatch"])
@pytest.mark.parametrize("pattern", ["a", ".*b", r"(.*\.)?(b+)$", "a|b", "^", r".*\.é+"])
def test_names_are_those_of_re(pattern, method):
    names = ["a", "b", "x.b", "x.bb", "a.é", "", "ab"]
    expected = [name for name in names if getattr(re, method)(pattern, name)]
    assert patterns.match_names(pattern, names, method) == expected


@pytest.mark.parametrize("text", ["(", "(" * 5000 + ")" * 5000, "a{99999999999}", r"\p{L}"])
def test_no_pattern_is_said(text, luthier):
    with pytest.raises(ValueError, match="is no regular expression"):
        patterns.match_names(text, ["a"], "search")
    code, _, err = luthier("train", "recipe=quickstart", "lora=none", f"model.train=['{text}']")
    assert code == 2
    assert "is no regular expression" in err


@pytest.mark.parametrize("text", ["<a>" * 3000, "<a></a>" * 2000 + "x", "<a>" + "<" * 20000, ""])
def test_the_format_reward_ends(text):
    ends(lambda: FormatReward(name="format", tags=("a", "b")).of(text))


def test_a_glob_of_stars_ends(luthier, workplace):
    workplace("data/" + "a" * 100 + ".jsonl", "{}\n")
    start = time.process_time()
    code, _, err = luthier(
        "train", "recipe=quickstart", f"dataset.path=data/{'*a' * 40}b", "dry_run=true"
    )
    assert code == 2
    assert "matches no file" in err or "no file" in err
    assert time.process_time() - start < 20
