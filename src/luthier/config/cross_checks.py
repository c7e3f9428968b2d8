"""Settings that are fine one by one and wrong together, found before anything is loaded."""

import datetime
import math
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from luthier.config.code_settings import CODE_SETTINGS, check_code_settings, read_code_entries
from luthier.config.library_fields import read_class_fields
from luthier.config.library_settings import LoraSettings, QuantizationSettings, TrainerArgs
from luthier.config.methods import BASE_METHOD, METHODS, OWN_BASES, base_method, check_adapter
from luthier.config.passthrough import mapping_at
from luthier.errors import (
    Mistake,
    UserError,
    format_override,
    format_value,
    nearest_option,
    suggest_options,
)
from luthier.python_code import (
    PYTHON_FORMS,
    check_python_path,
    is_python_path,
    read_class_constant,
)

if TYPE_CHECKING:
    from luthier.metrics import Metric


# What of a model may train: adapters, quantized weights and frozen parts against each other.


def _check_trained_weights(resolved: dict[str, Any]) -> Iterator[Mistake]:
    """What contradicts itself in the groups `quantization` and `lora`, and in the model's parts."""
    yield from _quantization(resolved)
    yield from _adapter(resolved)
    yield from _patterns(resolved)


def _quantization(resolved: dict[str, Any]) -> Iterator[Mistake]:
    quantization = QuantizationSettings(mapping_at(resolved, "quantization"))
    switches = quantization.switches
    if len(switches) > 1:
        yield Mistake(
            "quantization", "load_in_4bit and load_in_8bit are both true. Keep one, set one false."
        )
    if quantization.dequantize is True:
        if others := [name for name in quantization if name != "dequantize"]:
            text = f"whole weights take no {others[0]}. Keep one of the two."
            yield Mistake("quantization.dequantize", text)
    elif quantization.is_enabled and not switches:
        yield Mistake(
            "quantization",
            "neither load_in_4bit nor load_in_8bit is true. Choose quantization=nf4, int8 or none.",
        )
    if switches and not mapping_at(resolved, "lora"):
        yield Mistake(
            "quantization",
            f"{switches[0]} with full fine-tuning: quantized weights cannot be trained. "
            "Add lora=default (QLoRA), or quantization=none to train the weights themselves.",
        )


def _adapter(resolved: dict[str, Any]) -> Iterator[Mistake]:
    lora = LoraSettings(mapping_at(resolved, "lora"))
    if not lora.is_enabled:
        return
    yield from check_adapter(lora, QuantizationSettings(mapping_at(resolved, "quantization")).bits)
    ratio = lora.plus_ratio
    if isinstance(ratio, int | float) and ratio <= 0:
        yield Mistake("lora.plus_ratio", f"{format_value(ratio)} is too small; 16 is usual.")
    # OFT's rank may be 0: then the size of its blocks is given.
    ranks = ("lora_alpha",) if lora.method == "oft" else ("r", "lora_alpha")
    for name in (*ranks, "experts"):
        number = lora.get(name)
        if isinstance(number, bool):
            continue
        if isinstance(number, int | float) and number < 1:
            yield Mistake(f"lora.{name}", f"{format_value(number)} is too small; the least is 1.")
    dropout = lora.lora_dropout
    if isinstance(dropout, int | float) and not 0 <= dropout < 1:
        yield Mistake(
            "lora.lora_dropout", f"{format_value(dropout)} must be at least 0 and less than 1."
        )


def _patterns(resolved: dict[str, Any]) -> Iterator[Mistake]:
    model, lora = mapping_at(resolved, "model"), mapping_at(resolved, "lora")
    for name in ("train", "freeze"):
        setting = model.get(name)
        patterns = setting if isinstance(setting, list) else []
        if patterns and lora:
            text = "is for full fine-tuning (lora=none); beside an adapter all weights are frozen. "
            yield Mistake(f"model.{name}", f"{text}Whole layers train with lora.modules_to_save.")
        for pattern in patterns:
            try:
                _check_syntax(str(pattern))
            except ValueError as error:
                yield Mistake(f"model.{name}", f"{format_value(pattern)} {error}.")


# What a config measures, rewards and learns from: mistakes known before anything is loaded.

_KEY = "trainer.evaluation.metrics"
_REWARDS = "trainer.rewards"


