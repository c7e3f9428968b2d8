"""A launcher's setting that contradicts the recipe is named with both places."""

import json

import pytest

from luthier.config.library_settings import TrainerArgs
from luthier.errors import UserError
from luthier.train.launch.conflicts import refuse_recipe_conflicts
from luthier.train.launch.request import parse_launch_command

ZERO = "distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config: {%s}"
RECIPE = {
    "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "max_grad_norm": 1.0,
    "learning_rate": 1e-4,
}  # fmt: skip


def refuse(folder, flags, file, deepspeed=None, **args):
    """Compare a launch with a recipe."""
    (folder / "asked.yaml").write_text(file)
    (folder / "ds.json").write_text(json.dumps(deepspeed or {}))
    request = parse_launch_command(["--config_file", "asked.yaml", *flags], folder, {})
    refuse_recipe_conflicts(request, TrainerArgs(RECIPE | args))


DS = ZERO % "deepspeed_config_file: ds.json"
CONFLICTS = {
    "accumulation by flag": (
        ["--gradient_accumulation_steps", "4"], "{}", {}, {},
        "`--gradient_accumulation_steps 4`, but trainer.args.gradient_accumulation_steps=2",
    ),
    "accumulation in a file": (
        [], ZERO % "gradient_accumulation_steps: 1", {}, {},
        "`gradient_accumulation_steps: 1` in asked.yaml, but",
    ),
    "clipping": (
        [], ZERO % "gradient_clipping: 0.5", {}, {}, "but trainer.args.max_grad_norm=1.0",
    ),
    "bf16 that the recipe turns off": (
        [], "mixed_precision: bf16", {}, {"bf16": False},
        "`mixed_precision: bf16` in asked.yaml, but trainer.args.bf16=false",
    ),
    "fp16 and bf16": (
        ["--mixed_precision", "fp16"], "{}", {}, {"bf16": True}, "but trainer.args.bf16=true",
    ),
    "batch of deepspeed": (
        [], DS, {"train_micro_batch_size_per_gpu": 8}, {},
        "ds.json, but trainer.args.per_device_train_batch_size=4",
    ),
    "batch of all processes": (
        [], DS, {"train_batch_size": 32}, {}, "times 2 processes is 16",
    ),
    "learning rate of deepspeed": (
        [], DS, {"optimizer": {"params": {"lr": 0.01}}}, {}, "`optimizer.params.lr: 0.01` in",
    ),
    "bf16 of deepspeed": (
        [], DS, {"bf16": {"enabled": False}}, {"bf16": True}, "`bf16.enabled: false` in",
    ),
    "no deepspeed file": (
        [], ZERO % "deepspeed_config_file: other.json", {}, {}, "there is no file",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFLICTS)
def test_a_contradiction_stops(name, tmp_path):
    flags, file, deepspeed, args, message = CONFLICTS[name]
    with pytest.raises(UserError) as stopped:
        refuse(tmp_path, flags, file, deepspeed, **args)
    assert message in str(stopped.value)


@pytest.mark.parametrize(
    ("flags", "file", "deepspeed", "args"),
    [
        pytest.param([], "mixed_precision: 'no'", {}, {"bf16": True}, id="the-recipe-decides"),
        pytest.param([], "mixed_precision: bf16", {}, {}, id="the-launcher-decides"),
        pytest.param([], "mixed_precision: bf16", {}, {"bf16": True}, id="the-same"),
        pytest.param(["--gradient_accumulation_steps", "2"], "{}", {}, {}, id="as-many"),
        pytest.param([], ZERO % "gradient_clipping: auto", {}, {}, id="auto"),
        pytest.param([], DS, {"train_batch_size": 16, "gradient_clipping": 1}, {}, id="deepspeed"),
    ],
)
def test_what_agrees_goes_on(flags, file, deepspeed, args, tmp_path):
    refuse(tmp_path, flags, file, deepspeed, **args)
