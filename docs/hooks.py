"""Pages of the site that are files of the repository, and links that lead out of docs/."""

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
# Files that a page includes as a whole: links to them lead to that page.
PAGES = {"l2t_fast/README.md": "python.md", "CHANGELOG.md": "changelog.md"}


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """What mkdocs calls for each page."""
    here = DOCS / page.file.src_uri
    pictures: set[str] = set()
    text = re.sub(
        r"<!-- include (\S+?)(?:#(\S+))? -->\n.*\n",
        lambda found: relinked(part(ROOT / found[1], found[2]), (ROOT / found[1]).parent, here, pictures),
        relinked(markdown, here.parent, here, pictures),
    )
    for name in pictures - {file.src_uri for file in files}:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return text


def part(path: Path, section: str | None) -> str:
    """A file without its title, or one section of it, which is named as in a link."""
    text = path.read_text(encoding="utf-8")
    if section is None:
        return text.partition("\n")[2]
    for piece in re.split(r"^(?=## )", text, flags=re.MULTILINE)[1:]:
        title, _, body = piece.partition("\n")
        if re.sub(r"[^\w -]", "", title[3:].lower()).replace(" ", "-") == section:
            return body
    raise ValueError(f"{path} has no section {section}")


def relinked(text: str, folder: Path, page: Path, pictures: set[str]) -> str:
    """A text that stands in `folder`, for `page`: links out of docs/ name the path instead, pictures come along."""

    def link(found: re.Match[str]) -> str:
        picture, words, path, anchor = found[1], found[2], found[3], found[4] or ""
        target = Path(os.path.normpath(folder / path))
        name = target.relative_to(ROOT).as_posix()
        target = DOCS / PAGES[name] if name in PAGES else target
        if picture and not target.is_relative_to(DOCS):
            pictures.add(name)
            return f"![{words}]({os.path.relpath(DOCS / name, page.parent)})"
        if target.is_relative_to(DOCS):
            return f"{picture}[{words}]({os.path.relpath(target, page.parent)}{anchor})"
        return f"{words.strip('`')} (`{name}`)" if words.strip("`") != name else f"`{name}`"

    return re.sub(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)#\s]+)(#[^)]*)?\)", link, text)
