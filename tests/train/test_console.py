"""The lines that a run prints of its model."""

import pytest

from helpers.adapter_models import config_of
from helpers.model_families import save_family
from luthier.config.library_settings import LoraSettings, QuantizationSettings
from luthier.model.adapters import add_adapter
from luthier.model.device import Machine
from luthier.model.load import load_model
from luthier.train.console import print_model

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
