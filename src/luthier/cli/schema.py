"""`luthier schema`: the JSON Schema of a recipe, for editors."""

import json
from pathlib import Path

from luthier.cli.arguments import CommandLine, Flag
from luthier.errors import UserError
from luthier.storage.write_errors import explain_write_errors

COMMAND_LINE = CommandLine(
    "schema",
    "luthier schema [--markdown] [-o FILE]\n\nPrints the JSON Schema of a recipe: every key with "
    "its type, options, default and meaning,\nas the installed versions of trl, transformers and "
    "peft have them. An editor with a YAML\nlanguage server (VS Code's YAML extension, Neovim, "
    "Emacs, JetBrains) then completes keys,\nshows what they mean and underlines mistakes. The "
    "first line of a recipe names the file:\n\n"
    "  # yaml-language-server: $schema=recipe.schema.json",
    (
        Flag("-o", "FILE", "write it into a file"),
        Flag("--markdown", None, "every key in tables, as docs/reference.md has them"),
    ),
    "  luthier schema -o recipe.schema.json\n",
)


def run(arguments: list[str]) -> int:
    """Print the schema or the tables, or write them into a file."""
    if COMMAND_LINE.asks_help(arguments):
        return 0
    parsed = COMMAND_LINE.parse(arguments)
    if parsed.overrides:
        raise UserError("`luthier schema` takes no settings: it describes every recipe.")
    if "--markdown" in parsed.switches:
        from luthier.config.reference import reference_page

        text, hint = reference_page(), ""
    else:
        from luthier.config.json_schema import recipe_schema

        text = json.dumps(recipe_schema(), indent=1) + "\n"
        hint = " In a recipe: # yaml-language-server: $schema={}"
    if file := parsed.texts.get("-o"):
        with explain_write_errors(Path(file), "-o"):
            Path(file).write_text(text, encoding="utf-8")
        print(f"wrote {file}.{hint.format(file)}")
    else:
        print(text, end="")
    return 0