def _check_measurements(resolved: dict[str, Any]) -> Iterator[Mistake]:
    """What is wrong with metrics, rewards and what is done with them; imports nothing heavy."""
    evaluation = mapping_at(resolved, "trainer.evaluation")
    args = TrainerArgs(mapping_at(resolved, "trainer.args"))
    sets = mapping_at(resolved, "dataset.eval.sets")
    wrong = list(_metrics(evaluation, sets))
    yield from wrong
    yield from _rewards(resolved)
    yield from _tools(resolved)
    yield from _teacher(resolved)
    yield from _evaluations(evaluation, args)
    if not wrong and isinstance(args.metric_for_best_model, str):
        method = str(mapping_at(resolved, "trainer").get("method", "sft"))
        yield from _best(evaluation, args, sets, method)


def find_best_metric(
    name: str, evaluation: Mapping[str, Any], sets: Mapping[str, Any]
) -> tuple[str, "list[Metric]"] | None:
    """The metric of replies that `metric_for_best_model` names, and those of its evaluation set.

    None where it names something else, such as a loss. `evaluation` is the config's
    `trainer.evaluation`, `sets` its `dataset.eval.sets`.
    """
    metrics_by_set = evaluation.get("sets") or {}
    if not evaluation.get("metrics") and not any(metrics_by_set.values()):
        return None
    from luthier.metrics import parse_metrics

    for label in ("", *sets):
        metrics = parse_metrics(metrics_by_set.get(label, evaluation.get("metrics") or []))
        bare = name.removeprefix("eval_").removeprefix(f"{label}_" if label else "")
        if any(bare == metric.name or bare.startswith(f"{metric.name}/") for metric in metrics):
            return bare, metrics
    return None


def _metrics(evaluation: dict[str, Any], sets: dict[str, Any]) -> Iterator[Mistake]:
    metrics_by_set = evaluation.get("sets")
    named = metrics_by_set if isinstance(metrics_by_set, dict) else {}
    for name in named:
        if name not in sets:
            yield Mistake(
                f"trainer.evaluation.sets.{name}",
                "there is no evaluation set of this name. "
                f"{suggest_options(str(name), map(str, sets))} They are named under "
                "dataset.eval.sets.",
            )
    lists = {_KEY: evaluation.get("metrics")}
    lists |= {f"trainer.evaluation.sets.{name}": metric_list for name, metric_list in named.items()}
    for key, metric_list in lists.items():
        if isinstance(metric_list, list) and metric_list:
            from luthier.metrics import check_metrics

            yield from _joined(check_metrics(metric_list, key))


def _rewards(resolved: dict[str, Any]) -> Iterator[Mistake]:
    trainer = mapping_at(resolved, "trainer")
    method, rewards = str(trainer.get("method", "sft")), trainer.get("rewards") or []
    facts = METHODS.get(base_method(method))
    if facts is None or not isinstance(rewards, list):
        return
    if facts.uses_rewards and not rewards and not trainer.get("environment"):
        yield Mistake(
            _REWARDS,
            f"trainer.method={method} needs at least one, such as "
            f"{format_override(_REWARDS, ['exact_match'])} or "
            f"{format_override(_REWARDS, [{'length': {'max': 300}}])} (luthier docs metrics).",
        )
    elif rewards and not facts.uses_rewards:
        takers = " or ".join(
            f"trainer={name}" for name, other in METHODS.items() if other.uses_rewards
        )
        yield Mistake(
            _REWARDS,
            f"trainer.method={method} trains without rewards. Remove them, or take {takers}.",
        )
    elif rewards:
        from luthier.metrics.rewards import check_rewards

        yield from _joined(check_rewards(rewards))


def _tools(resolved: dict[str, Any]) -> Iterator[Mistake]:
    """What a method that calls no tools is given all the same."""
    trainer = mapping_at(resolved, "trainer")
    method = str(trainer.get("method", "sft"))
    facts = METHODS.get(base_method(method))
    if facts is None or facts.uses_rewards:
        return
    takers = " or ".join(f"trainer={name}" for name, each in METHODS.items() if each.uses_rewards)
    for key in ("tools", "environment"):
        if trainer.get(key):
            text = f"trainer.method={method} calls no tools. Remove it, or take {takers}."
            yield Mistake(f"trainer.{key}", text)


