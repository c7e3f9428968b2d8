"""Find, compose and validate configurations; what is wrong is said in words, all at once."""

from luthier.config.load import LoadedConfig, load_config
from luthier.config.recipes import RecipeInfo, list_recipes
from luthier.config.schema import RunConfig

__all__ = ["LoadedConfig", "RecipeInfo", "RunConfig", "list_recipes", "load_config"]
