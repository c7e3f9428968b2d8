"""What the libraries read from the environment, and what they print that no user can act on."""

import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

from luthier.terminal import hide_bars, shows_bars

if TYPE_CHECKING:
    from luthier.config.schema import RunConfig

_CHATTY = ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions")
"""Loggers that warn of a kernel which `keep_trainable` turns off, and at every 8-bit product."""


def quiet_bitsandbytes() -> None:
    """Keep bitsandbytes from telling of its kernels; call it before it is imported."""
    for chatty in _CHATTY:
        logging.getLogger(chatty).setLevel(logging.ERROR)


def hide_progress_bars() -> None:
    """Turn off the bars of all libraries, also of those that are imported already."""
    hide_bars()
    for variable in (
        "TQDM_DISABLE",
        "HF_HUB_DISABLE_PROGRESS_BARS",
        "HF_DATASETS_DISABLE_PROGRESS_BARS",
    ):
        os.environ.setdefault(variable, "1")
    # They read their variables when they are imported.
    if "transformers" in sys.modules:
        sys.modules["transformers"].logging.disable_progress_bar()
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()


def quiet_libraries() -> None:
    """For commands that say what they do themselves: no bars and remarks; errors stay.

    Call it before a model is loaded.
    """
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    # Waiting threads that spin would starve every other process on the machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    quiet_bitsandbytes()
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    from transformers.utils import logging as transformers

    transformers.set_verbosity_error()
    transformers.disable_progress_bar()


def set_environment(config: "RunConfig") -> None:
    """What the libraries read from the environment, set before any of them is imported."""
    settings: dict[str, Any] = {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "GRADIO_ANALYTICS_ENABLED": "False",
        "TOKENIZERS_PARALLELISM": "true",
    }
    if config.deterministic:
        settings |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FLASH_ATTENTION_DETERMINISTIC": "1"}
    os.environ |= settings
    if config.trainer.args.disable_tqdm or not shows_bars() or os.environ.get("RANK", "0") != "0":
        hide_progress_bars()
    quiet_bitsandbytes()
    # The libraries announce to each other what they will rename: trl 1.16 reads
    # `is_gradient_checkpointing`, which transformers 5.23 calls deprecated. Others' stay.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.|trl\.|peft\.")
    # Waiting threads that spin would starve every other process on the machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
