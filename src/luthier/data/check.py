"""The cheap check of a dataset, before anything heavy is imported."""

from luthier.config.schema import DatasetConfig
from luthier.data.files import is_local, read_file
from luthier.data.prepare import read_conversations
from luthier.data.sources import check_sources


def check_files(config: DatasetConfig, seed: int = 0) -> None:
    """Raise UserError for local files that are missing, malformed, of no known shape, or that
    the held-out rows leave empty; and for a hub dataset that cannot be reached.

    Imports only the standard library. What it reads is kept for `prepare`, which reads it anew
    only if a file has changed since.
    """
    check_sources(config)
    if is_local(config.path):
        read_conversations(config, seed)
    elif config.eval.path is not None:
        read_file(config.eval.path)
