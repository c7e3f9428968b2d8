"""Keep the libraries from talking where a command says itself what it does."""

import warnings


def quiet() -> None:
    """No bars and no remarks of transformers; errors stay."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
