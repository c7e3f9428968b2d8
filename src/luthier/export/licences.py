"""Licences of models and datasets, from their own cards on the hub; never guessed."""

from pathlib import Path
from typing import Any

from luthier.model import source


def stated(name: str, kind: str = "model") -> str | None:
    """The licence that a hub repository's card states; None where it states none or is not seen.

    `kind`: model or dataset. A card in the local cache needs no network; another one costs one
    request, and none where the hub is out of reach.
    """
    metadata = _cached(name, kind)
    if metadata is None:
        metadata = None if source.is_out_of_reach() else _fetched(name, kind)
    found = (metadata or {}).get("license")
    if isinstance(found, list):
        found = ", ".join(map(str, found))
    if found == "other":
        return str((metadata or {}).get("license_name") or "other")
    return str(found) if found else None


def _cached(name: str, kind: str) -> dict[str, Any] | None:
    from huggingface_hub import metadata_load, try_to_load_from_cache

    file = try_to_load_from_cache(name, "README.md", repo_type=kind)
    return (metadata_load(Path(file)) or {}) if isinstance(file, str) else None


def _fetched(name: str, kind: str) -> dict[str, Any] | None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        found = HfApi().repo_info(name, repo_type=kind, timeout=source.PATIENCE)
    except (HfHubHTTPError, OSError):
        return None
    return found.card_data.to_dict() if found.card_data else {}