def _teacher(resolved: dict[str, Any]) -> Iterator[Mistake]:
    trainer = mapping_at(resolved, "trainer")
    method, teacher = str(trainer.get("method", "sft")), trainer.get("teacher")
    facts = METHODS.get(base_method(method))
    if facts is None or facts.uses_teacher == (teacher is not None):
        return
    if facts.uses_teacher:
        text = f"trainer.method={method} needs a model to learn from. Add trainer.teacher=PATH."
    else:
        text = f"trainer.method={method} has no teacher. Remove it, or take trainer=distill."
    yield Mistake("trainer.teacher", text)


def _joined(mistakes: list[Mistake]) -> Iterator[Mistake]:
    """All that is wrong with one list, as one mistake: of each key only the first is shown."""
    if mistakes:
        yield Mistake(mistakes[0].key, "\n    ".join(mistake.text for mistake in mistakes))


def _evaluations(evaluation: dict[str, Any], args: TrainerArgs) -> Iterator[Mistake]:
    if args.evaluates:
        return
    advice = "and there are none while training. Add trainer.args.eval_strategy=steps (or epoch)."
    if evaluation.get("when") == "evaluations":
        yield Mistake("trainer.evaluation.when", f"rows are answered at evaluations, {advice}")
    if evaluation.get("patience") is not None:
        yield Mistake("trainer.evaluation.patience", f"it counts evaluations, {advice}")


_TRL_MEASURES = ("loss", "mean_token_accuracy", "entropy", "num_tokens", "aux_loss", "runtime")
"""What TRL's SFTTrainer measures at an evaluation."""
_MEASURES = {"sft": _TRL_MEASURES, "pretrain": _TRL_MEASURES, "seq2seq": ("loss", "runtime")}
"""Method -> what its evaluations measure besides the metrics of replies; others measure more."""


def _best(
    evaluation: dict[str, Any], args: TrainerArgs, sets: dict[str, Any], method: str
) -> Iterator[Mistake]:
    from luthier.metrics import greater_is_better

    name = str(args.metric_for_best_model)
    best = find_best_metric(name, evaluation, sets)
    if best is None:
        yield from _unmeasured(name, evaluation, sets, method)
        return
    if evaluation.get("when") != "evaluations":
        yield Mistake(
            "trainer.args.metric_for_best_model",
            f"{name} is measured before and after training only. "
            "Set trainer.evaluation.when=evaluations.",
        )
    if args.greater_is_better is None:
        try:
            greater_is_better(best[1], best[0])
        except UserError as error:
            yield Mistake(
                "trainer.args.metric_for_best_model", str(error).removeprefix(f"{_KEY}: ")
            )


def _unmeasured(
    name: str, evaluation: dict[str, Any], sets: dict[str, Any], method: str
) -> Iterator[Mistake]:
    """The mistake of choosing by what no evaluation measures, where all that is measured is known.

    The trainer finds it at the first evaluation, when the model is loaded.
    """
    from luthier.metrics import parse_metrics

    metrics_by_set = evaluation.get("sets") or {}
    measured = []
    for label in ("", *sets):
        metrics = parse_metrics(metrics_by_set.get(label, evaluation.get("metrics") or []))
        names = [*_MEASURES.get(method, ("loss",)), *(metric.name for metric in metrics)]
        measured += [f"{label}_{measure}" if label else measure for measure in names]
    bare = name.removeprefix("eval_")
    # Of the other methods only what is nearly a name is known to be none.
    if bare not in measured and (method in _MEASURES or nearest_option(bare, measured)):
        yield Mistake(
            "trainer.args.metric_for_best_model",
            f"{format_value(name)} is not measured. {suggest_options(bare, measured)} Metrics of "
            "replies are set in trainer.evaluation.metrics.",
        )


HELD_OUT_KEYS = ("path", "split", "share", "count")


def check_combinations(resolved: dict[str, Any]) -> list[Mistake]:
    """Return what contradicts itself in a resolved config; a part of a wrong shape is passed over.

    The schema complains about shapes, so that every mistake is reported once.
    """
    checks = (
        _check_trained_weights,
        _evaluation,
        _check_measurements,
        _replies,
        _streaming,
        _training,
        _optimizer,
        _loss,
        _loader,
        _own_method,
        _dates,
        _trackers,
        check_code_settings,
    )
    return [mistake for check in checks for mistake in check(resolved)]


