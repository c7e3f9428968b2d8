"""Tools of the user's own: what is refused before anything is loaded."""

import pytest

from helpers.online_trainer import run_config
from helpers.tool_templates import TOOLS_FILE
from luthier.errors import UserError
from luthier.train.methods.tools import load_tools


def config_of(folder, *names, environment=None):
    (folder / "own.py").write_text(TOOLS_FILE)
    paths = [f"python:{folder / 'own.py'}:{name}" for name in names]
    environment = environment and f"python:{folder / 'own.py'}:{environment}"
    return run_config(folder, tools=paths, environment=environment)


@pytest.mark.parametrize(
    ("names", "environment", "text"),
    [
        (["undocumented"], None, r"undocumented \(.*own\.py:\d+\): .*no docstring"),
        (["untyped"], None, r"untyped \(.*own\.py:\d+\): .*type hint"),
        (["add", "add"], None, "two tools are called add"),
        ([], "add", "must be a class with a method `reset`"),
    ],
    ids=["no docstring", "no type hints", "one name twice", "no environment"],
)
def test_tools_that_cannot_be_shown_are_refused(tmp_path, names, environment, text):
    with pytest.raises(UserError, match=text):
        load_tools(config_of(tmp_path, *names, environment=environment))


def test_schemas_are_those_of_transformers(tmp_path):
    tools = load_tools(config_of(tmp_path, "add", environment="Counter"))
    assert [schema["function"]["name"] for schema in tools.schemas] == ["add", "count_up"]
    assert list(tools.schemas[1]["function"]["parameters"]["properties"]) == ["by"]
    assert load_tools(config_of(tmp_path)) is None
