"""The lines that a run prints of its model and its data."""

import pytest

from helpers.adapter_models import config_of
from helpers.model_families import save_family
from luthier.config.library_settings import LoraSettings, QuantizationSettings
from luthier.data.prepare import SplitCounts
from luthier.model.adapters import add_adapter
from luthier.model.device import Machine
from luthier.model.load import load_model
from luthier.train.console import format_counts, print_model

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