def _evaluation(resolved: dict[str, Any]) -> Iterator[Mistake]:
    chosen = mapping_at(resolved, "dataset.eval")
    held_out_keys = [name for name in HELD_OUT_KEYS if chosen.get(name) is not None]
    if not held_out_keys and not chosen.get("sets"):
        yield from _needs_heldout(resolved)
    if len(held_out_keys) > 1:
        others = " ".join(f"dataset.eval.{key}=null" for key in held_out_keys[1:])
        yield Mistake(
            "dataset.eval",
            f"{' and '.join(held_out_keys)} are given, and only one can be. "
            f"Set the others to null: {others}.",
        )
    elif held_out_keys in (["path"], ["split"]):
        yield from _trained_on(held_out_keys[0], chosen, mapping_at(resolved, "dataset"))


def _trained_on(name: str, chosen: dict[str, Any], dataset: dict[str, Any]) -> Iterator[Mistake]:
    if chosen[name] == dataset.get(name):
        yield Mistake(
            f"dataset.eval.{name}",
            f"{format_value(chosen[name])} is what the model trains on. Hold out other rows, "
            f"such as dataset.eval.{name}=null dataset.eval.share=0.05.",
        )


def _needs_heldout(resolved: dict[str, Any]) -> Iterator[Mistake]:
    hold = "Hold rows out (dataset.eval.share=0.05)"
    args = TrainerArgs(mapping_at(resolved, "trainer.args"))
    if args.evaluates:
        yield Mistake(
            "trainer.args.eval_strategy",
            f"{format_value(args.eval_strategy)}, but no rows are held out. "
            f"{hold}, or set trainer.args.eval_strategy=no.",
        )
    if mapping_at(resolved, "trainer.evaluation").get("metrics"):
        yield Mistake(
            "trainer.evaluation.metrics",
            f"need held-out rows, and there are none. {hold}, or set {format_override(_KEY, [])}.",
        )


def _replies(resolved: dict[str, Any]) -> Iterator[Mistake]:
    name = mapping_at(resolved, "trainer").get("method", "sft")
    method = METHODS.get(base_method(str(name)))
    if (
        method
        and not method.writes_replies
        and mapping_at(resolved, "trainer.evaluation").get("metrics")
    ):
        yield Mistake(
            "trainer.evaluation.metrics",
            f"they score replies, and trainer.method={name} trains a model that writes none. Set "
            "it to []: what such a model says is measured without them.",
        )


def _streaming(resolved: dict[str, Any]) -> Iterator[Mistake]:
    name = mapping_at(resolved, "trainer").get("method", "sft")
    method = METHODS.get(base_method(str(name)))
    if (
        mapping_at(resolved, "dataset").get("streaming") is True
        and method
        and not method.can_stream
    ):
        yield Mistake(
            "dataset.streaming",
            f"true, and trainer.method={name} needs all rows before it begins. Set it to false.",
        )


ROUTER_LOSS_OF_A_BATCH = (
    "the router's loss depends on how all tokens of a step are spread over the experts, so it is "
    "right where one process takes a step in one batch alone.\n"
    "Set trainer.args.gradient_accumulation_steps=1 and train in one process, or leave it out."
)

PROFILED_STEPS = range(3, 7)
"""The steps that `trainer.profile` looks at. The first one builds caches and chooses kernels, and
the second one is the profiler's own warm-up."""


def profile_needs_steps(steps: int) -> str:
    """Return what is wrong with `trainer.profile` in a training of so few steps."""
    first, last = PROFILED_STEPS[0], PROFILED_STEPS[-1]
    return (
        f"steps {first} to {last} are profiled, and the run has {steps}. Set "
        f"trainer.args.max_steps={last} (or more), or leave the profile out."
    )


def _training(resolved: dict[str, Any]) -> Iterator[Mistake]:
    args = TrainerArgs(mapping_at(resolved, "trainer.args"))
    steps = args.get("max_steps")
    is_profiled = mapping_at(resolved, "trainer").get("profile") is True
    # Without max_steps the number follows from the rows, which are counted later.
    if is_profiled and isinstance(steps, int) and 0 < steps < PROFILED_STEPS[-1]:
        yield Mistake("trainer.profile", profile_needs_steps(steps))
    if args.bf16 is True and args.fp16 is True:
        yield Mistake("trainer.args", "bf16 and fp16 are both true. Keep one.")
    if args.load_best_model_at_end is True:
        yield from _best_model("trainer.args.load_best_model_at_end", args)
    if args.router_aux_loss_coef and args.gradient_accumulation_steps != 1:
        yield Mistake("trainer.args.router_aux_loss_coef", ROUTER_LOSS_OF_A_BATCH)


