"""The states of optimizers, against the optimizers of transformers themselves."""

import pytest
import torch

from luthier.memory import optimizers
from luthier.memory.meta_model import Weight

SHAPES = {"table": (96, 64), "matrix": (64, 128), "small": (32, 32), "vector": (64,)}
NAMES = (
    "adamw_torch",
    "adamw_torch_fused",
    "adafactor",
    "sgd",
    "adagrad",
    "rmsprop",
    "adamw_8bit",
    "adamw_bnb_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "lion_32bit",
    "lion_8bit",
    "paged_lion_32bit",
    "paged_lion_8bit",
    "ademamix",
    "ademamix_8bit",
    "paged_ademamix_32bit",
    "paged_ademamix_8bit",
    "rmsprop_bnb",
    "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit",
)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(*SHAPES["table"])
        self.matrix = torch.nn.Parameter(torch.randn(SHAPES["matrix"]))
        self.small = torch.nn.Parameter(torch.randn(SHAPES["small"]))
        self.vector = torch.nn.Parameter(torch.randn(SHAPES["vector"]))

    def forward(self):
        return sum(p.square().sum() for p in self.parameters())


def real_bytes(name, folder):
    """Let the trainer make the optimizer, take a step, and count what it keeps."""
    from transformers import Trainer, TrainingArguments

    model = Model()
    args = TrainingArguments(str(folder), optim=name, use_cpu=True, report_to=[])
    optimizer = Trainer(model, args).create_optimizer()
    model().backward()
    optimizer.step()
    kept = {}
    for state in optimizer.state.values():
        for key, value in state.items():
            # Single numbers are for the log, and the maps of 8-bit numbers are shared by all.
            if isinstance(value, torch.Tensor) and value.dim() and "qmap" not in key:
                kept[value.untyped_storage().data_ptr()] = value.numel() * value.itemsize
    return sum(kept.values())


def planned_weights():
    for name, shape in SHAPES.items():
        elements = torch.Size(shape).numel()
        yield Weight(name, elements, shape, 4 * elements, "float32", True, "", name == "table")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")
def test_states_are_those_of_the_optimizer(name, tmp_path):
    stays, leaves = optimizers.state_bytes(
        optimizers.find_optimizer(name), list(planned_weights()), on_gpu=False
    )
    assert (stays, leaves) == (real_bytes(name, tmp_path), 0)


def test_every_optimizer_of_transformers_is_known_or_said_to_be_unknown():
    from transformers.training_args import OptimizerNames

    unknown = {o.value for o in OptimizerNames if not optimizers.find_optimizer(o.value).is_known}
    assert unknown == {
        "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_anyprecision", "adamw_torch_4bit",
        "adamw_torch_8bit", "galore_adamw", "galore_adamw_8bit", "galore_adafactor",
        "galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise",
        "grokadamw", "apollo_adamw", "apollo_adamw_layerwise", "stable_adamw",
    }  # fmt: skip


def test_paged_states_may_leave_a_gpu():
    large = Weight("w", 200_000, (200_000,), 800_000, "float32", True, "", False)
    small = Weight("v", 99_999, (99_999,), 399_996, "float32", True, "", False)
    found = optimizers.state_bytes(
        optimizers.find_optimizer("paged_adamw_32bit"), [large, small], on_gpu=True
    )
    assert found == (2 * 399_996, 2 * 800_000)
