"""What a run's own words do to what trains: adapters, new tokens, frozen parts, packed models."""

import gzip
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from helpers.chatml import byte_tokenizer
from luthier.cli.train import main
from luthier.train.run import run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a random Llama of two layers, and a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = byte_tokenizer(("<pad>", "<|im_start|>", "<|im_end|>"), pad_token="<pad>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def trains(tiny, tmp_path):
    """Run a training of three steps; return the exit code and the run's folder."""

    def start(*words, lines=12):
        rows = [
            {"prompt": f"Say {n}.", "completion": f"<think>{n}</think> it is {n}"}
            for n in range(lines)
        ]
        (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return main(run, [
            "model=hub", f"model.path={tiny}", "model.device=cpu", "model.dtype=float32",
            "dataset=jsonl", f"dataset.path={tmp_path / 'rows.jsonl'}", "dataset.eval.share=null",
            f"dataset.cache={tmp_path / 'cache'}", f"output_dir={tmp_path / 'run'}",
            "trainer.args.activation_checkpointing=false", "trainer.args.max_steps=3",
            "trainer.args.logging_steps=1", *words,
        ])  # fmt: skip

    start.folder = tmp_path / "run"
    return start


def adapter(folder):
    return load_file(folder / "model/adapter_model.safetensors")


def test_new_tokens_are_in_the_saved_tokenizer_and_their_rows_train(trains):
    code = trains("lora=default", "model.add_tokens=['<think>','</think>']")
    assert code == 0
    tokenizer = AutoTokenizer.from_pretrained(trains.folder / "model")
    new = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    assert new == [259, 260]
    rows = {name: w for name, w in adapter(trains.folder).items() if "trainable_tokens" in name}
    assert {tuple(weight.shape) for weight in rows.values()} == {(2, 64)}
    assert len(rows) == 2  # of the input and of the output embeddings
    assert all(not torch.equal(w[0], w[1]) for w in rows.values())  # both started at one mean


def test_frozen_parts_stay_as_they_were(trains, tiny):
    assert trains("lora=none", "model.train=['layers\\.1\\.']", "model.freeze=[mlp]") == 0
    before = load_file(tiny / "model.safetensors")
    after = load_file(trains.folder / "model/model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {
        name for name in before if ".layers.1." in name and ".mlp." not in name
    }  # fmt: skip
    assert moved


@pytest.mark.parametrize(
    ("words", "rank"),
    [
        (("lora=loftq", "lora.r=4", "quantization=nf4"), 4),
        (("lora=pissa", "lora.r=4"), 8),
        (("lora=plus", "lora.r=4"), 4),
        (("lora=adalora", "lora.target_r=2", "lora.tinit=0", "lora.tfinal=1", "lora.deltaT=1"), 8),
    ],
    ids=["LoftQ on 4 bits", "PiSSA is saved at twice the rank", "LoRA+", "AdaLoRA"],
)
def test_an_adapter_that_needs_more_than_peft_trains(trains, words, rank):
    assert trains(*words) == 0
    config = json.loads((trains.folder / "model/adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert config["r"] == rank
    assert all(torch.isfinite(weight.float()).all() for weight in adapter(trains.folder).values())


def test_a_whole_model_is_not_unpacked(trains, capsys):
    assert trains("lora=default", "quantization=dequantize") == 2
    assert "is not quantized. Use quantization=none" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_the_reference_of_a_full_fine_tuning_has_the_new_tokens(trains, tmp_path, method):
    rows = [
        {"prompt": f"Say {n}.", "chosen": f"<think>{n}", "rejected": f"no {n}"} for n in range(8)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    code = trains(
        f"trainer={method}", "lora=none", "model.add_tokens=['<think>']", f"dataset.path={path}",
        "trainer.args.max_steps=2", "trainer.args.per_device_train_batch_size=4",
    )  # fmt: skip
    assert code == 0
    lines = (trains.folder / "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    # Before the first step the model is its reference, new rows included.
    assert first["loss"] == pytest.approx(math.log(2) if method == "dpo" else 0.5, abs=1e-5)


def test_activations_are_kept_where_they_fit(trains, capsys):
    assert trains("lora=default", "trainer.args.activation_checkpointing=auto") == 0
    assert "gradient checkpointing is off: activations fit" in capsys.readouterr().out


def test_a_profile_is_written_and_changes_no_weight(trains, capsys):
    steps = "trainer.args.max_steps=7"
    assert trains("lora=default", steps, "trainer.args.per_device_train_batch_size=2") == 0
    plain = adapter(trains.folder)
    words = ("lora=default", steps, "trainer.args.per_device_train_batch_size=2", "overwrite=true")
    assert trains(*words, "trainer.profile=true") == 0
    profiled = adapter(trains.folder)
    assert all(torch.equal(profiled[name], plain[name]) for name in plain)
    with gzip.open(trains.folder / "profile/trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    marks = {event["name"] for event in events if str(event["name"]).startswith("ProfilerStep")}
    assert marks == {f"ProfilerStep#{step}" for step in (2, 3, 4, 5)}  # from zero
    table = (trains.folder / "profile/operations.txt").read_text().splitlines()
    assert len(table) == 12
    assert any(line.startswith("aten::mm ") for line in table)
    assert "\n".join(table) in capsys.readouterr().out
    # It lies in the folder as luthier's own, and goes with the run.
    assert trains(*words) == 0
    assert not (trains.folder / "profile").exists()


def test_a_profile_of_too_few_steps_is_refused_before_the_first(trains, capsys):
    few = ("trainer.args.max_steps=-1", "trainer.args.num_train_epochs=1")
    assert trains("lora=default", *few, "trainer.profile=true") == 2
    assert "steps 3 to 6 are profiled, and the run has 3" in capsys.readouterr().err
    assert not trains.folder.exists()


def test_a_broken_loss_names_its_step_and_rows_and_what_is_left(trains, capsys):
    code = trains(
        "lora=none", "trainer.args.learning_rate=1e12", "trainer.args.lr_scheduler_type=constant",
        "trainer.args.warmup_steps=0", "trainer.args.max_grad_norm=0",
        "trainer.args.optim=adamw_torch", "trainer.args.max_steps=6",
        "trainer.args.logging_steps=4", "trainer.args.save_steps=1",
        "trainer.args.save_strategy=steps", "trainer.args.per_device_train_batch_size=2",
        "trainer.args.train_sampling_strategy=sequential",
    )  # fmt: skip
    assert code == 2
    said = capsys.readouterr().err
    assert "at step 2, so the run stops" in said
    assert "rows.jsonl:3, " in said and "rows.jsonl:4." in said
    assert "checkpoint-1" in said
    assert not (trains.folder / "checkpoints/checkpoint-2").exists()
    assert json.loads((trains.folder / "run.json").read_text())["status"] == "failed"


def losses(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def plain_losses():
    """The losses of a run without any of the settings below, once it was asked for."""
    return []


SAME = {
    "8-bit paged AdamW": (["optim=paged_adamw_8bit"], 1e-3),
    "activations of every second layer": (
        ["activation_checkpointing=true", "activation_checkpointing_kwargs={every_n_layers:2}"],
        1e-6,
    ),
    "a compiled model": (["torch_compile=true"], 1e-4),
}


@pytest.mark.parametrize(("args", "bound"), SAME.values(), ids=SAME)
def test_what_saves_memory_or_time_changes_no_loss(trains, plain_losses, args, bound):
    same = ("lora=none", "trainer.args.learning_rate=1e-3", "trainer.args.warmup_steps=0")
    if not plain_losses:
        assert trains(*same) == 0
        plain_losses.extend(losses(trains.folder))
    assert trains(*same, "overwrite=true", *(f"trainer.args.{word}" for word in args)) == 0
    assert losses(trains.folder) == pytest.approx(plain_losses, abs=bound)
    assert len(set(plain_losses)) == 3


def test_noise_in_the_embeddings_is_for_training_alone(trains):
    held = ("lora=none", "dataset.eval.count=4", "trainer.args.learning_rate=1e-9")
    assert trains(*held) == 0
    without = losses(trains.folder)
    assert trains(*held, "trainer.args.neftune_noise_alpha=100", "overwrite=true") == 0
    results = json.loads((trains.folder / "run.json").read_text())["results"]
    assert results["eval_loss"]["after"] == pytest.approx(results["eval_loss"]["before"], abs=1e-5)
    assert losses(trains.folder)[0] != pytest.approx(without[0], abs=1e-3)


@pytest.mark.parametrize(
    "words",
    [
        ["activation_checkpointing=true", "activation_checkpointing_kwargs={offload:true}"],
        ["activation_offloading=true"],
        ["use_liger_kernel=true"],
    ],
    ids=["checkpoints in main memory", "activations in main memory", "Liger's kernels"],
)
def test_what_needs_a_gpu_is_told(trains, capsys, words):
    assert trains("lora=default", *(f"trainer.args.{word}" for word in words)) == 2
    assert "is for a CUDA GPU, and this run is on cpu. Remove it." in capsys.readouterr().err


OWN_CODE = """
import torch

def loss(log_probs, labels, weight, note):
    assert len(weight) == len(note) == len(labels)
    return -log_probs * weight

def own(model, args):
    return torch.optim.SGD(model.parameters(), lr=args.learning_rate, momentum=0.9)
"""


@pytest.mark.parametrize("name", ["muon", "python"])
def test_a_chosen_optimizer_trains_and_goes_on_from_a_checkpoint(name, trains, tmp_path):
    (tmp_path / "own.py").write_text(OWN_CODE)
    chosen = f"python:{tmp_path}/own.py:own" if name == "python" else name
    words = [
        f"trainer.optimizer.name={chosen}", "trainer.args.lr_scheduler_type=constant",
        "trainer.args.warmup_steps=0", "trainer.args.save_strategy=steps",
        "trainer.args.save_steps=2", "trainer.args.learning_rate=1e-3",
    ]  # fmt: skip
    if name == "muon":
        words.append("trainer.optimizer.groups=[{match: lm_head, learning_rate: 0}]")
    assert trains(*words, "trainer.args.max_steps=2") == 0
    assert trains(*words, "trainer.args.max_steps=4") == 0
    resumed = load_file(trains.folder / "model/model.safetensors")
    whole = tmp_path / "whole"
    assert trains(*words, "trainer.args.max_steps=4", f"output_dir={whole}") == 0
    once = load_file(whole / "model/model.safetensors")
    assert all(torch.equal(weight, resumed[key]) for key, weight in once.items())
    if name == "python":
        code = json.loads((trains.folder / "run.json").read_text())["code"]
        assert code[chosen]["settings"] == ["trainer.optimizer.name"]


def test_a_loss_of_ones_own_gets_the_columns_of_packed_rows_and_trains(trains, tmp_path):
    (tmp_path / "own.py").write_text(OWN_CODE)
    rows = [
        {
            "prompt": f"Say {n:02}.",
            "completion": f"it is {n:02}",
            "weight": 1 + n % 3 * 0.5,
            "note": "x",
        }
        for n in range(12)
    ]
    # Whole numbers of times as many rows in the other file, at a weight of one each.
    for name, repeats in {"weighted": 1, "repeated": 2}.items():
        lines = [row for row in rows for _ in range(int(row["weight"] * 2) if repeats == 2 else 1)]
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in lines))
    words = [
        "trainer.args.packing=true", "chat.max_length=64", "trainer.args.max_steps=1",
        "trainer.args.per_device_train_batch_size=100",
        "trainer.args.lr_scheduler_type=constant",
        "trainer.args.optim=sgd", "trainer.args.warmup_steps=0", "trainer.args.max_grad_norm=0",
        "dataset.columns={}", f"output_dir={tmp_path}/NAME",
    ]  # fmt: skip
    weights = {}
    for name in ("weighted", "repeated"):
        own = [f"trainer.loss=python:{tmp_path}/own.py:loss"] if name == "weighted" else []
        path = f"dataset.path={tmp_path}/{name}.jsonl"
        rate = f"trainer.args.learning_rate={1.0 if name == 'repeated' else 1 / 1.5}"
        assert trains(path, rate, *own, *(word.replace("NAME", name) for word in words)) == 0
        weights[name] = load_file(tmp_path / name / "model/model.safetensors")
    # A mean of weighted tokens at this rate is the step of so many repeated rows: their weights are
    # 1.5 on average, over rows of as many tokens.
    for key, weight in weights["weighted"].items():
        torch.testing.assert_close(weight, weights["repeated"][key], rtol=1e-4, atol=1e-5, msg=key)