def _loader(resolved: dict[str, Any]) -> Iterator[Mistake]:
    """What does not go with a model that a function of the user's own loads."""
    model, key = mapping_at(resolved, "model"), "model.loader"
    if model.get("loader") is None:
        return
    method = str(mapping_at(resolved, "trainer").get("method", "sft"))
    facts = METHODS.get(base_method(method))
    if facts is not None and facts.task != "CAUSAL_LM":
        text = (
            f"trainer.method={method} needs a head or an encoder, which transformers' own classes"
        )
        yield Mistake(key, f"{text} make. A model of your own trains with methods that write.")
    if mapping_at(resolved, "quantization"):
        text = "remove it, with quantization=none: weights are packed while transformers loads them"
        yield Mistake("quantization", f"{text}, and model.loader loads these.")
    if model.get("kwargs"):
        text = (
            "goes to from_pretrained of transformers, which model.loader takes the place of. Give"
        )
        argument = format_override(key, {"python:my.py:load": {"name": 1}})
        yield Mistake("model.kwargs", f"{text} the function its own arguments: {argument}.")


def _own_method(resolved: dict[str, Any]) -> Iterator[Mistake]:
    """What keeps a class of the user's own from being a method."""
    trainer, key = mapping_at(resolved, "trainer"), "trainer.method"
    method = str(trainer.get("method", "sft"))
    base = CODE_SETTINGS[key].base
    if not is_python_path(method) or check_python_path(method, base=base) is not None:
        return
    if base_method(method) == method:
        value = read_class_constant(method, BASE_METHOD)
        problem = f"has no {BASE_METHOD}"
        if value is not None:
            problem = f"has {BASE_METHOD} = {format_value(value)}"
        yield Mistake(
            key,
            f"{method} {problem}. Write {BASE_METHOD} = {OWN_BASES[0]!r} into the class, or "
            f"{OWN_BASES[1]!r}: the method whose rows, settings and checks it has.",
        )
    if trainer.get("loss") is not None:
        text = f"{method} has a loss of its own, or leaves the method's. Remove one of the two."
        yield Mistake("trainer.loss", text)


_TOKEN_METHODS = ("sft", "pretrain")


def _loss(resolved: dict[str, Any]) -> Iterator[Mistake]:
    trainer = mapping_at(resolved, "trainer")
    key, method = "trainer.loss", trainer.get("method", "sft")
    if trainer.get("loss") is None:
        return
    if base_method(str(method)) not in _TOKEN_METHODS:
        text = f"trainer.method={method} has a loss that is none of single tokens. Remove it, or "
        yield Mistake(key, f"{text}take trainer=sft or trainer=pretrain.")
    if mapping_at(resolved, "trainer.args").get("loss_type") not in (None, "nll"):
        loss_type = mapping_at(resolved, "trainer.args")["loss_type"]
        text = f"trainer.args.loss_type={loss_type} is another loss. Remove one of the two."
        yield Mistake(key, text)
    if mapping_at(resolved, "dataset").get("streaming") is True:
        text = "rows of a stream come without their columns. Set dataset.streaming=false."
        yield Mistake(key, text)


_GROUP_SETTINGS = ("match", "learning_rate", "weight_decay")


