"""Files read with their types: values as they stand there, or an error with file and key."""

import math
from dataclasses import dataclass

import pytest
from pydantic import BaseModel, ConfigDict

from luthier.storage.typed_files import (
    DamagedFileError,
    has_entry,
    load_json,
    load_json_lines,
    load_yaml,
)


class Part(BaseModel):
    model_config = ConfigDict(extra="allow")

    name: str
    size: int = 0


class Whole(BaseModel):
    model_config = ConfigDict(extra="forbid")

    parts: list[Part] = []
    rate: float | None = None
    template: str | dict[str, str] = ""


@dataclass
class Point:
    x: float


READ = {
    "what a schema names": ('{"rate": 0.5}', Whole, {"rate": 0.5}),
    "a whole number for a number": ('{"rate": 1}', Whole, {"rate": 1}),
    "keys that it does not": ('{"name": "a", "more": [1]}', Part, {"name": "a", "more": [1]}),
    "a dataclass": ('{"x": 2}', Point, {"x": 2}),
    "null where it may be": ("null", Whole | None, None),
}


@pytest.mark.parametrize("what", READ)
def test_a_value_is_returned_as_it_stands_there(tmp_path, what):
    text, schema, value = READ[what]
    (tmp_path / "a.json").write_text(text)
    assert load_json(tmp_path / "a.json", schema) == value


def test_numbers_that_json_does_not_have_are_read(tmp_path):
    (tmp_path / "a.json").write_text('{"rate": NaN}')
    assert math.isnan(load_json(tmp_path / "a.json", Whole)["rate"])


REFUSED = {
    "text for a number": ('{"rate": "1"}', "rate must be a number, and is '1'."),
    "true for a number": ('{"rate": true}', "rate must be a number, and is true."),
    "a missing key": ('{"parts": [{}]}', "parts.0.name is missing."),
    "a key too many": ('{"pars": []}', "pars is none of its keys."),
    "a wrong entry of a list": (
        '{"parts": [{"name": "a"}, {"name": "b", "size": 0.5}]}', "parts.1.size must be",
    ),
    "none of several types": ('{"template": 5}', "template must be text, and is 5."),
    "no mapping": ("[]", "it must be a mapping, and is []."),
    "control characters": ('{"rate": "\\u001b[2J"}', r"and is '\x1b[2J'."),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("load", [load_json, load_yaml], ids=["JSON", "YAML"])
def test_a_wrong_value_is_named_by_its_key(tmp_path, load, what):
    text, problem = REFUSED[what]
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(DamagedFileError) as error:
        load(file, Whole, "Mend it.")
    first, advice = str(error.value).splitlines()
    assert first.startswith(f"{file}: ")
    assert problem in first
    assert advice == "Mend it."


def test_what_is_not_there_is_none_and_no_rows(tmp_path):
    file = tmp_path / "a.json"
    assert load_json(file, Whole) is None
    assert load_yaml(file, Whole) is None
    assert load_json_lines(file, Part) == []
    assert not has_entry(file)
    file.symlink_to("nowhere")
    assert has_entry(file)


def test_the_lines_of_a_file_and_the_rest_of_a_line(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"name": "a"}\n\n{"name": "b"}\n{"name": "c')
    assert [row["name"] for row in load_json_lines(file, Part)] == ["a", "b"]
    file.write_text('{"name": "a"}\n{"name": 1}\n')
    with pytest.raises(DamagedFileError, match=r"a\.jsonl:2: name must be text, and is 1"):
        load_json_lines(file, Part)
