"""Where trials run: slots of this machine, each with GPUs of its own, or a share of the CPU."""

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from luthier.errors import UserError
from luthier.sweep.settings import Local


@dataclass(frozen=True)
class Slot:
    """Room for one trial."""

    number: int
    gpus: tuple[str, ...] = ()
    """As `CUDA_VISIBLE_DEVICES` names them; none on a CPU."""
    threads: int | None = None
    """Threads of each process, where trials share a CPU."""

    @property
    def name(self) -> str:
        """The slot as tables show it."""
        return f"GPU {','.join(self.gpus)}" if self.gpus else f"slot {self.number + 1}"

    def environment(self) -> dict[str, str]:
        """What a trial in this slot finds in its environment."""
        found = {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)} if self.gpus else {}
        return found | ({"OMP_NUM_THREADS": str(self.threads)} if self.threads else {})


def make(launcher: Local, processes: int, on_cpu: bool, environ: Mapping[str, str]) -> list[Slot]:
    """The slots of this machine for trials of so many processes; at least one.

    Raises UserError where not one trial would fit, or fewer than were asked for.
    """
    gpus = [] if on_cpu else _gpus(launcher, environ)
    if not gpus:
        return _cpu_slots(launcher, processes, on_cpu, environ)
    each = launcher.gpus_per_trial if launcher.gpus_per_trial != "auto" else processes
    room = _shared(gpus, each) if each < 1 else _whole(gpus, each)
    if not room:
        raise UserError(
            f"hydra.launcher.gpus_per_trial: a trial takes {each:g} GPUs, and there are "
            f"{len(gpus)} ({', '.join(gpus)}): not one fits. Ask for fewer."
        )
    wanted = len(room) if launcher.slots == "auto" else launcher.slots
    if wanted > len(room):
        raise UserError(
            f"hydra.launcher.slots: {wanted} trials of {each:g} GPUs need {wanted * each:g}, and "
            f"there are {len(gpus)}. Ask for {len(room)}, or share them: "
            "hydra.launcher.gpus_per_trial=0.5."
        )
    return [Slot(number, names) for number, names in enumerate(room[:wanted])]


def _whole(gpus: list[str], each: float) -> list[tuple[str, ...]]:
    if each != int(each):
        raise UserError(
            f"hydra.launcher.gpus_per_trial: {each:g} is no whole number. Write one, or a share "
            "of a GPU below 1."
        )
    size = int(each)
    return [tuple(gpus[n : n + size]) for n in range(0, len(gpus) - size + 1, size)]


def _shared(gpus: list[str], share: float) -> list[tuple[str, ...]]:
    """A GPU for each slot, and several slots for each GPU; neighbours on different GPUs."""
    return [(gpu,) for _ in range(int(1 / share + 1e-9)) for gpu in gpus]


def _cpu_slots(
    launcher: Local, processes: int, on_cpu: bool, environ: Mapping[str, str]
) -> list[Slot]:
    if launcher.gpus_per_trial != "auto":
        why = "the CPU was asked for" if on_cpu else "this machine shows none"
        raise UserError(
            f"hydra.launcher.gpus_per_trial: {launcher.gpus_per_trial:g} GPUs for each trial, and "
            f"{why}. Leave it out to train on the CPU."
        )
    count = 1 if launcher.slots == "auto" else launcher.slots
    chosen = count == 1 or "OMP_NUM_THREADS" in environ
    threads = None if chosen else max(1, (os.cpu_count() or 1) // (count * processes))
    return [Slot(number, (), threads) for number in range(count)]


def _gpus(launcher: Local, environ: Mapping[str, str]) -> list[str]:
    """The GPUs that may be used, by number or name."""
    if launcher.gpus != "auto":
        return [str(gpu) for gpu in launcher.gpus]
    if "CUDA_VISIBLE_DEVICES" in environ:
        names = [name.strip() for name in environ["CUDA_VISIBLE_DEVICES"].split(",")]
        return [name for name in names if name and not name.startswith("-")]
    return installed_gpus()


def installed_gpus() -> list[str]:
    """The NVIDIA GPUs of this machine by number, without importing torch."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return done.stdout.split() if done.returncode == 0 else []
