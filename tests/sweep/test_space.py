"""What varies: Hydra's sweep grammar, typed and in YAML, and what is wrong with it."""

import pytest

from luthier.sweep import space

Q = "recipe=quickstart"

VALUES = {
    "values with commas": ("lora.r=8,16,32", ("8", "16", "32")),
    "small numbers": ("trainer.args.learning_rate=1e-4,3e-5", ("0.0001", "3e-05")),
    "choice of texts": ("chat.train_on=choice('all','last')", ("all", "last")),
    "texts with spaces": ("dataset.system='be kind','be brief'", ("'be kind'", "'be brief'")),
    "choice of lists": ("model.freeze=choice([a],[a,b])", ("[a]", "[a,b]")),
    "options of a group": ("lora=default,small", ("default", "small")),
    "a range without its end": ("seed=range(1,8,3)", ("1", "4", "7")),
    "a range of parts": ("lora.lora_dropout=range(0.0,0.3,0.1)", ("0", "0.1", "0.2")),
    "sorted": ("lora.r=sort(32,8,16)", ("8", "16", "32")),
    "options that fit a pattern": ("model=glob(smol*)", ("smollm2_135m", "smollm2_1_7b")),
    "a pattern with an exception": ("model=glob(smol*,exclude=*7b)", ("smollm2_135m",)),
    "a key with a plus": ("+lora.r=8,16", ("8", "16")),
}


@pytest.mark.parametrize("typed, values", VALUES.values(), ids=VALUES)
def test_values(typed, values):
    found, mistakes = space.read_space([Q, typed], {})
    assert mistakes == []
    assert found.fixed == (Q,)
    assert [axis.values for axis in found.axes] == [values]


def test_an_interval_has_bounds_and_a_scale():
    found, _ = space.read_space(["a=interval(0.1,0.5)", "b=tag(log,int(interval(1,64)))"], {})
    a, b = found.axes
    assert (a.low, a.high, a.log, a.whole, a.is_interval) == (0.1, 0.5, False, False, True)
    assert (b.low, b.high, b.log, b.whole, b.is_interval) == (1, 64, True, True, True)
    assert b.ends() == ("1", "25", "64")
    assert found.size == float("inf")


def test_yaml_gives_axes_and_what_is_typed_wins():
    params = {
        "lora.r": "choice(8,16)",
        "trainer": {"args": {"warmup_steps": [0, 5], "learning_rate": "interval(1e-5,1e-3)"}},
        "chat.train_on": ["all", "last"],
        "seed": 3,
    }
    found, mistakes = space.read_space([Q, "lora.r=32,64"], params)
    assert mistakes == []
    assert {axis.key: axis.values for axis in found.axes} == {
        "lora.r": ("32", "64"),
        "trainer.args.warmup_steps": ("0", "5"),
        "trainer.args.learning_rate": (),
        "chat.train_on": ("all", "last"),
    }
    assert found.fixed == (Q, "seed=3")


def test_a_typed_value_turns_an_axis_of_yaml_off():
    found, _ = space.read_space(["lora.r=8"], {"lora.r": [16, 32]})
    assert found.axes == ()
    assert found.fixed == ("lora.r=8",)


WRONG = {
    "no values": (["seed=range(1,1)"], {}, "holds no value"),
    "an empty list": ([], {"lora.r": []}, "the list is empty"),
    "a value twice": (["seed=1,2,1"], {}, "1 stands there twice"),
    "several folders": (["output_dir=a,b"], {}, "a sweep has one output_dir"),
    "several sweepers": (["hydra/sweeper=basic,random"], {}, "a sweep has one hydra/sweeper"),
    "a group without such options": (["lora=glob(z*)"], {}, "no option of lora fits. Options: ada"),
    "a pattern for no group": (["lora.r=glob(*)"], {}, "glob() lists the options of a group"),
    "an unknown tag": (["a=tag(lg,interval(1,2))"], {}, "The only tag is log"),
    "bounds the wrong way": (["a=interval(2,1)"], {}, "first bound must be less"),
    "a logarithm of nothing": (["a=tag(log,interval(0,1))"], {}, "begins above 0"),
    "another order each time": (["a=shuffle(1,2,3)"], {}, "another order at each start"),
    "values of what is taken away": (["~lora=a,b"], {}, "takes a key away"),
    "half a choice in YAML": ([], {"lora.r": "choice(1"}, "cannot be read"),
}


@pytest.mark.parametrize("lines, params, said", WRONG.values(), ids=WRONG)
def test_what_is_wrong(lines, params, said):
    _, mistakes = space.read_space(lines, params)
    assert len(mistakes) == 1
    assert said in mistakes[0].text


def test_a_mistake_in_yaml_names_its_place():
    _, mistakes = space.read_space([], {"lora": {"r": "interval(2,1)"}})
    assert mistakes[0].key == "hydra.sweeper.params.lora.r"
