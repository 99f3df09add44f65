"""The documentation site: links work as in the repository, and a broken link stops the build."""

import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="mkdocs is not installed (pip install -e .[docs])")
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

ROOT = Path(__file__).parent.parent
PAGE = """# Guide

[here](#guide) [up](../README.md) [code](../source/op.py) [folder](../source) [own README](../other)
![picture](dot.png) <a href="../README.md">home</a> <img src="dot.png"> <a href="../source/op.py">code</a>
"""


@pytest.fixture
def make_site(tmp_path):
    """A function that builds the site of a small repository with a page, and returns the folder of the site."""

    def make(page: str) -> Path:
        for folder in ("docs", "source", "other"):
            (tmp_path / folder).mkdir()
        shutil.copy(ROOT / "docs" / "mirror.py", tmp_path / "docs")
        (tmp_path / "README.md").write_text("# Home\n\n[guide](docs/guide.md#guide)\n")
        (tmp_path / "other" / "README.md").write_text("# Other\n")
        (tmp_path / "source" / "op.py").write_text('"""Not a link: [no](nowhere.md)."""\n')
        (tmp_path / "docs" / "guide.md").write_text(page)
        (tmp_path / "docs" / "dot.png").write_bytes(b"a picture")
        (tmp_path / "docs" / "site.css").write_text("/* a style */")
        config = (ROOT / "mkdocs.yml").read_text()
        sections = [re.search(rf"^{key}:.*\n(?: .*\n)*", config, re.MULTILINE)[0] for key in ("hooks", "validation")]
        text = "".join(["site_name: small\nuse_directory_urls: false\nplugins: []\n", *sections])
        (tmp_path / "mkdocs.yml").write_text(text)
        build(load_config(str(tmp_path / "mkdocs.yml"), strict=True))
        return tmp_path / "site"

    return make


def test_links_lead_to_the_pages_of_files_and_folders(make_site):
    site = make_site(PAGE)
    text = (site / "docs" / "guide.html").read_text()
    links = re.findall(r'(?:href|src)="([^"#]+)"', text[text.index("<h1") :])
    targets = ["../index.html", "../source/op.py.html", "../source.html", "../other/index.html", "dot.png"]
    assert [link for link in links if link in targets] == [*targets, "../index.html", "dot.png", "../source/op.py.html"]
    for link in [*targets, "site.css"]:
        assert (site / "docs" / link).is_file(), link
    assert "[no](nowhere.md)" in re.sub(r"<[^>]*>", "", (site / "source" / "op.py.html").read_text())
    assert "op.py" in (site / "source.html").read_text()


@pytest.mark.parametrize(
    "broken",
    ["[page](nowhere.md)", "[anchor](#nowhere)", "[other](../README.md#nowhere)", '<img src="nowhere.png">'],
)
def test_broken_link_stops_the_build(make_site, broken):
    with pytest.raises(Abort):
        make_site(f"{PAGE}\n{broken}\n")
