"""What a run under DeepSpeed cannot train right, said before a model is loaded.

Everything else was run on two processes and held against one (docs/launch.md has the table).
"""

from typing import TYPE_CHECKING

from luthier.config.code_settings import read_code_entries
from luthier.config.schema import RunConfig
from luthier.errors import UserError
from luthier.train.launch.checks import parallelism_message
from luthier.train.launch.request import LaunchRequest, read_launch_request

if TYPE_CHECKING:
    from transformers import TrainingArguments

_PRECISIONS = {"bf16": "bfloat16", "fp16": "float16", "no": "float32"}


def check_zero_settings(
    config: RunConfig,
    training_args: "TrainingArguments",
    has_experts: bool,
    has_images: bool = False,
) -> None:
    """Stop, before a model is loaded, at what DeepSpeed does not train, or trains otherwise.

    `training_args` are those of the trainer, `has_experts` tells of the model, and `has_images` of
    the rows. Raises UserError with the key and what to use instead.
    """
    plugin = training_args.deepspeed_plugin
    if plugin is None:
        return
    request = read_launch_request() or LaunchRequest()
    precision = "bf16" if training_args.bf16 else "fp16" if training_args.fp16 else "no"
    if request.mixed_precision not in (None, "no", precision):
        raise UserError(
            f"Mixed precision {request.mixed_precision} was asked for "
            f"({request.set_by['mixed_precision']}), but the recipe trains in "
            f"{_PRECISIONS[precision]} (model.dtype, trainer.args.bf16 and fp16), and DeepSpeed "
            "computes in one format.\nInstead: ask for the same in both, such as "
            f"--mixed_precision {precision}."
        )
    optimizer = config.trainer.optimizer.name
    if optimizer == "muon" or read_code_entries(optimizer):
        raise UserError(
            f"trainer.optimizer.name={config.trainer.optimizer_name}: DeepSpeed lays all weights "
            "into one vector, of which Muon cannot train matrices, and own optimizers are not "
            "tried.\nInstead: luthier launch --config ddp, or a name of trainer.args.optim."
        )
    split = plugin.deepspeed_config.get("tensor_parallel", {}).get("autotp_size", 0)
    if split > 1:
        origin = f"`autotp_size: {split}` in DeepSpeed's settings"
        raise UserError(parallelism_message("tp_size", origin))
    if plugin.zero_stage != 3:
        return
    problem = _find_unsliceable(config, has_experts)
    if problem is not None:
        raise UserError(
            f"{problem} do not train under DeepSpeed ZeRO-3, which slices weights while loading.\n"
            "Instead: luthier launch --config zero2, or --config ddp."
        )
    if has_images:
        # DeepSpeed 0.19 holds the traces of the ranks against each other, and raises.
        raise UserError(
            "dataset: rows with images do not train under DeepSpeed ZeRO-3, where all processes "
            "must run the same layers in the same order, also those whose rows have no image.\n"
            "Instead: luthier launch --config fsdp2, or --config zero2."
        )


def _find_unsliceable(config: RunConfig, has_experts: bool) -> str | None:
    """Return what of a run needs weights whole while it is built, behind its key; None if nothing.

    ZeRO-3 hung with packed weights; peft 0.21 reads rows of tokens on CUDA alone, and the shapes of
    parameters, such as experts, as they are in slices.
    """
    if config.quantization.is_enabled:
        return "quantization: weights of 4 or 8 bits"
    lora, model = config.lora, config.model
    if not lora.is_enabled:
        return None
    rows = {
        "lora.trainable_token_indices": lora.get("trainable_token_indices"),
        "lora.token_indices": lora.get("token_indices"),
        "model.add_tokens": model.add_tokens,
        "model.add_special_tokens": model.add_special_tokens,
    }
    for key, value in rows.items():
        if value:
            return f"{key}: single rows beside an adapter"
    if lora.target_parameters:
        return "lora.target_parameters: adapters on parameters by their names"
    if has_experts and lora.trains_experts:
        return "lora.experts: adapters on experts (lora.experts=false leaves them out)"
    return None
