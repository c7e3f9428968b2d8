"""Callbacks of the user's own: made with their arguments, and every failure of theirs in words."""

import sys

import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState

from luthier.errors import UserError
from luthier.train.own_callbacks import make_own_callbacks

CODE = """
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

class Plain(TrainerCallback):
    def __init__(self, word="a"):
        self.word = word
    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = True
        return control

class Below(Plain):
    def on_log(self, args, state, control, **kwargs):
        super().on_log(args, state, control, **kwargs)

class Fails(TrainerCallback):
    def on_log(self, args, state, control, **kwargs):
        {}["absent"]

class Exits(TrainerCallback):
    def on_log(self, args, state, control, **kwargs):
        raise SystemExit

class Returns(TrainerCallback):
    def on_log(self, args, state, control, **kwargs):
        return True

class NotMade(TrainerCallback):
    def __init__(self):
        1 / 0

class HalfState(TrainerCallback, ExportableState):
    def state(self):
        return {"attributes": {}}

class NoJson(TrainerCallback, ExportableState):
    def state(self):
        return {"args": {}, "attributes": {"seen": {1, 2}}}

class Kept(TrainerCallback, ExportableState):
    def state(self):
        return {"args": {}, "attributes": {"seen": 3}}

class Other:
    pass
"""


@pytest.fixture(autouse=True)
def code(tmp_path, monkeypatch):
    """A file with classes in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "own_callbacks.py").write_text(CODE)


def make(name, arguments=None):
    path = f"python:own_callbacks.py:{name}"
    (callback,) = make_own_callbacks([{path: arguments} if arguments else path])
    return callback


def test_a_class_is_made_with_its_arguments_and_keeps_its_name_and_events():
    callback, control = make("Plain", {"word": "b"}), TrainerControl()
    assert isinstance(callback, TrainerCallback)
    assert (callback.word, type(callback).__name__) == ("b", "Plain")
    assert callback.on_step_end(None, TrainerState(), control) is control
    assert control.should_save
    assert make("Below").on_log(None, TrainerState(), control) is None
    kept = make("Kept")
    assert isinstance(kept, ExportableState) and kept.state()["attributes"] == {"seen": 3}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("NotMade", "trainer.callbacks: python:own_callbacks.py:NotMade failed: ZeroDivisionError"),
        ("HalfState", "state() must return {'args': {...}, 'attributes': {...}}"),
        ("NoJson", "holds its state() as JSON, and that cannot be: Object of type set is not"),
        ("Other", "is the class Other, and a class of transformers."),
        ("Absent", "has no function or class 'Absent'"),
    ],
)
def test_a_class_that_does_not_serve_is_refused_before_the_training(name, words):
    with pytest.raises(UserError) as caught:
        make(name)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Fails", "Fails: on_log failed at step 7: KeyError: 'absent' ("),
        ("Exits", "Exits: on_log failed at step 7: SystemExit: it ends the program"),
        ("Returns", "Returns: on_log returned a bool. Change `control` and return it, or return"),
    ],
)
def test_an_event_that_fails_is_named_with_its_step(name, words, tmp_path):
    with pytest.raises(UserError) as caught:
        make(name).on_log(None, TrainerState(global_step=7), TrainerControl())
    assert words in str(caught.value)
    assert name != "Fails" or f"{tmp_path / 'own_callbacks.py'}:" in str(caught.value)
