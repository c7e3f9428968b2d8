"""Where config groups and recipes lie: the user's own folders first, then the bundled ones."""

import os
from pathlib import Path

from luthier.errors import UserError

_PACKAGE = Path(__file__).resolve().parents[1]
_CHECKOUT = _PACKAGE.parents[1]


def bundled(name: str) -> Path:
    """Return the folder `conf` or `recipes` that came with luthier.

    A wheel carries it inside the package; a checkout (and so an editable install) beside `src`.
    """
    for folder in (_PACKAGE / name, _CHECKOUT / name):
        if folder.is_dir():
            return folder
    raise UserError(
        f"luthier's own {name}/ folder is missing next to {_PACKAGE}; reinstall luthier."
    )


def conf_folders() -> list[Path]:
    """Return the folders with config groups, the first to be searched first."""
    own, shipped = Path.cwd() / "conf", bundled("conf")
    return [own, shipped] if own.is_dir() and own.resolve() != shipped.resolve() else [shipped]


def recipe_folders() -> list[Path]:
    """Return ./recipes, the folders of $LUTHIER_RECIPES and the bundled one, without repeats."""
    named = [Path(part) for part in os.environ.get("LUTHIER_RECIPES", "").split(os.pathsep) if part]
    for folder in named:
        if not folder.is_dir():
            raise UserError(f"LUTHIER_RECIPES names {folder}, which is not a folder. Correct it.")
    own = [folder for folder in [Path.cwd() / "recipes"] if folder.is_dir()]
    found = [folder.resolve() for folder in [*own, *named, bundled("recipes")]]
    return list(dict.fromkeys(found))


def shown(path: Path) -> str:
    """Return a path as the user would type it from here."""
    try:
        return str(path.resolve().relative_to(Path.cwd().resolve()))
    except ValueError:
        return str(path)