def _optimizer(resolved: dict[str, Any]) -> Iterator[Mistake]:
    settings = mapping_at(resolved, "trainer.optimizer")
    name, groups = settings.get("name"), settings.get("groups") or []
    args = mapping_at(resolved, "trainer.args")
    key = "trainer.optimizer.name"
    if name is not None and args.get("optim") not in (None, name):
        text = f"{format_value(name)}, and trainer.args.optim is {args['optim']}. Keep one of them"
        yield Mistake(key, f"{text}: ~trainer.args.optim removes the other.")
    if isinstance(name, str) and not is_python_path(name):
        optim = read_class_fields("transformers", "training_args.py", "TrainingArguments") or {}
        options = ("muon", *optim["optim"].choices) if "optim" in optim else ()
        if options and name not in options:
            text = f"{format_value(name)} is not an option. {suggest_options(name, options)}"
            yield Mistake(key, f"{text} A function of your own is {PYTHON_FORMS}.")
    if name == "muon" and mapping_at(resolved, "lora"):
        text = "muon is for the matrices of hidden layers, and beside an adapter none of them "
        yield Mistake(key, f"{text}trains. Use another optimizer, or lora=none.")
    if name == "muon" and args.get("optim_args"):
        yield Mistake("trainer.args.optim_args", "muon does not read them. Remove them.")
    if groups and read_code_entries(name):
        text = "the function of trainer.optimizer.name decides the groups. Remove one of the two."
        yield Mistake("trainer.optimizer.groups", text)
    for number, group in enumerate(groups if isinstance(groups, list) else []):
        if isinstance(group, dict):
            yield from _parameter_group(f"trainer.optimizer.groups[{number}]", group)


def _check_syntax(pattern: str) -> None:
    # It brings subprocess, and few configs have a pattern.
    from luthier.patterns import check_syntax

    check_syntax(pattern)


def _parameter_group(key: str, group: dict[str, Any]) -> Iterator[Mistake]:
    """What is wrong with the settings of weights that have rates of their own."""
    unknown = [name for name in group if name not in _GROUP_SETTINGS]
    if unknown:
        hint = suggest_options(str(unknown[0]), _GROUP_SETTINGS)
        yield Mistake(key, f"there is no setting {unknown[0]}. {hint}")
        return
    pattern = group.get("match")

    try:
        if not isinstance(pattern, str) or not pattern:
            raise ValueError("is no regular expression for names of parameters")
        _check_syntax(pattern)
    except ValueError as error:
        yield Mistake(f"{key}.match", f"{format_value(pattern)} {error}.")
    rates = [name for name in _GROUP_SETTINGS[1:] if group.get(name) is not None]
    if not rates:
        text = "it has neither a learning_rate nor a weight_decay of its own. Set one."
        yield Mistake(key, text)
    for name in rates:
        try:
            rate = float(group[name])  # YAML reads 1e-4 as text
        except (TypeError, ValueError):
            rate = math.nan
        if not 0 <= rate < math.inf:
            yield Mistake(f"{key}.{name}", "it must be a number, 0 or more.")


def _best_model(key: str, args: TrainerArgs) -> Iterator[Mistake]:
    evaluate, save = args.eval_strategy, args.save_strategy
    if evaluate == "no":
        yield Mistake(key, "needs evaluations. Add trainer.args.eval_strategy=steps (or epoch).")
    elif save not in (evaluate, "best"):
        yield Mistake(
            key,
            f"needs a checkpoint at each evaluation: save_strategy is {format_value(save)}, "
            f"eval_strategy {format_value(evaluate)}. Set trainer.args.save_strategy={evaluate}.",
        )
    elif save == evaluate == "steps":
        yield from _checkpoint_steps(key, args)


def _checkpoint_steps(key: str, args: TrainerArgs) -> Iterator[Mistake]:
    evaluate, save = args.eval_steps or args.logging_steps, args.save_steps
    are_step_counts = [isinstance(steps, int | float) and steps >= 1 for steps in (evaluate, save)]
    if all(are_step_counts) and save % evaluate != 0:
        yield Mistake(
            key,
            f"needs a checkpoint at an evaluation: save_steps ({save}) must be a multiple of "
            f"eval_steps ({evaluate}). Set trainer.args.save_steps={evaluate}.",
        )


def _dates(resolved: dict[str, Any]) -> Iterator[Mistake]:
    date = mapping_at(resolved, "chat").get("date")
    if not isinstance(date, str):
        return
    try:
        right = datetime.date.fromisoformat(date).isoformat() == date
    except ValueError:
        right = False
    if not right:
        yield Mistake("chat.date", f"{format_value(date)} is not a date. Write YYYY-MM-DD.")


def _trackers(resolved: dict[str, Any]) -> Iterator[Mistake]:
    trackers = mapping_at(resolved, "tracker").get("to")
    for name in trackers if isinstance(trackers, list) else []:
        if name == "tensorboard" and find_spec(name) is None:
            yield Mistake(
                "tracker",
                f"{name} is not installed. Install it (pip install 'luthier[{name}]'), "
                "or set tracker=none.",
            )
