"""Files behind addresses: found through fsspec; the web without it."""

from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from luthier.data.reading.places import Place, Remote, Web
from luthier.data.reading.reach import offline
from luthier.data.reading.troubles import in_words
from luthier.errors import UserError

PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "az": "adlfs",
    "hf": "huggingface_hub",
    "sftp": "paramiko",
    "ssh": "paramiko",
}
"""Protocol -> the package that speaks it."""


def is_address(path: str) -> bool:
    """Whether a path names a protocol."""
    return "://" in path


def local_path(path: str) -> str | None:
    """The path of this machine that a `file://` address means; None for any other."""
    return url2pathname(urlsplit(path).path) if path.startswith("file://") else None


def find(path: str, storage: dict[str, Any]) -> list[tuple[str, Place]]:
    """The files at an address (a file, a glob or a folder), each with its own address, sorted."""
    protocol = path.split("://")[0].split("::")[0]
    if protocol in ("http", "https"):
        return [(path, _on_the_web(path, storage))]
    if protocol == "hf" and offline():
        raise UserError(f"dataset: {path} needs the network, and HF_HUB_OFFLINE is set.")
    with in_words(path, is_remote=True):
        filesystem, root = _filesystem(path, protocol, storage)
        return _files(filesystem, root, path)


def _on_the_web(path: str, storage: dict[str, Any]) -> Web:
    """A file of a web server, if it answers."""
    unknown = sorted(set(storage) - {"headers"})
    if unknown:
        raise UserError(
            f"dataset: options.storage.{unknown[0]}: {path.split(':')[0]} takes headers alone, "
            "such as {headers: {Authorization: Bearer ...}}."
        )
    headers = tuple((str(key), str(value)) for key, value in storage.get("headers", {}).items())
    web = Web(path, headers)
    with in_words(path, is_remote=True):
        web.open().close()
    return web


def _filesystem(path: str, protocol: str, storage: dict[str, Any]) -> tuple[Any, str]:
    """The file system of an address, and the address as it calls it."""
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(path, **storage)
    except ImportError as error:
        package = PACKAGES.get(protocol)
        cure = f"Install it: pip install {package}" if package else str(error)
        raise UserError(f"dataset: {path} needs a package that is not installed. {cure}") from error
    except ValueError as error:
        raise UserError(
            f"dataset: {path} cannot be opened: {error}. Known are s3://, gs://, hf://, http://, "
            "https://, file:// and what else fsspec has a package for."
        ) from error


def _files(filesystem: Any, root: str, path: str) -> list[tuple[str, Place]]:
    """The files that an address means: itself, those of a folder, or those of a glob."""
    if filesystem.isfile(root):
        return [(path, Remote(filesystem, root))]
    if filesystem.isdir(root):
        found = [entry["name"] for entry in filesystem.ls(root) if entry["type"] == "file"]
    else:
        found = [name for name in filesystem.glob(root) if filesystem.isfile(name)]
    shown = [name for name in sorted(found) if not name.rsplit("/", 1)[-1].startswith(".")]
    return [(filesystem.unstrip_protocol(name), Remote(filesystem, name)) for name in shown]
