"""Settings that are fine one by one and wrong together, found before anything is loaded."""

import datetime
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from luthier.config import measured, trained
from luthier.config.methods import METHODS
from luthier.config.passthrough import settings
from luthier.errors import Mistake, value

EVAL_CHOICES = ("path", "split", "share", "count")
_AT_LEAST_ONE = {
    "trainer.args": (
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
    ),
}


def check_settings(resolved: dict[str, Any]) -> list[Mistake]:
    """Return what contradicts itself in a resolved config; a part of a wrong shape is passed over.

    The schema complains about shapes, so that every mistake is reported once.
    """
    parts = (
        trained.check_trained_parts,
        _evaluation,
        measured.check_measurements,
        _replies,
        _streaming,
        _training,
        _dates,
        _trackers,
        _ranges,
    )
    return [mistake for part in parts for mistake in part(resolved)]


def _evaluation(resolved: dict[str, Any]) -> Iterator[Mistake]:
    chosen = settings(resolved, "dataset.eval")
    given = [name for name in EVAL_CHOICES if chosen.get(name) is not None]
    if not given and not chosen.get("sets"):
        yield from _needs_heldout(resolved)
    if len(given) > 1:
        yield Mistake(
            "dataset.eval",
            f"{' and '.join(given)} are given, and only one can be. "
            f"Set the others to null: {' '.join(f'dataset.eval.{n}=null' for n in given[1:])}.",
        )
    elif given in (["path"], ["split"]):
        yield from _trained_on(given[0], chosen, settings(resolved, "dataset"))


def _trained_on(name: str, chosen: dict[str, Any], dataset: dict[str, Any]) -> Iterator[Mistake]:
    if chosen[name] == dataset.get(name):
        yield Mistake(
            f"dataset.eval.{name}",
            f"{value(chosen[name])} is what the model trains on. Hold out other rows, such as "
            f"dataset.eval.{name}=null dataset.eval.share=0.05.",
        )


def _needs_heldout(resolved: dict[str, Any]) -> Iterator[Mistake]:
    hold = "Hold rows out (dataset.eval.share=0.05)"
    args = settings(resolved, "trainer.args")
    if args.get("eval_strategy", "no") not in ("no", False, None):
        yield Mistake(
            "trainer.args.eval_strategy",
            f"{value(args['eval_strategy'])}, but no rows are held out. "
            f"{hold}, or set trainer.args.eval_strategy=no.",
        )
    if settings(resolved, "trainer.evaluation").get("metrics"):
        yield Mistake(
            "trainer.evaluation.metrics",
            f"need held-out rows, and there are none. {hold}, or set "
            "trainer.evaluation.metrics=[].",
        )


def _replies(resolved: dict[str, Any]) -> Iterator[Mistake]:
    name = settings(resolved, "trainer").get("method", "sft")
    method = METHODS.get(str(name))
    if method and not method.replies and settings(resolved, "trainer.evaluation").get("metrics"):
        yield Mistake(
            "trainer.evaluation.metrics",
            f"they score replies, and trainer.method={name} trains a model that writes none. Set "
            "it to []: what such a model says is measured without them.",
        )


def _streaming(resolved: dict[str, Any]) -> Iterator[Mistake]:
    name = settings(resolved, "trainer").get("method", "sft")
    method = METHODS.get(str(name))
    if settings(resolved, "dataset").get("streaming") is True and method and not method.streams:
        yield Mistake(
            "dataset.streaming",
            f"true, and trainer.method={name} needs all rows before it begins. Set it to false.",
        )


def _training(resolved: dict[str, Any]) -> Iterator[Mistake]:
    args = settings(resolved, "trainer.args")
    if args.get("bf16") is True and args.get("fp16") is True:
        yield Mistake("trainer.args", "bf16 and fp16 are both true. Keep one.")
    if args.get("load_best_model_at_end") is True:
        yield from _best_model("trainer.args.load_best_model_at_end", args)


def _best_model(key: str, args: dict[str, Any]) -> Iterator[Mistake]:
    evaluate, save = args.get("eval_strategy", "no"), args.get("save_strategy", "steps")
    if evaluate == "no":
        yield Mistake(key, "needs evaluations. Add trainer.args.eval_strategy=steps (or epoch).")
    elif save not in (evaluate, "best"):
        yield Mistake(
            key,
            f"needs a checkpoint at each evaluation: save_strategy is {value(save)}, eval_strategy "
            f"{value(evaluate)}. Set trainer.args.save_strategy={evaluate}.",
        )
    elif save == evaluate == "steps":
        yield from _checkpoint_steps(key, args)


def _checkpoint_steps(key: str, args: dict[str, Any]) -> Iterator[Mistake]:
    evaluate, save = (
        args.get("eval_steps") or args.get("logging_steps", 10),
        args.get("save_steps", 500),
    )
    whole = [isinstance(steps, int | float) and steps >= 1 for steps in (evaluate, save)]
    if all(whole) and save % evaluate != 0:
        yield Mistake(
            key,
            f"needs a checkpoint at an evaluation: save_steps ({save}) must be a multiple of "
            f"eval_steps ({evaluate}). Set trainer.args.save_steps={evaluate}.",
        )


def _dates(resolved: dict[str, Any]) -> Iterator[Mistake]:
    date = settings(resolved, "chat").get("date")
    if not isinstance(date, str):
        return
    try:
        right = datetime.date.fromisoformat(date).isoformat() == date
    except ValueError:
        right = False
    if not right:
        yield Mistake("chat.date", f"{value(date)} is not a date. Write YYYY-MM-DD.")


def _trackers(resolved: dict[str, Any]) -> Iterator[Mistake]:
    trackers = settings(resolved, "tracker").get("to")
    for name in trackers if isinstance(trackers, list) else []:
        if name in ("wandb", "tensorboard") and find_spec(name) is None:
            yield Mistake(
                "tracker",
                f"{name} is not installed. Install it (pip install 'luthier[{name}]'), "
                "or set tracker=none.",
            )


def _ranges(resolved: dict[str, Any]) -> Iterator[Mistake]:
    for key, names in _AT_LEAST_ONE.items():
        given = settings(resolved, key)
        for name in names:
            number = given.get(name)
            if isinstance(number, int | float) and number < 1:
                yield Mistake(f"{key}.{name}", f"{value(number)} is too small; the least is 1.")
