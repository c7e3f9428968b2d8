"""From a configuration and a machine to a plan, and the choices that training takes from it."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from luthier.config.schema import RunConfig
from luthier.environment import quiet_bitsandbytes
from luthier.memory import workload as machines
from luthier.memory import workload as workloads
from luthier.memory.estimate import Estimate, estimate_memory, gradient_shares
from luthier.memory.meta_model import build_meta_model, read_model_config, teacher_bytes
from luthier.memory.sharding import SHARDING_KINDS, Sharding
from luthier.memory.simulate import SimulatedStep, simulate_step
from luthier.memory.workload import AUTO_CHECKPOINTING, Checkpointing, Hardware, Workload
from luthier.model.device import Machine

USUAL_GPU_COUNTS = (2, 4, 8)
"""GPUs for which a step is kept in mind, to say what more of them would give."""
_TRIED: dict[tuple[str, Machine, Workload, str, str], SimulatedStep] = {}


@dataclass(frozen=True)
class MemoryPlan:
    """What a run needs on a machine, for each way of sharing the work that was asked for."""

    name: str
    """The recipe, or the model."""
    model: str
    parameters: int
    """Weights of the model, without those of an adapter."""
    trained: int
    """Weights that train: of an adapter, or all of them."""
    hardware: Hardware
    dtype: str
    attention: str
    workload: Workload
    estimates: tuple[Estimate, ...]

    @property
    def best(self) -> Estimate:
        """The first estimate that fits, or the smallest one if none does."""
        fitting = [estimate for estimate in self.estimates if estimate.fits]
        return fitting[0] if fitting else min(self.estimates, key=lambda each: each.total)

    @property
    def fits(self) -> bool:
        """Whether one of the estimates fits."""
        return self.best.fits


def plan_memory(
    config: RunConfig,
    hardware: Hardware | None = None,
    shardings: Sequence[Sharding] = (Sharding(),),
) -> MemoryPlan:
    """Plan a run's memory from its configuration alone; takes seconds, needs no weights.

    `hardware` is this machine's unless given. `activation_checkpointing: auto` is planned as
    `choose_checkpointing` decides it. Raises UserError where the model's config.json cannot be had
    or the plan does not know a part of the run.
    """
    hardware = hardware or machines.detect_hardware(config.model)
    machine = machines.machine_for(config.model, hardware)
    with _quiet():
        workload = workloads.read_workload(config, machine)
        found = _plan(config, machine, workload, hardware, shardings)
        if found.fits or config.trainer.args.activation_checkpointing != AUTO_CHECKPOINTING:
            return found
        return _plan(config, machine, _checkpointed(workload), hardware, shardings)


def fits_in_memory(config: RunConfig, hardware: Hardware | None = None) -> bool:
    """Tell whether a run fits on one device of a machine (this one unless given)."""
    return plan_memory(config, hardware).fits


def choose_checkpointing(
    config: RunConfig, hardware: Hardware | None = None, sharding: Sharding | None = None
) -> bool:
    """Tell whether activations have to be computed again: True where they do not fit.

    It is what `trainer.args.activation_checkpointing: auto` means: a third of the speed is given
    up only for memory that is not there. Raises UserError as `plan` does.
    """
    asked = config.with_trainer_args(activation_checkpointing=AUTO_CHECKPOINTING)
    found = plan_memory(asked, hardware, (sharding or Sharding(),))
    return found.workload.checkpointing is not None


@contextmanager
def _quiet() -> Iterator[None]:
    """What libraries say of their own future and kernels is no matter of a plan."""
    quiet_bitsandbytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _checkpointed(workload: Workload) -> Workload:
    return replace(workload, checkpointing=Checkpointing())


def _plan(
    config: RunConfig,
    machine: Machine,
    workload: Workload,
    hardware: Hardware,
    shardings: Sequence[Sharding],
) -> MemoryPlan:
    tried = _rehearsals(config, machine, workload, hardware, shardings)
    file_dtype = str(read_model_config(config.model).dtype).removeprefix("torch.")
    beside = (hardware, file_dtype, teacher_bytes(config, machine))
    estimates = [
        estimate_memory(tried[_has_slices(sharding, workload)], workload, sharding, *beside)
        for sharding in shardings
    ]
    weights = next(iter(tried.values())).weights
    return MemoryPlan(
        name=config.recipe or config.model.path,
        model=config.model.path,
        parameters=sum(w.elements for w in weights if workload.full or not w.trains),
        trained=sum(weight.elements for weight in weights if weight.trains),
        hardware=hardware,
        dtype=machine.dtype,
        attention=machine.attention,
        workload=workload,
        estimates=tuple(estimates),
    )


def _rehearsals(
    config: RunConfig,
    machine: Machine,
    workload: Workload,
    hardware: Hardware,
    shardings: Sequence[Sharding],
) -> dict[bool, SimulatedStep]:
    """Try the step once, and once more for slices of weights that train whole.

    Those are gathered in 16 bits, where copies have autocast make 16-bit weights of float32 ones.
    """
    tried = {}
    for slices in sorted({_has_slices(sharding, workload) for sharding in shardings}):
        dtype = workload.autocast if slices and workload.autocast else "float32"
        tried[slices] = _rehearsed(config, machine, workload, hardware, shardings, dtype)
    return tried


def _rehearsed(
    config: RunConfig,
    machine: Machine,
    workload: Workload,
    hardware: Hardware,
    shardings: Sequence[Sharding],
    dtype: str,
) -> SimulatedStep:
    """Try a step, or remember it: optimizers and numbers of GPUs make no difference to it."""
    parts = config.model_dump_json(include={"model": True, "quantization": True, "lora": True})
    usual = [Sharding(kind, number) for kind in SHARDING_KINDS for number in USUAL_GPU_COUNTS]
    follow = frozenset(gradient_shares([*shardings, *usual], workload))
    step = replace(workload, optimizer="", assumptions=(), reference=False)
    key = (parts, machine, step, hardware.kind, dtype)
    if key not in _TRIED or not follow <= set(_TRIED[key].peaks):
        _TRIED[key] = simulate_step(
            build_meta_model(config, machine, dtype), workload, hardware.kind, follow
        )
    return _TRIED[key]


def _has_slices(sharding: Sharding, workload: Workload) -> bool:
    return sharding.slices and workload.full
