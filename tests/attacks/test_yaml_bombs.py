"""A few lines of YAML that stand for billions of values are refused in words within a second."""

import re
import time

import pytest
import yaml

from luthier.errors import UserError
from luthier.memory.sharding import read_sharding
from luthier.storage.typed_files import DamagedFileError, load_yaml, parse_yaml

LEVELS = range(1, 12)
LISTS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in LEVELS
)
MAPPINGS = "a0: &a0 {k: x}\n" + "".join(
    f"a{n}: &a{n} {{{', '.join(f'k{i}: *a{n - 1}' for i in range(9))}}}\n" for n in LEVELS
)
MERGES = "a0: &a0 {k: x}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in LEVELS
)
BOMBS = {
    "lists": LISTS,
    "mappings": MAPPINGS,
    "merges": MERGES,
    "keys": LISTS.replace("x", "1") + "? *a9\n: 1\n",
    "41,000 leaves": "a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]\n"
    "b: &b [*a, *a, *a, *a, *a, *a, *a, *a]\nc: &c [*b, *b, *b, *b, *b, *b, *b, *b]\n"
    "d: &d [*c, *c, *c, *c, *c, *c, *c, *c]\ne: [*d, *d, *d, *d, *d, *d, *d, *d]\n",
    "itself": "a: &a [*a]\n",
    "itself as a mapping": "a: &a {b: *a}\n",
    "depth": "a: " + "[" * 2000 + "]" * 2000 + "\n",
    "depth as mappings": "a: " + "{b: " * 2000 + "1" + "}" * 2000 + "\n",
    "depth by aliases": "a0: &a0 [1]\n"
    + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 300)),
}
SMALL = ("41,000 leaves",)
"""Not too much for a file of a run, which holds what the run resolved."""
WORDS = r"stands for more than [0-9,]+ values|within each other in it, more than 100 deep"


@pytest.mark.parametrize("name", BOMBS)
def test_a_recipe_is_refused_within_a_second(name, luthier, workplace):
    workplace("recipes/evil.yaml", f"# evil\n{BOMBS[name]}")
    luthier("train", "recipe=quickstart", "--cfg", "job")  # what is imported for the first time
    start = time.process_time()
    code, _, err = luthier("train", "recipe=evil")
    assert time.process_time() - start < 2  # a second, and what two busy cores add
    assert code == 2
    assert "evil.yaml" in err
    assert re.search(WORDS, err), err
    assert len(err) < 500


@pytest.mark.parametrize("name", BOMBS)
def test_an_option_of_a_group_is_refused(name, luthier, workplace):
    workplace("conf/lora/evil.yaml", BOMBS[name])
    code, _, err = luthier("train", "recipe=quickstart", "lora=evil")
    assert code == 2
    assert re.search(WORDS, err), err


@pytest.mark.parametrize("name", BOMBS)
def test_a_launch_file_is_refused(name, workplace):
    file = workplace("launch.yaml", BOMBS[name])
    with pytest.raises(UserError, match=WORDS):
        read_sharding(str(file))


@pytest.mark.parametrize(
    "name", [name for name in BOMBS if "plain" not in name and "41" not in name]
)
def test_a_file_of_a_run_is_refused(name, workplace):
    file = workplace("config.yaml", BOMBS[name])
    with pytest.raises(DamagedFileError, match=WORDS):
        load_yaml(file, dict)


@pytest.mark.parametrize("text", ["a: &a [1, 2]\nb: *a\n", "a: &a {b: 1}\nc: {<<: *a, d: 2}\n", ""])
def test_aliases_of_people_are_read(text):
    assert parse_yaml(text) == yaml.safe_load(text)
