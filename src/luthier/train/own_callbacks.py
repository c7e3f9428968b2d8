"""Callbacks of the user's own, `trainer.callbacks`: made, and their failures in words."""

import functools
import json
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl
from transformers.trainer_callback import ExportableState

from luthier.config.code_settings import CodeEntry, read_code_entries
from luthier.errors import UserError
from luthier.python_code import describe_exception, load_python_object

KEY = "trainer.callbacks"

_EVENTS = tuple(name for name in vars(TrainerCallback) if name.startswith("on_"))


def make_own_callbacks(setting: list[Any]) -> list[TrainerCallback]:
    """Return an instance of each class that `trainer.callbacks` names, with its arguments.

    What one of them raises, at whatever event, becomes a UserError with the callback, the step and
    its own line. Raises UserError for a class that is none of `transformers.TrainerCallback`, that
    cannot be made, or whose `state()` a checkpoint cannot hold.
    """
    return [_make_callback(entry) for entry in read_code_entries(setting)]


def _make_callback(entry: CodeEntry) -> TrainerCallback:
    where = f"{KEY}: {entry.path}"
    try:
        callback_class = load_python_object(entry.path, entry.arguments, base=TrainerCallback)
    except UserError as error:
        raise UserError(f"{KEY}: {error}") from error
    try:
        callback: TrainerCallback = _guard_events(callback_class, where)(**entry.arguments)
        state = callback.state() if isinstance(callback, ExportableState) else None
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # the user's code fails with whatever it likes
        raise UserError(f"{where} failed: {describe_exception(error)}") from error
    if state is not None:
        _check_state(state, where)
    return callback


def _check_state(state: Any, where: str) -> None:
    """Refuse a state of which nothing could be restored, before the first checkpoint holds it."""
    is_whole = isinstance(state, dict) and {"args", "attributes"} <= state.keys()
    if not is_whole or not isinstance(state["attributes"], dict):
        raise UserError(
            f"{where}: state() must return {{'args': {{...}}, 'attributes': {{...}}}}, the "
            "arguments that make the callback and the attributes that a checkpoint restores."
        )
    try:
        json.dumps(state)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{where}: a checkpoint holds its state() as JSON, and that cannot be: {error}."
        ) from error


def _guard_events(callback_class: type[TrainerCallback], where: str) -> type[TrainerCallback]:
    """Return a class of the same name whose events fail in words.

    A class and not a wrapper: transformers knows a callback with a state by its class, and makes
    it anew from that where `restore_callback_states_from_checkpoint` is set.
    """
    events = {
        event: _guard_event(event, getattr(callback_class, event), where)
        for event in _EVENTS
        if getattr(callback_class, event) is not getattr(TrainerCallback, event)
    }
    names = {
        "__module__": callback_class.__module__,
        "__qualname__": callback_class.__qualname__,
        "__doc__": callback_class.__doc__,
    }
    return type(callback_class.__name__, (callback_class,), {**names, **events})


def _guard_event(event: str, method: Callable[..., Any], where: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def guarded(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        try:
            returned = method(self, args, state, control, **kwargs)
        except UserError:
            raise
        except (Exception, SystemExit) as error:  # the user's code fails with whatever it likes
            raise UserError(
                f"{where}: {event} failed at step {state.global_step}: {describe_exception(error)}"
            ) from error
        # Anything else would take the place of the trainer's control, and fail there.
        if returned is not None and not isinstance(returned, TrainerControl):
            raise UserError(
                f"{where}: {event} returned a {type(returned).__name__}. Change `control` and "
                "return it, or return nothing."
            )
        return returned

    return guarded
