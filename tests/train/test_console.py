"""The lines that a run prints of its model and its data."""

import pytest

from helpers.adapter_models import config_of
from helpers.model_families import save_family
from luthier.config import load_config
from luthier.config.library_settings import LoraSettings, QuantizationSettings
from luthier.data.prepare import SplitCounts
from luthier.model.adapters import add_adapter
from luthier.model.device import Machine
from luthier.model.load import load_model
from luthier.train.console import format_counts, print_model, print_replies, print_results

CPU = Machine("cpu", "float32", "sdpa")
LINES = {
    # family, and whether and how it has an adapter -> what stands there
    ("gemma3", True): [
        "on cpu in float32, attention sdpa",
        "          its text part trains; frozen: model.vision_tower (1 layer), "
        "model.multi_modal_projector",
    ],
    ("gemma3", "vision"): [
        "on cpu in float32, attention sdpa",
        "          its text part, model.vision_tower (1 layer) train; frozen: "
        "model.multi_modal_projector",
    ],
    ("gpt_oss", False): ["on cpu in float32, attention eager"],
    ("llama", True): ["on cpu in float32, attention sdpa"],
    ("mamba2", True): [
        "on cpu in float32, attention eager",
        "          no adapter on mixer.out_proj: kernels would pass it by",
    ],
    ("mamba2", False): ["on cpu in float32, attention eager"],
}


@pytest.mark.parametrize(("family", "adapted"), LINES, ids=str)
def test_the_model_s_line_says_what_the_class_got(family, adapted, tmp_path, capsys):
    save_family(tmp_path, family)
    model = load_model(config_of(tmp_path).model, {}, CPU)
    settings = {"r": 4, "target_modules": "all-linear", "vision": adapted == "vision"}
    lora = LoraSettings(settings if adapted else {})
    if adapted:
        model = add_adapter(model, lora, 1, "CAUSAL_LM")
    capsys.readouterr()
    print_model(model, CPU, QuantizationSettings(), lora)
    first, *others = capsys.readouterr().out.splitlines()
    expected, *notes = LINES[family, adapted]
    assert first.startswith("model     ")
    assert first.endswith(expected)
    assert others == notes


@pytest.mark.parametrize(
    ("trained", "answers", "line"),
    [
        (50, "", "3 rows, 3 sequences, longest 90, 200 tokens, 50 trained (25%)"),
        (3, "labels", "3 rows, 3 sequences, longest 90, 200 tokens, 3 labels"),
        (0, "completions of prompts", "3 rows, 3 sequences, longest 90, 200 tokens"),
    ],
    ids=["tokens", "labels", "completions-that-the-model-writes"],
)
def test_the_line_of_a_split_says_what_trains(trained, answers, line):
    counts = SplitCounts(rows=3, sequences=3, tokens=200, trained_tokens=trained, longest=90)
    assert format_counts(counts, answers) == line


def test_replies_stand_in_a_block_for_each_row(capsys):
    row = {"prompt": "Call mum.", "before": "urn", "after": "{}", "expected": "{}"}
    print_replies([row | {"set": "code"}, row], limit=1)
    assert capsys.readouterr().out.splitlines() == [
        "",
        "held-out row 1 of code",
        "  prompt    Call mum.",
        "  before    urn",
        "  after     {}",
        "  expected  {}",
    ]


RECORD = {
    "results": {"eval_loss": {"before": 1.64912, "after": 0.00002},
                "exact_match": {"before": None, "after": 0.85}},
    "seconds": 1667.2, "training_seconds": 27.4, "peak_memory_gib": {"host": 3.55},
}  # fmt: skip


def test_results_come_with_files_and_next_commands(tmp_path, capsys):
    folder = tmp_path / "my run"
    (folder / "model").mkdir(parents=True)
    for name in ("loss.png", "metrics.jsonl", "model/adapter_config.json"):
        (folder / name).touch()
    print_results(RECORD, folder, load_config(["recipe=quickstart"]).config)
    assert capsys.readouterr().out.splitlines() == [
        "",
        "             before     after",
        "eval_loss    1.6491  2.00e-05",
        "exact_match             85.0%",
        "",
        "time      1,667 s, of which training 27 s",
        "memory    host 3.55 GiB at the peak",
        f"files     {folder}: model/ loss.png metrics.jsonl",
        f"next      luthier chat '{folder}'",
        f"          luthier evaluate '{folder}'",
        f"          luthier merge '{folder}'",
    ]
