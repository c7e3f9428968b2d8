"""What the benchmarks share: models of known shapes with random weights, their arithmetic, GPUs.

Nothing here is downloaded, and nothing heavy is imported before a model is built.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class ModelShape:
    """A dense decoder whose weights are random: a class of transformers and its settings."""

    config_class: str
    settings: dict[str, Any]

    @property
    def layers(self) -> int:
        """The number of transformer layers."""
        return self.settings["num_hidden_layers"]

    @property
    def head_width(self) -> int:
        """The numbers of one attention head."""
        heads, width = self.settings["num_attention_heads"], self.settings["hidden_size"]
        return self.settings.get("head_dim") or width // heads

    @property
    def attention_width(self) -> int:
        """The numbers of all query heads of a token."""
        return self.settings["num_attention_heads"] * self.head_width

    def layer_matrices(self) -> Iterator[tuple[int, int]]:
        """Yield the (inputs, outputs) of each linear layer of one transformer layer."""
        width, inner = self.settings["hidden_size"], self.settings["intermediate_size"]
        keys = self.settings["num_key_value_heads"] * self.head_width
        yield from [(width, self.attention_width), (width, keys), (width, keys)]
        yield (self.attention_width, width)
        yield from [(width, inner), (width, inner), (inner, width)]

    @property
    def product_weights(self) -> int:
        """The weights that every token is multiplied with: linear layers and the output layer."""
        in_layers = sum(inputs * outputs for inputs, outputs in self.layer_matrices())
        return self.layers * in_layers + self.settings["vocab_size"] * self.settings["hidden_size"]

    @property
    def weights(self) -> int:
        """All weights, with the table of the input embedding (if it is untied) and the norms."""
        width = self.settings["hidden_size"]
        norms = 2 * width + (2 * self.head_width if self.config_class == "Qwen3Config" else 0)
        is_tied = self.settings.get("tie_word_embeddings", False)
        table = 0 if is_tied else self.settings["vocab_size"] * width
        return self.product_weights + table + self.layers * norms + width

    def lora_weights(self, rank: int) -> int:
        """Return the weights of LoRA of a rank on all linear layers but the output layer."""
        return self.layers * sum(rank * (i + o) for i, o in self.layer_matrices())

    def step_flops(self, tokens: float, pairs: float, rank: int | None = None) -> float:
        """Return the model FLOPs of a forward and backward, without recomputed activations.

        `pairs` counts, over all documents, the pairs of a query and a key that it may see: a
        document of n tokens has n (n + 1) / 2. `rank` is that of LoRA, None where all weights
        train. A weight costs 2 FLOPs a token forward, 2 for the gradient of its input and 2 for its
        own gradient, which frozen weights do not have; a pair costs 4 FLOPs forward for each number
        of the heads (two products), and twice that backward. Appendix B of PaLM
        (https://arxiv.org/abs/2204.02311) counts so, too, but without the causal half, with the
        input embedding, which is a look-up, and with all weights trained.
        """
        trained = self.product_weights if rank is None else self.lora_weights(rank)
        frozen = 0 if rank is None else self.product_weights
        attention = 12.0 * self.layers * self.attention_width * pairs
        return tokens * (6.0 * trained + 4.0 * frozen) + attention

    def config(self) -> Any:
        """Return the config of transformers."""
        import transformers

        return getattr(transformers, self.config_class)(**self.settings)


SHAPES = {
    "tiny": ModelShape("LlamaConfig", {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}),
    "qwen_1_7b": ModelShape("Qwen3Config", {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "max_position_embeddings": 40960, "tie_word_embeddings": True}),
    "llama_8b": ModelShape("LlamaConfig", {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 131072, "rope_theta": 500000.0, "rms_norm_eps": 1e-5}),
    "llama_70b": ModelShape("LlamaConfig", {
        "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672,
        "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
        "max_position_embeddings": 131072, "rope_theta": 500000.0, "rms_norm_eps": 1e-5}),
}  # fmt: skip
"""The shapes of Qwen3-1.7B, Llama-3.1-8B and Llama-3.1-70B, and one for trying a script."""


class Gpu(NamedTuple):
    """A GPU by its maker's data sheet."""

    flops: float
    """Dense bfloat16 FLOP/s with float32 sums; half of what a sheet says "with sparsity"."""
    link: float
    """Bytes a second in one direction to the other GPUs of its machine."""
    network: float
    """Bytes a second in one direction of a machine of eight; 0 where there is no usual one."""
    source: str


_NVIDIA = "https://www.nvidia.com/en-us/data-center"
GPUS = {
    "H200 NVL": Gpu(835e12, 450e9, 0, f"{_NVIDIA}/h200/"),
    "H100 NVL": Gpu(835e12, 300e9, 0, f"{_NVIDIA}/h100/"),
    "H100 PCIe": Gpu(756e12, 64e9, 0, f"{_NVIDIA}/h100/"),
    "H200": Gpu(989e12, 450e9, 400e9, f"{_NVIDIA}/h200/"),
    "H100": Gpu(989e12, 450e9, 400e9, f"{_NVIDIA}/h100/"),
    "A100": Gpu(312e12, 300e9, 200e9, f"{_NVIDIA}/a100/"),
    "L40S": Gpu(362e12, 32e9, 0, f"{_NVIDIA}/l40s/"),
    "RTX 4090": Gpu(165e12, 32e9, 0,
        "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf"),
}  # fmt: skip
"""By a part of torch's name for the device; longer names first. H100, H200 and A100 are the SXM
forms. `link`: NVLink 4 and 3 have 900 and 600 GB/s both ways together, PCIe 5 and 4 x16 128 and 64.
`network`: DGX H100 and H200 have eight ports of 400 Gb/s for eight GPUs, DGX A100 eight of 200."""


def find_gpu(name: str) -> Gpu | None:
    """Return the data sheet of a device by torch's name for it; None for one not in the table."""
    return next((gpu for part, gpu in GPUS.items() if part in name), None)


def build_random_model(shape: ModelShape, dtype: Any, device: str, attention: str) -> Any:
    """Build a model with random weights of a torch dtype on a device."""
    import torch
    import transformers

    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(
            shape.config(), dtype=dtype, attn_implementation=attention
        )


def pack_to_nf4(model: Any, dtype: str, device: str) -> Any:
    """Pack a model's linear layers, but for the output layer, into nf4, as luthier loads them.

    `dtype` is the format that products are computed in. The weights are packed on the device, one
    layer after the other.
    """
    import bitsandbytes as bnb
    from torch import nn

    from luthier.model.load import insert_quantized_layers, keep_backward_kernels

    weights = {n: m.weight.data for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    settings |= {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": dtype}
    quantizer = insert_quantized_layers(model, settings)
    for name, layer in model.named_modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            # As transformers' Bnb4bitQuantize makes it of a weight that it has read (5.23).
            weight = bnb.nn.Params4bit(
                weights.pop(name), requires_grad=False, **layer.weight.__dict__
            )
            layer.weight = weight.to(device)
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer
    keep_backward_kernels(model)
    return model
