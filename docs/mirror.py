"""MkDocs hooks: the site mirrors the repository, so the links of a page work both on the forge and on the site.

Every file keeps its path. The site has the Markdown files of the root and of `docs/`, and all files that they link to:
Markdown, notebooks and pictures unchanged, a source file as a page that shows it, a folder as a page that lists its
files.
"""

import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
MARKDOWN_LINK = re.compile(r"(?<=\]\()[^)#\s]+")
# href, src, srcset.
HTML_LINK = re.compile(r'(?<=(?:ref|src|set)=")[^"#]+')
UNCHANGED = {".css", ".ipynb", ".md", ".jpg", ".png", ".svg"}
LANGUAGES = {".cff": "yaml", ".cuh": "cuda", ".cu": "cuda", ".h": "cpp", ".py": "python"}
"""Names that the highlighter does not derive from the suffix."""
# A logger below `mkdocs`, whose warnings --strict counts.
log = logging.getLogger("mkdocs.mirror")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The files of the site: the theme's, the pages, and the files that pages link to."""
    mirrored = Files([file for file in files if file.src_dir != config.docs_dir])
    for stylesheet in (ROOT / "docs").glob("*.css"):
        mirrored.append(site_file(stylesheet, config))
    waiting = {*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")}
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        mirrored.append(site_file(path, config))
        if path.suffix == ".md":
            new = set(linked(path)) - seen
            waiting |= new
            seen |= new
    return mirrored


def site_file(path: Path, config: MkDocsConfig) -> File:
    """The site's file for a file of the repository; a source file or a folder gets a generated page."""
    name = path.relative_to(ROOT).as_posix()
    if path.suffix in UNCHANGED:
        return File(name, str(ROOT), config.site_dir, use_directory_urls=False)
    if path.is_dir():
        body = "\n".join(f"- `{child.name}`" for child in sorted(path.iterdir()) if child.name != "__pycache__")
    else:
        language = LANGUAGES.get(path.suffix, path.suffix.removeprefix("."))
        body = f"~~~~~~{language}\n{path.read_text()}\n~~~~~~"
    content = f"---\nsearch: {{exclude: true}}\n---\n# {name}\n\n{body}\n"
    return File.generated(config, f"{name}.md", content=content)


def linked(page: Path) -> Iterator[Path]:
    """The files and folders of the repository that a Markdown file links to."""
    text = page.read_text()
    for target in (*MARKDOWN_LINK.findall(text), *HTML_LINK.findall(text)):
        if path := find(page, target):
            yield path


def find(page: Path, target: str) -> Path | None:
    """The file or folder that a link leads to, or a folder's README; None if it is not in the repository."""
    path = Path(os.path.normpath(page.parent / target))
    if (path / "README.md").is_file():
        path /= "README.md"
    return path if path.exists() and path.is_relative_to(ROOT) else None


def on_page_markdown(markdown: str, page: Page, **_: object) -> str | None:
    """The page with its links to source files and folders replaced by links to the pages that show them."""
    if page.file.generated_by:
        return None
    source = ROOT / page.file.src_uri

    def to_page(match: re.Match[str]) -> str:
        path = find(source, match[0])
        return relative(path, source) if path else match[0]

    def to_html(match: re.Match[str]) -> str:
        path = find(source, match[0])
        if not path and ":" not in match[0]:
            log.warning("%s links to %s, which does not exist.", page.file.src_uri, match[0])
        if not path:
            return match[0]
        name = PurePosixPath(relative(path, source))
        if name.suffix != ".md":
            return str(name)
        return str(name.with_name("index.html") if name.name == "README.md" else name.with_suffix(".html"))

    return HTML_LINK.sub(to_html, MARKDOWN_LINK.sub(to_page, markdown))


def relative(path: Path, page: Path) -> str:
    """The page of the site that shows a path, relative to another page."""
    name = Path(os.path.relpath(path, page.parent)).as_posix()
    return name if path.suffix in UNCHANGED else f"{name}.md"
