"""The names that are read from a library's source are the names that the library has."""

import dataclasses
import inspect

import pytest

from luthier.config import library_fields
from luthier.config.library_fields import FieldType
from luthier.config.methods import METHODS
from luthier.config.passthrough import PASS_THROUGH_KEYS, fit_value

SFT = ("trl", "trainer/sft_config.py", "SFTConfig")
LORA = ("peft", "tuners/lora/config.py", "LoraConfig")
BNB = ("transformers", "utils/quantization_config.py", "BitsAndBytesConfig")


def test_the_names_are_those_of_the_real_classes():
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig
    from trl import SFTConfig

    for source, real in ((SFT, SFTConfig), (LORA, LoraConfig)):
        named = {field.name for field in dataclasses.fields(real) if field.init}
        assert set(library_fields.read_class_fields(*source)) == named
    parameters = set(inspect.signature(BitsAndBytesConfig.__init__).parameters)
    assert set(library_fields.read_parameters(*BNB)) == parameters - {"self", "kwargs"}


def test_the_options_are_those_of_the_real_classes():
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    kinds = library_fields.read_class_fields(*SFT)
    assert set(kinds["optim"].choices) == {member.value for member in OptimizerNames}
    assert set(kinds["lr_scheduler_type"].choices) == {member.value for member in SchedulerType}


@pytest.mark.parametrize("library", PASS_THROUGH_KEYS, ids=lambda library: library.key)
def test_what_luthier_keeps_are_real_settings(library):
    if library.source is None:
        return
    read = (
        library_fields.read_parameters if library.is_function else library_fields.read_class_fields
    )
    known = read(*library.source)
    if library.key == "trainer.args":
        # Each method has arguments of its own.
        known = {name for method in METHODS.values() for name in read(*method.config)}
    assert set(library.refused_settings) | set(library.choices) <= set(known)


@pytest.mark.parametrize(
    "source", [("no_such_package", "a.py", "A"), ("trl", "no.py", "A"), (*SFT[:2], "No")]
)
def test_a_source_that_is_not_there_is_not_known(source):
    assert library_fields.read_class_fields(*source) is None
    assert library_fields.read_parameters(*source) is None


def test_what_another_version_of_the_reader_kept_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path))

    def read():
        library_fields._read_or_load.cache_clear()
        return library_fields.read_class_fields(*SFT)["packing"].owner

    assert read() == "trl.SFTConfig"
    (kept,) = (tmp_path / "library_fields").iterdir()
    kept.write_text(kept.read_text().replace("trl.SFTConfig", "trl.Other"))
    assert read() == "trl.Other"
    monkeypatch.setattr(library_fields, "_READER_CHECKSUM", 0)
    assert read() == "trl.SFTConfig"
    library_fields._read_or_load.cache_clear()


def kind(*types, choices=()):
    return FieldType(frozenset(types), choices)


FITS = {
    "int": (3, kind("int"), 3),
    "int for float": (3, kind("float"), 3),
    "float without a fraction": (3.0, kind("int"), 3),
    "text that is a number": ("1e-4", kind("float"), 1e-4),
    "text that is a whole number": ("1e3", kind("int"), 1000),
    "text": ("x", kind("str"), "x"),
    "number-like text for text": ("1e-4", kind("str", "float"), "1e-4"),
    "true": (True, kind("bool"), True),
    "null": (None, kind("none", "int"), None),
    "list": ([1], kind("list"), [1]),
    "dict": ({"a": 1}, kind("dict"), {"a": 1}),
    "anything": (object, kind("any"), object),
    "option": ("a", kind(choices=("a", "b")), "a"),
    "false for no": (False, kind(choices=("no", "b")), "no"),
}


@pytest.mark.parametrize("given, expected, value", FITS.values(), ids=FITS)
def test_a_value_fits(given, expected, value):
    got, complaint = fit_value(given, expected)
    assert complaint is None
    assert got == value and type(got) is type(value)


DOES_NOT = {
    "fraction": (2.5, kind("int"), "2.5 is not a whole number."),
    "text for a number": ("abc", kind("int", "float"), "'abc' is not a number."),
    "true for a number": (True, kind("int"), "true is not a whole number."),
    "number for text": (3, kind("str", "none"), "3 is not text or null."),
    "null": (None, kind("bool"), "null is not true or false."),
    "list": ([1], kind("int"), "[1] is not a whole number."),
    "option": (
        "stps",
        kind(choices=("steps", "no")),
        "'stps' is not an option. Did you mean steps?",
    ),
    "number for an option": (3, kind(choices=("a", "b")), "3 is not one of a, b."),
}


@pytest.mark.parametrize("given, expected, words", DOES_NOT.values(), ids=DOES_NOT)
def test_a_value_does_not_fit(given, expected, words):
    assert fit_value(given, expected)[1].startswith(words)
