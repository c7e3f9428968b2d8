"""How a run was launched, as far as it takes to launch it so again."""

from typing import Any

import yaml

from luthier.train.asked import asked


def launcher() -> dict[str, Any] | None:
    """The content of accelerate's config file, if one had a say; None for plain Python."""
    wish = asked()
    if wish is None or wish.config_file is None:
        return None
    config = yaml.safe_load(wish.config_file.read_text(encoding="utf-8"))
    return {"config_file": str(wish.config_file), "config": config}
