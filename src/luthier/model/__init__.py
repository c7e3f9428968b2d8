"""From a model's name to a tokenizer, weights, quantization and adapters on this machine."""

from luthier.model.source import check_model_path

__all__ = ["check_model_path"]
