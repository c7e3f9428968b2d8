"""What is composed without Hydra is what Hydra composes, and what is ordinary needs no Hydra."""

import subprocess
import sys

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hypothesis import given
from hypothesis import strategies as st

from luthier.config.compose import _read_simple, compose_config, resolve_config
from luthier.config.recipes import list_options, list_recipes
from luthier.config.schema import GROUPS

Q = "recipe=quickstart"
OPTIONS = [(group, option) for group in GROUPS for option in list_options(group)]
SETTINGS = ["trainer.args.learning_rate=1e-4", "chat.max_length=null", "dataset.eval.count=3"]


def same_as_hydra(*words):
    """Compose both ways and return whether the direct way needed no Hydra."""
    direct, hydra = compose_config(list(words)), compose_config(list(words), with_hydra=True)
    assert direct.mistakes == hydra.mistakes
    values = resolve_config(direct)
    assert values == resolve_config(hydra)
    assert ordered(values) == ordered(resolve_config(hydra))
    if direct.values is not None:
        # A choice of Hydra's own that is null by default is left out there or here.
        ours = {group: option for group, option in direct.choices.items() if option}
        theirs = {group: option for group, option in hydra.choices.items() if option}
        assert ours == {group: o for group, o in theirs.items() if not group.startswith("hydra")}
        assert direct.files() == hydra.files()
    return direct.values is not None


def ordered(value):
    return [(k, ordered(v)) for k, v in value.items()] if isinstance(value, dict) else None


@pytest.mark.parametrize("recipe", [recipe.name for recipe in list_recipes()])
def test_a_recipe(recipe):
    assert same_as_hydra(f"recipe={recipe}")


@pytest.mark.parametrize("group, option", OPTIONS, ids=["=".join(pair) for pair in OPTIONS])
def test_an_option(group, option):
    assert same_as_hydra("model=hub", "dataset=files", f"{group}={option}")
    assert same_as_hydra(Q, f"{group}={option}", *SETTINGS)


ORDINARY = {
    "nothing": [],
    "lists": [Q, "lora.target_modules=[q_proj, v_proj]", "model.train=[1,x,null]"],
    "new keys": [Q, "x.y.z=3", "lora.new=true"],
    "a mapping": [Q, "model.kwargs={a: 1, b: {c: 2}}"],
    "text in quotes": [Q, 'dataset.path="a b"'],
    "another trainer on a recipe": ["recipe=tiny_tools", "trainer=dpo"],
    "group of a recipe off": [Q, "lora=none", "debug=fast", "tracker=wandb"],
    "heir": ["recipe=heir"],
    "recipe of a sweep": ["recipe=sweep"],
    "key that stands twice": ["recipe=twice"],
    "heir with a group chosen": ["recipe=heir", "lora=small"],
}
FOR_HYDRA = {
    "environment": [Q, "model.revision=${oc.env:NAME,x}"],
    "added key": [Q, "+lora.x=3"],
    "removed key": [Q, "~lora.r"],
    "setting of a sweep": [Q, "hydra.sweeper.x=3"],
    "interpolation in a recipe": ["recipe=uses"],
    "option with a defaults list": [Q, "lora=mine"],
    "group over a value": [Q, "seed.x=3"],
}
FILES = {
    "recipes/parent.yaml": "defaults: [override /lora: dora]\nlora: {r: 3}\n"
    "chat: {date: 2026-01-02}",
    "recipes/other.yaml": "seed: 1e1\nlora: {lora_alpha: 1}\nchat: {max_length: 5}",
    "recipes/heir.yaml": "defaults: [parent, _self_, other, override /trainer: dpo]\n"
    "chat: {max_length: 7}\nmodel: {path: x, kwargs: {a: .5, b: 1_000, c: 0x1F, d: no, e: ~}}",
    "recipes/uses.yaml": "defaults: [quickstart]\nseed: ${oc.env:NO_SUCH_NAME,3}",
    "recipes/sweep.yaml": "defaults: [quickstart]\nhydra: {sweeper: {params: {seed: '1,2'}}}",
    "recipes/twice.yaml": "defaults: [quickstart]\nseed: 1\nseed: 2",
    "conf/lora/mine.yaml": "defaults: [small]\nr: 5",
}


@pytest.mark.parametrize("words", ORDINARY.values(), ids=ORDINARY)
def test_an_ordinary_config(words, workplace):
    for place, text in FILES.items():
        workplace(place, text)
    assert same_as_hydra(*words)


@pytest.mark.parametrize("words", FOR_HYDRA.values(), ids=FOR_HYDRA)
def test_what_only_hydra_composes(words, workplace):
    for place, text in FILES.items():
        workplace(place, text)
    assert not same_as_hydra(*words)


@given(st.text(alphabet="ab1207.eE+-_/,[] \"'{}:~$nulltrueinfaNx\\", max_size=12))
def test_a_simple_value_is_what_hydra_reads(text):
    line = f"x.y={text}"
    simple = _read_simple(line)
    if simple is None:
        return
    try:
        override = OverridesParser.create().parse_override(line)
    except HydraException as error:
        raise AssertionError(f"{line} is no override") from error
    assert repr(override.value()) == repr(simple.value)
    assert not override.is_sweep_override()


@pytest.mark.parametrize("typed", ["a.b=3", "a=1e-4", "a=[x,1, y/z]", "lora=none", "a=./x.jsonl"])
def test_a_simple_override_needs_no_parser(typed):
    assert _read_simple(typed)


def test_a_mistake_imports_neither_hydra_nor_omegaconf():
    code = (
        "import sys\nfrom luthier.cli.train import main, train\n"
        "typed = ['lora.rr=3', 'seed=x', 'lora.target_modules=[q_proj,v_proj]']\n"
        "assert main(train, ['recipe=quickstart', *typed]) == 2\n"
        "heavy = {'torch', 'hydra', 'omegaconf', 'antlr4', 'numpy', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
