"""Hooks of mkdocs: pages that lie outside of docs/, and links that lead out of the site."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
PAGES = {
    "recipes.md": "recipes/README.md",
    "launch-files.md": "launch/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
    "changelog.md": "CHANGELOG.md",
}
"""The site's pages whose source is elsewhere, by their names on the site."""

_MESSAGE = re.compile(r"^```text$", re.MULTILINE)
"""How a quoted message begins; its lines wrap on the site (docs/assets/site.css)."""
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_config(config: Any) -> Any:
    """Make anchors as GitHub does, so that one link works in both places."""
    from pymdownx.slugs import slugify

    config["mdx_configs"].setdefault("toc", {})["slugify"] = slugify(case="lower")
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of `PAGES`."""
    from mkdocs.structure.files import File

    for name, source in PAGES.items():
        content = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return a page's text with links as the site needs them, and its quoted messages marked."""
    name = page.file.src_uri
    text = site_links(markdown, (ROOT / PAGES.get(name, f"docs/{name}")).parent)
    return _MESSAGE.sub("``` {.text .message}", text)


def site_links(markdown: str, folder: Path) -> str:
    """Return the text of a page from `folder` with links to pages and pictures of the site.

    A link to another file of the repository becomes its label: the site does not know where the
    repository is.
    """
    names = {(ROOT / source).resolve(): name for name, source in PAGES.items()}

    def replaced(match: re.Match[str]) -> str:
        bang, label, target, anchor = match.groups()
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        path = (folder / target).resolve()
        docs = ROOT / "docs"
        name = names.get(path) or (str(path.relative_to(docs)) if path.is_relative_to(docs) else "")
        return f"{bang}[{label}]({name}{anchor or ''})" if name else label

    return _LINK.sub(replaced, markdown)
