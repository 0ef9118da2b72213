"""MkDocs hook: links from a page to files outside docs/ lead to the repository, after a check that the file exists.

On GitHub, pages link to code, notebooks and other folders by relative paths. On the site these files do not exist.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?P<before>\]\()(?P<path>(?:\.\./)+[^)\s#]*)(?P<anchor>#[^)\s]*)?(?P<after>\))")

log = logging.getLogger("mkdocs.hooks.site_links")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """The page with its links out of docs/ made absolute; a link to a missing file is a warning, an error if strict."""
    source = Path(page.file.abs_src_path)

    def absolute(link: re.Match[str]) -> str:
        target = (source.parent / link["path"]).resolve()
        if target.is_relative_to(Path(config.docs_dir)):
            return link[0]
        if not target.exists():
            log.warning("%s links to %s, which does not exist.", source.name, link["path"])
            return link[0]
        kind = "tree" if target.is_dir() else "raw" if target.suffix in (".png", ".svg") else "blob"
        address = f"{config.repo_url.rstrip('/')}/{kind}/main/{target.relative_to(ROOT).as_posix()}"
        return f"{link['before']}{address}{link['anchor'] or ''}{link['after']}"

    return LINK.sub(absolute, markdown)
