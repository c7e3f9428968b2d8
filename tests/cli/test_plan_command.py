"""`luthier plan` as typed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.memory_configs import TINY, write_model_config

ROOT = Path(__file__).parents[2]
SMALL = TINY | {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}


@pytest.fixture(autouse=True)
def heap_without_reserve(monkeypatch):
    """The C library gives everything back, whatever the machine's does."""
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")


@pytest.fixture
def plan_command(capsys):
    """`luthier plan` as typed; gives back exit code, output and errors."""
    from luthier.cli.plan import run
    from luthier.errors import UserError, report_error

    def plan_command(*words):
        try:
            code = run(list(words))
        except UserError as error:
            code = report_error(error)
        out, err = capsys.readouterr()
        return code, out, err

    return plan_command


@pytest.fixture
def on_shapes(plan_command, tmp_path):
    """Plan for a small model of which only the config.json is there."""

    def on_shapes(*words):
        model = ["model=hub", f"model.path={write_model_config(tmp_path / 'small', SMALL)}"]
        rows = ["dataset=jsonl", "dataset.path=rows.jsonl", "lora=default", "chat.max_length=64"]
        return plan_command(*model, *rows, *words)

    return on_shapes


def test_a_plan_is_a_table(on_shapes):
    code, out, err = on_shapes("--memory", "24GB", "lora.r=64")
    assert code == 0 and "Traceback" not in err
    for word in (
        "adapters float32",
        "optimizer",
        "activations",
        "CUDA context",
        "total",
        "available",
    ):
        assert word in out
    assert "fits: one process" in out
    assert "4 rows of 64 tokens, bfloat16 autocast, sdpa with a mask" in out


def test_rows_that_cannot_be_read_are_named(plan_command):
    code, out, _ = plan_command("recipe=quickstart", "dataset.path=none.jsonl", "--memory", "24GB")
    assert code == 0 and "4 rows of 512 tokens" in out
    text = " ".join(out.split())
    assert "No row was read, so the longest allowed row is planned. dataset: there is no " in text


def test_small_data_is_planned_by_its_longest_row(plan_command, tmp_path):
    cache = tmp_path / "cache"
    words = ("recipe=quickstart", f"dataset.cache={cache}", "--memory", "24GB")
    code, out, _ = plan_command(*words)
    assert code == 0 and "4 rows of 97 tokens" in out
    assert "your longest row has 97 tokens: " in out and "rows of 512 tokens would need " in out
    assert not cache.exists(), "a plan writes nothing"


def test_what_does_not_fit_exits_with_1_and_says_what_to_change(on_shapes):
    code, out, _ = on_shapes("--memory", "700MB", "trainer.args.activation_checkpointing=false")
    assert code == 1
    assert "does not fit" in out and "what to change" in out
    assert "trainer.args.activation_checkpointing=true" in out


def test_several_gpus_get_a_column_for_each_sharding(on_shapes):
    _, out, _ = on_shapes("--memory", "24GB", "--gpus", "4")
    assert all(f"{name} x 4" in out for name in ("DDP", "FSDP2", "ZeRO-2", "ZeRO-3"))


def test_json_holds_the_same(on_shapes):
    code, out, _ = on_shapes("--memory", "24GB", "--json")
    found = json.loads(out)
    estimate = found["estimates"][0]
    assert code == 0 and found["fits"] and estimate["fits"]
    assert estimate["total"] == sum(part["bytes"] for part in estimate["parts"])
    assert found["workload"]["length"] == 64
    assert found["trained"] == 2 * 16 * (2 * 512 + 2 * 384 + 3 * 512)


def test_a_launch_file_is_planned(on_shapes, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "distributed_type: FSDP\nnum_processes: 2\nfsdp_config: {fsdp_version: 2}\n"
    )
    _, out, _ = on_shapes("--memory", "24GB", "--launch", "mine.yaml")
    assert "FSDP2 x 2" in out and "gathered weights" in out
    adafactor = "trainer.args.optim=adafactor"
    code, _, err = on_shapes("--memory", "24GB", "--launch", "mine.yaml", adafactor)
    assert code == 2 and err.startswith(f"{adafactor}: it was not shown to be right")


def test_quantized_weights_are_not_planned_in_slices_of_zero(on_shapes):
    quantized = ("--memory", "24GB", "quantization=nf4")
    _, out, _ = on_shapes(*quantized, "--gpus", "4")
    assert "ZeRO-2 x 4" in out and "ZeRO-3" not in out
    code, _, err = on_shapes(*quantized, "--launch", str(ROOT / "launch" / "zero3.yaml"))
    assert code == 2 and "do not train under DeepSpeed ZeRO-3" in err


SAYS = {
    "memory": (["--memory", "much"], "--memory much: write the memory of one GPU"),
    "gpus without a size": (["--gpus", "4"], "--gpus 4: this machine has no GPU."),
    "launch file": (
        ["--memory", "24GB", "--launch", "none.yaml"],
        "--launch none.yaml: there is no such file",
    ),
    "flag": (["--memry", "24GB"], "Did you mean --memory?"),
    "key": (["chat.max_lenght=3"], "Did you mean chat.max_length?"),
    "folder": (["model.path=./none"], "model.path=none: there is no such folder"),
    "hub": (
        ["model.path=someone/no-such-model-here"],
        "the model is not on this machine",
    ),
    "layer": (["lora.target_modules=[q_porj]"], "no layer is named q_porj. Did you mean q_proj?"),
    "method": (["--memory", "24GB", "model.attention=none"], "cannot build this model"),
}


@pytest.mark.parametrize("words, said", SAYS.values(), ids=SAYS)
def test_a_mistake_is_said_in_words(words, said, on_shapes):
    if words == ["--gpus", "4"]:
        import torch

        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
    code, out, err = on_shapes(*words)
    assert (code, out) == (2, "")
    assert said in err


CALL = "import sys; from luthier.cli.plan import run; run(sys.argv[1:])"


@pytest.mark.parametrize(
    "words", [["--help"], ["recipe=typo"], ["recipe=quickstart", "--memory", "x"]]
)
def test_what_is_typed_wrong_costs_no_heavy_import(words, tmp_path):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", CALL, *words],
        cwd=tmp_path, text=True, capture_output=True,
    )  # fmt: skip
    names = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert not names & {"torch", "transformers", "rich", "trl"}
