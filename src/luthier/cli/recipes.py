"""`luthier recipes`: what there is to run."""

from luthier import config
from luthier.cli.arguments import CommandLine

COMMAND_LINE = CommandLine(
    "recipes",
    "luthier recipes\n\nLists the recipes that are found (./recipes, $LUTHIER_RECIPES, bundled), a "
    "line each.",
)


def run(arguments: list[str]) -> int:
    """List the recipes that are found, with their header lines."""
    if COMMAND_LINE.asks_help(arguments):
        return 0
    COMMAND_LINE.refuse_all(arguments)
    recipes = config.list_recipes()
    width = max(len(recipe.name) for recipe in recipes)
    for recipe in recipes:
        print(f"{recipe.name:<{width}}  {recipe.header}")
    return 0
