"""The mappings that go to a library whole, and the keys of them that luthier reads itself."""

import ast
import pickle
from pathlib import Path

import luthier
from luthier.config.library_settings import LoraSettings, QuantizationSettings, TrainerArgs
from luthier.config.schema import RunConfig

MINIMAL = {"model": {"path": "m"}, "dataset": {"path": "d.jsonl"}, "output_dir": "o"}
ARGS = {"optim": "adamw_8bit", "a_new_setting_of_trl": {"nested": [1, None]}}


def test_a_config_holds_typed_views_and_dumps_plain_mappings():
    config = RunConfig.model_validate(
        MINIMAL | {"lora": {"r": 8, "method": "oft"}, "trainer": {"args": ARGS}}
    )
    assert config.lora.is_enabled and config.lora.method == "oft"
    assert not config.quantization.is_enabled
    assert config.trainer.args == ARGS, "every key reaches the trainer as it was written"
    dumped = config.model_dump()
    assert type(dumped["lora"]) is type(dumped["trainer"]["args"]) is dict, "yaml takes plain dicts"
    assert RunConfig.model_validate(dumped) == pickle.loads(pickle.dumps(config)) == config
    assert type(pickle.loads(pickle.dumps(config)).lora) is LoraSettings


def test_with_trainer_args_changes_a_copy():
    config = RunConfig.model_validate(MINIMAL | {"trainer": {"args": ARGS}})
    changed = config.with_trainer_args(activation_checkpointing=True)
    assert changed.trainer.args == ARGS | {"activation_checkpointing": True}
    assert changed.trainer.args.activation_checkpointing is True
    assert config.trainer.args.activation_checkpointing is None


def test_absent_and_null_take_the_default():
    for args in (TrainerArgs(), TrainerArgs(per_device_train_batch_size=None, eval_strategy=None)):
        assert args.per_device_train_batch_size == 8
        assert not args.evaluates and args.beta is None
    assert TrainerArgs(eval_strategy="steps").evaluates
    assert not TrainerArgs(eval_strategy=False).evaluates, "YAML reads a bare no as false"
    assert TrainerArgs(beta=0.0).beta == 0.0


def test_evaluation_rows_are_packed_as_training_rows_unless_it_is_set():
    assert TrainerArgs(packing=True).eval_packing
    assert not TrainerArgs(packing=True, eval_packing=False).eval_packing
    assert TrainerArgs(eval_packing=True).eval_packing


def test_a_completion_without_a_bound_is_not_one_of_the_usual_length():
    assert TrainerArgs().max_completion_length == 512
    assert TrainerArgs(max_completion_length=None).max_completion_length is None


def test_the_width_of_packed_weights():
    assert QuantizationSettings(load_in_4bit=True).bits == 4
    assert QuantizationSettings(load_in_8bit=True, load_in_4bit=False).bits == 8
    assert QuantizationSettings(dequantize=True).bits is None
    assert QuantizationSettings(load_in_4bit=True, load_in_8bit=True).bits is None


def test_no_module_reads_these_mappings_by_key():
    """Defaults stand in the views alone: nobody calls `.get` or `[...]` on them elsewhere."""
    views = {"lora", "quantization"}
    raw = []
    for file in Path(luthier.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            is_get = isinstance(node, ast.Attribute) and node.attr == "get"
            read = node.value if is_get or isinstance(node, ast.Subscript) else None
            text = ast.unparse(read) if isinstance(read, ast.Attribute) else ""
            owner, _, name = text.rpartition(".")
            if (name in views and owner) or text.endswith("trainer.args"):
                raw.append(f"{file}:{node.lineno}: {text}")
    assert not raw, raw
