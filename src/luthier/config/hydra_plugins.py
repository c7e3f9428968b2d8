"""Plug luthier's folders into Hydra: `recipe=x` is recipes/x.yaml, ./conf comes first."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigLoadError, ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

from luthier.config import recipes
from luthier.config.schema import GROUPS
from luthier.storage.typed_files import check_yaml_size

DroppedGroups = Mapping[str, frozenset[str]]
"""For each recipe of the chain, the groups whose settings in it do not apply."""

_dropped: ContextVar[DroppedGroups] = ContextVar("dropped")


class FolderSource(ConfigSource):
    """YAML files of one folder, of which only `self.groups` are visible to Hydra."""

    groups: tuple[str, ...] = (*GROUPS, "hydra")

    @staticmethod
    def scheme() -> str:
        """Return what a search path entry of this kind begins with."""
        return "groups"

    def locate(self, config_path: str) -> Path | None:
        """Return the place on disk, or None for what this source does not show."""
        if config_path.split("/")[0] not in self.groups:
            return None
        return Path(self.path) / config_path

    def load_config(self, config_path: str) -> ConfigResult:
        """Read one YAML file with its header."""
        file = self.locate(self._normalize_file_name(config_path))
        if file is None or not file.is_file():
            raise ConfigLoadError(f"Config not found: {config_path}")
        text = file.read_text(encoding="utf-8")
        check_yaml_size(text, str(file))
        header = self._get_header_dict(text)
        config = OmegaConf.load(file)
        return ConfigResult(provider=self.provider, path=str(file), config=config, header=header)

    def is_group(self, config_path: str) -> bool:
        """Say whether this is a folder of options."""
        folder = self.locate(config_path)
        return config_path == "" or (folder is not None and folder.is_dir())

    def is_config(self, config_path: str) -> bool:
        """Say whether this is an option."""
        file = self.locate(self._normalize_file_name(config_path))
        return file is not None and file.is_file()

    def available(self) -> bool:
        """Say whether the folder is there."""
        return Path(self.path).is_dir()

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Return the names below `config_path`, sorted."""
        if config_path == "":
            return [] if results_filter == ObjectType.CONFIG else sorted(self.groups)
        folder = self.locate(config_path)
        names = (
            [] if folder is None or results_filter == ObjectType.GROUP else folder.glob("*.yaml")
        )
        return sorted(path.stem for path in names)


class RecipeSource(FolderSource):
    """A folder of recipes, shown to Hydra as the group `recipe` whose files speak for the whole."""

    groups = ("recipe",)

    @staticmethod
    def scheme() -> str:
        """Return what a search path entry of this kind begins with."""
        return "recipes"

    def locate(self, config_path: str) -> Path | None:
        """Return the recipe's place; the group's name is not part of it."""
        group, _, rest = config_path.partition("/")
        return Path(self.path) / rest if group == "recipe" else None

    def load_config(self, config_path: str) -> ConfigResult:
        """Read a recipe, without the groups that the command line or an heir chose anew."""
        result = super().load_config(config_path)
        result.header["package"] = result.header["package"] or "_global_"
        name = config_path.removeprefix("recipe/")
        if isinstance(result.config, DictConfig):
            for group in _dropped.get({}).get(name, frozenset()):
                result.config.pop(group, None)
        return result


class LuthierSearchPath(SearchPathPlugin):
    """Adds the user's ./conf before the bundled groups, and the recipes after them."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Add luthier's folders."""
        for folder in recipes.conf_folders()[:-1]:
            search_path.prepend("./conf", f"groups://{folder}", anchor="main")
        for folder in recipes.recipe_folders():
            search_path.append("recipes", f"recipes://{folder}")


@cache
def register_plugins() -> None:
    """Make the sources known to Hydra, once per process."""
    for plugin in (FolderSource, RecipeSource, LuthierSearchPath):
        Plugins.instance().register(plugin)
    # Hydra holds a YAML file against a class of the same name; these are luthier's own settings.
    for group in ("launcher", "sweeper"):
        ConfigStore.instance().repo["hydra"][group].pop("basic.yaml")


@contextmanager
def drop_groups(dropped: DroppedGroups) -> Iterator[None]:
    """Leave these groups out of these recipes while Hydra reads them."""
    token = _dropped.set(dropped)
    try:
        yield
    finally:
        _dropped.reset(token)
