"""What a run under FSDP2 cannot train right, said before a model is loaded.

Everything else was run on two processes and held against one (docs/launch.md has the table).
"""

import os
from collections.abc import Mapping
from typing import Any

from luthier.config.methods import METHODS
from luthier.config.schema import RunConfig
from luthier.errors import UserError
from luthier.model.quantized import quantization_method, read_quantization_config
from luthier.train.launch.request import is_on

FSDP2_OPTIMIZERS = ("adamw_torch_fused", "adamw_torch", "sgd", "adagrad", "rmsprop")
"""Values of `trainer.args.optim` that were held against one process, torch's own."""
FSDP2_ADAPTERS = ("lora", "boft", "ia3", "loha", "lokr", "miss", "oft", "randlora", "vera")
"""Values of `lora.method` that were held against one process; of LoRA also DoRA, PiSSA, LoftQ and
LoRA+. AdaLoRA fails: it ranks its directions by whole matrices."""
_DDP = "luthier launch --config ddp"


def check_fsdp_launch(config: RunConfig, environ: Mapping[str, str] = os.environ) -> None:
    """Stop, before torch is imported, where FSDP cannot train what is asked for.

    `environ` has accelerate's variables for the settings of `fsdp_config`. Raises UserError.
    """
    is_sharded = is_on(environ, "ACCELERATE_USE_DEEPSPEED")
    if config.model.loader is not None and (is_sharded or is_on(environ, "ACCELERATE_USE_FSDP")):
        raise UserError(
            "model.loader: a model that a function loads was not tried with its weights in slices "
            f"(FSDP2, DeepSpeed).\nUse {_DDP}, where each process has it whole."
        )
    if not is_on(environ, "ACCELERATE_USE_FSDP"):
        return
    if environ.get("FSDP_VERSION", "1") != "2":
        raise UserError(
            "FSDP1 was asked for (accelerate's choice where fsdp_version is not set), and luthier "
            "was not tried with it.\nInstead: fsdp_version: 2, or luthier launch --config fsdp2."
        )
    if is_on(environ, "FSDP_ACTIVATION_CHECKPOINTING"):
        raise UserError(
            "fsdp_activation_checkpointing: true: an adapter would be saved empty, and the memory "
            "plan does not know of it.\nInstead: trainer.args.activation_checkpointing=true, which "
            "recomputes the same layers."
        )
    _refuse_saving(config.trainer.args, environ)
    check_fsdp_config(config)


def check_fsdp_config(config: RunConfig) -> None:
    """Raise UserError where a run's config has something that FSDP2 does not train right."""
    optimizer = config.trainer.optimizer_name
    if optimizer not in FSDP2_OPTIMIZERS:
        key = "args.optim" if config.trainer.optimizer.name is None else "optimizer.name"
        raise UserError(
            f"trainer.{key}={optimizer}: it was not shown to be right on the slices of FSDP2, "
            "on which bitsandbytes' optimizers and Adafactor fail.\nUse one of "
            f"{', '.join(FSDP2_OPTIMIZERS)}, or {_DDP}."
        )
    if config.trainer.args.torch_compile:
        raise UserError(
            "trainer.args.torch_compile=true: it was not shown to train right on the slices of "
            f"FSDP2.\nSet it to false, or use {_DDP}."
        )
    if METHODS[config.trainer.base_method].task == "SEQ_2_SEQ_LM":
        raise UserError(
            f"trainer.method={config.trainer.method}: the embeddings that encoder and decoder "
            f"share cannot be sharded by FSDP2.\nUse {_DDP}."
        )
    method = config.lora.method
    if config.lora.is_enabled and method not in FSDP2_ADAPTERS:
        raise UserError(
            f"lora.method={method}: it was not shown to train right on the slices of FSDP2.\nUse "
            f"one of {', '.join(FSDP2_ADAPTERS)}, or {_DDP}."
        )
    problem = _packed_weights_problem(config)
    if problem is not None:
        raise UserError(
            f"{problem}\nUse quantization=nf4, which was compared with one process, or {_DDP}, "
            "where each process has the packed weights whole."
        )


def _packed_weights_problem(config: RunConfig) -> str | None:
    """Return why the packed weights of a run are not trained on under FSDP2; None if they are."""
    if config.quantization.dequantize:
        return None
    if config.quantization.bits == 8:
        return "quantization: FSDP2 cannot shard bitsandbytes' 8-bit weights."
    quantization = read_quantization_config(config.model)
    if quantization is None:
        return None
    method = quantization_method(quantization)
    if method == "bitsandbytes" and not quantization.get("load_in_8bit"):
        return None
    name = "8-bit bitsandbytes" if method == "bitsandbytes" else method
    return f"model.path={config.model.path}: FSDP2 was not tried with weights of {name}."


def check_packed_storage(config: RunConfig, args: Any) -> None:
    """Raise UserError where mixed precision would round 4-bit weights that are stored as numbers.

    `args` are the trainer's. Weights stored as bytes, the default, lie whole on each process; those
    stored as floating-point numbers (`bnb_4bit_quant_storage`) are sharded, and FSDP2 casts what it
    gathers.
    """
    storage = config.quantization.bnb_4bit_quant_storage
    if not is_on(os.environ, "ACCELERATE_USE_FSDP") or storage == "uint8":
        return
    environment = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else environment
    formats = {"bf16": "bfloat16", "fp16": "float16"}
    if formats.get(precision, storage) != storage:
        raise UserError(
            f"quantization.bnb_4bit_quant_storage={storage}: mixed precision {precision} would "
            "round the packed weights when FSDP2 gathers them.\nUse "
            f"quantization.bnb_4bit_quant_storage={formats[precision]}, or leave it out: each "
            "process then has them whole."
        )


def _refuse_saving(args: Mapping[str, Any], environ: Mapping[str, str]) -> None:
    """Stop at settings of checkpoints that transformers 5.23 refuses in a traceback."""
    if not args.get("save_only_model"):
        return
    # accelerate's choice for FSDP2.
    kind = environ.get("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")
    if kind.upper() in ("SHARDED_STATE_DICT", "3"):
        raise UserError(
            f"trainer.args.save_only_model: with fsdp_state_dict_type: {kind} the model of a "
            "checkpoint is in shards, which nothing loads alone.\nInstead: FULL_STATE_DICT, or "
            "leave save_only_model out."
        )
    if args.get("load_best_model_at_end"):
        raise UserError(
            "trainer.args.save_only_model: under FSDP the best model is loaded from a checkpoint "
            "with all of its parts.\nLeave out save_only_model or load_best_model_at_end."
        )
