"""What to change when a run does not fit, each with the memory that it would take then."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from luthier.config.schema import RunConfig
from luthier.memory.optimizers import find_optimizer
from luthier.memory.plan import USUAL_GPU_COUNTS, MemoryPlan, plan_memory
from luthier.memory.sharding import Sharding

_NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
_LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear"}
_SHORTEST = 128
Changes = dict[str, Any]


@dataclass(frozen=True)
class Advice:
    """A change, and what the run would take with it."""

    change: str
    """What to type."""
    price: str
    """What it costs."""
    total: int
    """Bytes of one process."""
    fits: bool


@dataclass(frozen=True)
class _Step:
    """A change of settings: the words for it, its price, and the groups that it changes."""

    words: str
    price: str
    groups: Changes = field(default_factory=dict)


def advise(config: RunConfig, found: MemoryPlan) -> list[Advice]:
    """Return what would help a run that does not fit, the cheapest that fits first.

    Where no change alone is enough, the last one is all that leave the method as it is, together.
    A run that fits gets the change that makes it faster, if there is one. Takes seconds for each.
    """
    if found.fits:
        return _faster(config, found)
    given = [_try(config, found, steps) for steps in _alone(config, found)]
    given += _shared(config, found)
    if not any(advice.fits for advice in given):
        given.append(_together(config, found))
    return sorted(given, key=lambda advice: (not advice.fits, 0 if advice.fits else advice.total))


def _alone(config: RunConfig, found: MemoryPlan) -> Iterator[list[_Step]]:
    """Single changes, those that cost the least first."""
    yield from ([step] for step in _free(config, found))
    yield from _first_that_fits(config, found, _smaller_batches(config))
    if config.lora.lora_dropout:
        yield [_Step("lora.lora_dropout=0", "no dropout", {"lora": {"lora_dropout": 0.0}})]
    if config.lora.is_enabled and not config.quantization.is_enabled:
        yield [_QUANTIZE]
    if not config.lora.is_enabled:
        yield [_ADAPT]
    yield from _first_that_fits(config, found, _shorter_rows(found))


def _free(config: RunConfig, found: MemoryPlan) -> Iterator[_Step]:
    """Changes that leave what is learned as it is, or nearly."""
    if found.attention == "eager":
        yield _Step("model.attention=sdpa", "nothing", {"model": {"attention": "sdpa"}})
    if found.workload.checkpointing is None:
        yield _args("a third of the speed", activation_checkpointing=True)
    optimizer = find_optimizer(found.workload.optimizer)
    whole = not any(each.sharding.slices for each in found.estimates)
    if whole and optimizer.states == 2 and optimizer.bits == 32:
        yield _args("states of the optimizer in 8 bits", optim="adamw_8bit")


def _smaller_batches(config: RunConfig) -> Iterator[_Step]:
    """Fewer rows at a time, more often: the optimizer's step sees as many."""
    args = config.trainer.args
    rows = args.per_device_train_batch_size
    whole = rows * args.gradient_accumulation_steps
    while rows > 1:
        rows //= 2
        yield _args(
            "smaller products, a little slower",
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=whole // rows,
        )


def _shorter_rows(found: MemoryPlan) -> Iterator[_Step]:
    length = found.workload.length
    while length >= 2 * _SHORTEST:
        length //= 2
        yield _Step(
            f"chat.max_length={length}",
            "longer rows are cut or dropped",
            {"chat": {"max_length": length}},
        )


def _first_that_fits(
    config: RunConfig, found: MemoryPlan, steps: Iterator[_Step]
) -> Iterator[list[_Step]]:
    """The mildest of these that fits, or the strongest."""
    last = None
    for last in steps:
        if _try(config, found, [last]).fits:
            break
    if last is not None:
        yield [last]


def _shared(config: RunConfig, found: MemoryPlan) -> list[Advice]:
    """More GPUs of the same kind: the smallest number for which slices fit.

    Quantized weights are not sliced.
    """
    hardware = found.hardware
    if hardware.kind != "cuda" or config.quantization.is_enabled:
        return []
    for number in USUAL_GPU_COUNTS:
        if number <= found.best.sharding.processes:
            continue
        there = plan_memory(config, replace(hardware, count=number), [Sharding("fsdp2", number)])
        if there.fits or number == USUAL_GPU_COUNTS[-1]:
            words = f"{number} GPUs: --config_file launch/fsdp2.yaml --num_processes {number}"
            return [Advice(words, "GPUs that wait for each other", there.best.total, there.fits)]
    return []


def _together(config: RunConfig, found: MemoryPlan) -> Advice:
    """Everything that keeps method and rows, at once."""
    steps = [*_free(config, found), *list(_smaller_batches(config))[-1:]]
    if config.lora.is_enabled and not config.quantization.is_enabled:
        steps.append(_QUANTIZE)
    return _try(config, found, steps)


def _faster(config: RunConfig, found: MemoryPlan) -> list[Advice]:
    if found.workload.checkpointing is None:
        return []
    step = _args("nothing: about a third faster", activation_checkpointing=False)
    tried = _try(config, found, [step])
    return [tried] if tried.fits else []


def _try(config: RunConfig, found: MemoryPlan, steps: list[_Step]) -> Advice:
    """Plan the changed run on the same machine, shared in the same way."""
    changed = config
    for step in steps:
        changed = _changed(changed, step.groups)
    best = plan_memory(changed, found.hardware, [each.sharding for each in found.estimates]).best
    words = " ".join(step.words for step in steps)
    price = "; ".join(step.price for step in steps)
    return Advice(words, price, best.total, best.fits)


def _changed(config: RunConfig, groups: Changes) -> RunConfig:
    values = config.model_dump(mode="json")
    for name, change in groups.items():
        if name == "args":
            values["trainer"]["args"] |= change
        else:
            values[name] = values[name] | change
    return RunConfig.model_validate(values)


def _args(price: str, **values: Any) -> _Step:
    words = " ".join(f"trainer.args.{name}={_word(value)}" for name, value in values.items())
    return _Step(words, price, {"args": values})


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


_QUANTIZE = _Step("quantization=nf4", "frozen weights in 4 bits, slower", {"quantization": _NF4})
_ADAPT = _Step("lora=default", "adapters in place of the weights themselves", {"lora": _LORA})
