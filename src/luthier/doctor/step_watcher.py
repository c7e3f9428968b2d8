"""What a test of a path sees of its steps: the gradients of the first, the time of the others."""

import time
from typing import Any

import torch
from transformers import TrainerCallback

_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")
"""What DDP, torch.compile and FSDP put into the names of weights."""


def plain_name(name: str) -> str:
    """Return the name of a weight without what wraps the model."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


class StepWatcher(TrainerCallback):
    """Keeps the gradients of the first step, float32 on the CPU, and times the steps behind it."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._step_ends: list[float] = []
        self.gradients: dict[str, Any] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Copy the gradients; slices of several processes are put together on all of them."""
        if state.global_step > 0:
            return
        for name, parameter in self._trainer.model_wrapped.named_parameters():
            gradient = parameter.grad
            if gradient is None:
                continue
            if hasattr(gradient, "full_tensor"):
                gradient = gradient.full_tensor()
            self.gradients[plain_name(name)] = gradient.detach().float().cpu().clone()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note when a step has ended on the device."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._step_ends.append(time.perf_counter())

    @property
    def seconds_per_step(self) -> float:
        """The time of a step, of those behind the first, which compiles and fills caches."""
        steps = len(self._step_ends) - 1
        return max(self._step_ends[-1] - self._step_ends[0], 1e-9) / max(steps, 1)
