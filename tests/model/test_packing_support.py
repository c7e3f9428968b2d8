"""Models whose packed documents nothing keeps apart are refused from config.json alone."""

import json

import pytest

from luthier.config.schema import ChatSettings, DatasetConfig, ModelConfig, RunConfig, TrainerConfig
from luthier.errors import UserError
from luthier.model.packing_support import check_packing_support, find_packing_problem

CONFIGS = {
    "bloom": ({"model_type": "bloom"}, "ALiBi biases"),
    "falcon with ALiBi": ({"model_type": "falcon", "alibi": True}, "ALiBi biases"),
    "falcon": ({"model_type": "falcon", "alibi": False}, None),
    "rwkv": ({"model_type": "rwkv"}, "recurrent layers carry a state"),
    "in a wrapper": ({"model_type": "any", "text_config": {"model_type": "minimax"}}, "recurrent"),
    "kosmos-2.5": (
        {"model_type": "kosmos-2.5", "text_config": {"model_type": "kosmos_2_5_text_model"}},
        "counts the positions",
    ),
    "xlnet": ({"model_type": "xlnet"}, "takes no masks"),
    "mamba": ({"model_type": "mamba"}, None),
    "unknown": ({"model_type": "new"}, None),
    "none": ({}, None),
}


@pytest.mark.parametrize(("content", "reason"), CONFIGS.values(), ids=CONFIGS)
def test_reasons_against_packing(content, reason):
    problem = find_packing_problem(content)
    assert problem is None if reason is None else reason in problem


def run_config(folder, **args):
    return RunConfig(
        model=ModelConfig(path=str(folder)),
        dataset=DatasetConfig(path="x"),
        chat=ChatSettings(max_length=64),
        trainer=TrainerConfig(args=args),
        output_dir="out",
    )


def test_a_run_that_packs_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bloom"}))
    for args, key in (({"packing": True}, "packing"), ({"eval_packing": True}, "eval_packing")):
        with pytest.raises(UserError) as refusal:
            check_packing_support(run_config(tmp_path, **args))
        text = str(refusal.value)
        assert text.startswith(f"trainer.args.{key}=true: {tmp_path} cannot train packed rows")
        assert "Set trainer.args.packing=false and trainer.args.eval_packing=false" in text
    check_packing_support(run_config(tmp_path, packing=False))


def test_a_model_without_a_config_is_left_to_its_load(tmp_path):
    check_packing_support(run_config(tmp_path, packing=True))
