"""The numbers that settings of a trainer may take, where their classes do not say so themselves.

TRL and transformers find few of these mistakes, and late: torch refuses a negative learning rate
once the model is loaded, and a negative weight decay trains.
"""

from dataclasses import dataclass
from math import isfinite

from luthier.errors import format_value

_LARGEST = 2**31 - 1
"""Whole numbers go to libraries that count in 32 bits."""


@dataclass(frozen=True)
class NumberRange:
    """The numbers from `least` to `most`; a bound is a number of the range unless it is `open`."""

    least: float
    most: float = _LARGEST
    is_least_open: bool = False
    is_most_open: bool = False
    exceptions: tuple[float, ...] = ()
    """Numbers outside of it that have a meaning of their own."""

    def complaint(self, number: float) -> str | None:
        """Return what is wrong with a number; None for one of the range."""
        if not isfinite(number):
            return f"{format_value(number)} is not a finite number."
        if number in self.exceptions:
            return None
        others = "".join(f" (or {exception:g})" for exception in self.exceptions)
        if number < self.least or (self.is_least_open and number == self.least):
            than = "it must be more than" if self.is_least_open else "the least is"
            return (
                f"{format_value(number)} is too small; {than} {_format_bound(self.least)}{others}."
            )
        if number > self.most or (self.is_most_open and number == self.most):
            than = "it must be less than" if self.is_most_open else "the most is"
            return f"{format_value(number)} is too large; {than} {_format_bound(self.most)}."
        return None


def _format_bound(bound: float) -> str:
    return f"{int(bound):,}" if float(bound).is_integer() else f"{bound:g}"


_ANY = NumberRange(-1e12, 1e12)
_NOT_NEGATIVE = NumberRange(0, 1e12)
_POSITIVE = NumberRange(0, 1e12, is_least_open=True)
_COUNT = NumberRange(1)
_COUNT_OR_NONE = NumberRange(0)
_SHARE = NumberRange(0, 1)
_SHARE_BELOW_ONE = NumberRange(0, 1, is_most_open=True)
_SHARE_ABOVE_ZERO = NumberRange(0, 1, is_least_open=True)
_PORT = NumberRange(1, 65_535)

_NAMES = {
    _NOT_NEGATIVE: """
        learning_rate weight_decay adam_epsilon max_grad_norm warmup_steps eval_delay
        neftune_noise_alpha router_aux_loss_coef center_rewards_coefficient beta cpo_alpha
        desirable_weight undesirable_weight epsilon epsilon_high entropy_coef entropy_coef_min
        entropy_coef_max entropy_coef_delta entropy_target off_policy_mask_threshold
        vespo_k_neg vespo_k_pos vespo_lambda_neg vespo_lambda_pos
    """,
    _POSITIVE: """
        logging_steps eval_steps save_steps delta discopop_tau temperature repetition_penalty
        sapo_temperature_neg sapo_temperature_pos
        vllm_server_timeout vllm_importance_sampling_cap vllm_importance_sampling_clip_max
        vllm_importance_sampling_clip_min
    """,
    _COUNT: """
        per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps
        eval_accumulation_steps dataloader_prefetch_factor ddp_bucket_cap_mb ddp_timeout
        torch_empty_cache_steps pad_to_multiple_of precompute_ref_batch_size ref_model_sync_steps
        generation_batch_size max_completion_length num_generations num_generations_eval
        num_iterations steps_per_generation vllm_max_model_length vllm_tensor_parallel_size
    """,
    _COUNT_OR_NONE: "save_total_limit num_completions_to_print top_k",
    _SHARE: "ld_alpha min_p ref_model_mixup_alpha top_entropy_quantile",
    _SHARE_BELOW_ONE: "adam_beta1 adam_beta2 label_smoothing label_smoothing_factor",
    _SHARE_ABOVE_ZERO: "top_p vllm_gpu_memory_utilization",
    _PORT: "vllm_server_port vllm_group_port",
    NumberRange(1, exceptions=(-1,)): "max_steps",
    NumberRange(0, 1e6, is_least_open=True): "num_train_epochs",
    NumberRange(0, 1024): "dataloader_num_workers",
    _ANY: "alpha f_alpha_divergence_coef simpo_gamma",
}
RANGES = {name: numbers for numbers, names in _NAMES.items() for name in names.split()}
"""Setting of `trainer.args` -> its numbers."""


def number_complaint(name: str, value: object) -> str | None:
    """Return what is wrong with the value of a setting of `trainer.args`, if it is a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return RANGES.get(name, _ANY).complaint(value)
