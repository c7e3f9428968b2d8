"""What the tests of GRPO and RLOO share: a run's config and data on disk, and its trainer."""

import json

from transformers.trainer_callback import PrinterCallback, ProgressCallback

from helpers.preference_trainer import model, say, tokenizer
from luthier.config.schema import RunConfig
from luthier.data.prepare import prepare
from luthier.model.device import choose_machine
from luthier.train import methods
from luthier.train.methods import TrainerInputs

ROWS = [
    {"messages": [say("user", "one and one"), say("assistant", "two")], "level": 1},
    {"messages": [say("user", "a colour <|im_end|>"), say("assistant", "red")], "kind": "open"},
    {"messages": [say("system", "Be short."), say("user", "hello")], "level": 3},
    {"messages": [say("user", "a"), say("assistant", "b"), say("user", "c")], "reference": "own"},
]
ARGS = {
    "max_steps": 1, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8,
    "gradient_accumulation_steps": 1, "num_generations": 4, "max_completion_length": 6,
    "learning_rate": 1.0, "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0,
    "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "report_to": [],
    "activation_checkpointing": False, "warmup_steps": 0,
}  # fmt: skip


def run_config(
    folder, rows=ROWS, method="grpo", rewards=("exact_match",), evaluation=None, dataset=None,
    chat=None, lora=None, teacher=None, tools=(), environment=None, rollouts=None, **args,
):  # fmt: skip
    """The config of a run on rows that are written into the folder, as is the tiny model."""
    if not (folder / "model").exists():
        model().save_pretrained(folder / "model")
        tokenizer().save_pretrained(folder / "model")
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return RunConfig(
        model={"path": str(folder / "model"), "device": "cpu", "dtype": "float32"},
        dataset={"path": str(path), "cache": str(folder / "cache")} | (dataset or {}),
        trainer={
            "method": method, "rewards": list(rewards), "args": _args(method) | args,
            "teacher": teacher, "tools": list(tools), "environment": environment,
            "rollouts": rollouts or {},
            "evaluation": evaluation or {},
        },
        chat=chat or {},
        lora=lora or {},
        output_dir=str(folder / "run"),
    )  # fmt: skip


def _args(method):
    """What the method's trainer takes of the usual arguments."""
    groups = method in ("grpo", "rloo")
    return {name: value for name, value in ARGS.items() if groups or name != "num_generations"}


def prepared(config):
    """The run's data."""
    words = tokenizer()
    return prepare(config.dataset, methods.make_row_encoders(config, words), words, config.seed)


def trainer(config, folder, net=None):
    """The run's trainer, with no bars and no words."""
    method, machine, data = (
        methods.load_method(config.trainer.method),
        choose_machine(config.model),
        prepared(config),
    )
    args = method.build_arguments(config, machine, folder, has_eval=bool(data.eval))
    net = net if net is not None else method.load_model(config, machine, data)
    made = method.build_trainer(TrainerInputs(config, args, net, tokenizer(), data, []))
    made.remove_callback(PrinterCallback)
    made.remove_callback(ProgressCallback)
    return made
