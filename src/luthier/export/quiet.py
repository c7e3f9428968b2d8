"""Commands that say what they do themselves: no progress bars and hints of the libraries."""

import os
import warnings


def hush() -> None:
    """Keep the libraries quiet; call it before a model is loaded."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning)
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
