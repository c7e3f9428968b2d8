"""From a model's name to a tokenizer, weights, quantization and adapters on this machine."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from luthier.model.source import check_model_path

__all__ = ["check_model_path"]


def __getattr__(name: str) -> Any:
    # The checks of the device need nothing of a model's files, which take longer to import.
    if name == "check_model_path":
        from luthier.model.source import check_model_path

        return check_model_path
    raise AttributeError(f"module 'luthier.model' has no attribute {name!r}")
