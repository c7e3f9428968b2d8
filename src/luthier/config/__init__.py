"""Find, compose and validate configurations; what is wrong is said in words, all at once."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from luthier.config.load import LoadedConfig, load_config
    from luthier.config.recipes import RecipeInfo, list_recipes
    from luthier.config.schema import RunConfig

__all__ = ["LoadedConfig", "RecipeInfo", "RunConfig", "list_recipes", "load_config"]

_HOMES = {
    "LoadedConfig": "load",
    "load_config": "load",
    "RecipeInfo": "recipes",
    "list_recipes": "recipes",
    "RunConfig": "schema",
}
"""Public names -> their modules. Hydra and pydantic are imported for those that need them."""


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _HOMES:
        return getattr(import_module(f"luthier.config.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'luthier.config' has no attribute {name!r}")
