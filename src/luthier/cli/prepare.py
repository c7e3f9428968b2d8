"""`luthier prepare` encodes a recipe's dataset into the cache, ahead of training."""

import time

from luthier.cli.arguments import TRUST, CommandLine

COMMAND_LINE = CommandLine(
    "prepare",
    "luthier prepare recipe=NAME [key=value ...]\n\n"
    "Reads the dataset of a recipe, encodes it and puts the token rows into the cache, where\n"
    "every later run with the same content and settings finds them. It loads no weights. If\n"
    "several are started at once, one encodes and the others wait for it.\n\n"
    "The cache is dataset.cache, otherwise $LUTHIER_CACHE/data, otherwise ~/.cache/luthier/data.",
    (TRUST,),
    "  luthier prepare recipe=quickstart\n"
    "  luthier prepare recipe=qlora_llama dataset.workers=16\n",
)


def run(arguments: list[str]) -> int:
    """Fill the cache; returns 0. Raises UserError as training would."""
    if COMMAND_LINE.asks_help(arguments):
        return 0
    parsed = COMMAND_LINE.parse(arguments)
    from luthier import data
    from luthier.config import load_config
    from luthier.config.recipes import check_recipe_files
    from luthier.environment import set_environment
    from luthier.model.positions import check_max_length
    from luthier.model.source import check_model_path

    config = load_config(parsed.overrides, TRUST.name in parsed.switches).config
    # Cheap mistakes first: files and the model's path are checked before torch is imported.
    check_recipe_files(config)
    sources = data.check_sources(config.dataset, config.trainer.method)
    check_model_path(config.model)
    check_max_length(config)
    set_environment(config)
    # After set_environment: the libraries read their variables when they are imported.
    from luthier.data.prepare import prepare
    from luthier.model.tokenizer import load_tokenizer
    from luthier.train import console
    from luthier.train.methods import make_row_encoders

    began = time.monotonic()
    tokenizer = load_tokenizer(config.model)
    row_encoders = make_row_encoders(config, tokenizer)
    prepared = prepare(config.dataset, row_encoders, tokenizer, config.seed, sources)
    console.print_data(prepared)
    for key, encoded_source in prepared.sources.items():
        console.print_line(f"{key}: {encoded_source.stored.folder}")
    console.print_line(f"ready in {time.monotonic() - began:.1f} s")
    return 0
