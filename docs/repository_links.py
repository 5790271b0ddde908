"""A hook of mkdocs: links from the documentation to files of the repository lead to pages that show them.

The rule, on GitHub and on the site alike: a link names a file or folder of the repository by its path from the page. One that is not
part of the site gets a page below `source/` here; one that does not exist is a warning, which `mkdocs build --strict` makes an error.
"""

import logging
import os
import re
from pathlib import Path

from mkdocs.structure.files import File


LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)#\s]+)")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".js": "js", ".html": "html", ".toml": "toml"}
log = logging.getLogger("mkdocs.hooks.repository_links")


def target_of(link: str, src_uri: str, config) -> Path | None:
    """The file or folder of the repository that a page's link names; None for one that is part of the site."""
    docs = Path(config.docs_dir)
    path = Path(os.path.normpath((docs / src_uri).parent / link))
    return None if path.is_relative_to(docs) and path.suffix in (".md", ".png") else path


def root_of(config) -> Path:
    return Path(config.config_file_path).parent


def source_uri(path: Path, config) -> str:
    return f"source/{path.relative_to(root_of(config)).as_posix()}.md"


def source_page(path: Path, config) -> str:
    """Markdown that shows a file, or lists the files of a folder."""
    name = path.relative_to(root_of(config)).as_posix()
    head = f"---\nsearch:\n  exclude: true\n---\n\n# `{name}`\n\n"
    if path.is_dir():
        return head + "\n".join(f"- `{each.name}`" for each in sorted(path.iterdir()) if each.name != "__pycache__")
    return f"{head}````{LANGUAGES.get(path.suffix, 'text')}\n{path.read_text()}\n````\n"


def on_files(files, config):
    """Adds a page for each file of the repository that a page links to."""
    for page in list(files.documentation_pages()):
        for link in LINK.findall(page.content_string):
            path = target_of(link, page.src_uri, config)
            if path is None:
                continue
            if not path.exists() or not path.is_relative_to(root_of(config)):
                log.warning(f"{page.src_uri} links to {link!r}, which is no file of the repository.")
            elif files.get_file_from_path(source_uri(path, config)) is None:
                files.append(File.generated(config, source_uri(path, config), content=source_page(path, config)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Points the links of a page to these."""
    if page.file.src_uri.startswith("source/"):
        return markdown

    def replaced(match: re.Match) -> str:
        path = target_of(match[1], page.file.src_uri, config)
        if path is None or files.get_file_from_path(source_uri(path, config)) is None:
            return match[0]
        return os.path.relpath(source_uri(path, config), Path(page.file.src_uri).parent)

    return LINK.sub(replaced, markdown)
