"""Links lead somewhere: in the sources as they are written, and in the site built from them, which needs no network."""
import importlib, importlib.util, inspect, json, os, re, subprocess, sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit
import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(p for pattern in ("*.md", "data/*.md", "reports/**/*.md", "nbs/**/*.ipynb", "reports/**/*.ipynb") for p in ROOT.glob(pattern) if ".ipynb_checkpoints" not in p.parts)
pytestmark = pytest.mark.skipif(not (ROOT / "nbs").is_dir(), reason="an installed package has no notebooks")


# ---- sources

def prose(path):
    "The Markdown of a page or notebook, without code"
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb": text = "\n\n".join("".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "markdown")
    return re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.M | re.S)


def headings(path):
    "Anchors of a page, as GitHub and the site make them"
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in re.findall(r"^#{1,4} +(.*)$", prose(path), re.M)}


def links(path):
    text = re.sub(r"`[^`\n]*`(?!\])", "", prose(path))
    return re.findall(r"\]\(\s*<?([^)\s>]+)", text) + re.findall(r"""<(?:a|img)[^>]*(?:href|src)=["']([^"']+)""", text) + re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, re.M)


def broken(path):
    "(link, why) for the links of a page that lead nowhere in the repository; addresses on the network are not tried"
    for link in links(path):
        address = urlsplit(link)
        if address.scheme or address.netloc: continue
        target = (path.parent / unquote(address.path)).resolve() if address.path else path
        if not target.exists() or not target.is_relative_to(ROOT): yield link, "no such file in the repository"
        elif address.fragment and target.suffix in (".md", ".ipynb") and address.fragment not in headings(target): yield link, "no such heading"


@pytest.mark.parametrize("path", PAGES, ids=[p.relative_to(ROOT).as_posix() for p in PAGES])
def test_links_of_a_page_lead_to_files_and_headings(path):
    assert list(broken(path)) == []


def test_a_broken_link_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    page = tmp_path / "page.md"
    (tmp_path / "other.md").write_text("# One heading: `code`, and more\n")
    page.write_text("# Here\n[a](other.md#one-heading-code-and-more) [b](#here) [c](https://example.org/x) `[d](nothing.md)`\n```\n[e](nothing.md)\n```\n")
    assert list(broken(page)) == []
    page.write_text("[a](other.md#two) [b](missing.md) [`c`](../outside.md) <img src='no.png'>")
    assert [link for link, _ in broken(page)] == ["other.md#two", "missing.md", "../outside.md", "no.png"]


# ---- the site

class Page(HTMLParser):
    "What a page offers (ids) and what it asks for: links, and what a browser fetches by itself"
    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.fetched, self.text = set(), [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids |= {given[n] for n in ("id", "name") if given.get(n)}
        if tag == "a" and given.get("href"): self.links.append(given["href"])
        if tag in ("link", "use") and given.get("href"): self.fetched.append(given["href"])
        if given.get("src"): self.fetched.append(given["src"])

    def handle_data(self, data): self.text.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if not all(importlib.util.find_spec(n) for n in ("sphinx", "myst_nb", "furo")): pytest.skip("pip install -e '.[site]'")
    folder = tmp_path_factory.mktemp("site")
    before = set(ROOT.iterdir())
    command = [sys.executable, "-m", "sphinx", "-M", "html", ".", str(folder), "-c", "nbs/site", "-W", "--keep-going"]
    ended = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=1200)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert {p.name for p in set(ROOT.iterdir()) - before} <= {"_proc"}      # which git ignores
    return {p: Page(p) for p in (folder / "html").rglob("*.html")}


@pytest.mark.slow
def test_every_page_is_built_and_every_link_and_anchor_of_the_site_leads_somewhere(site):
    folder = next(p.parent for p in site if p.name == "index.html")
    built = {p.relative_to(folder).with_suffix("").as_posix() for p in site}
    assert {p.relative_to(ROOT).with_suffix("").as_posix() for p in PAGES} <= built and {"index", "search"} <= built
    nowhere = []
    for path, page in site.items():
        for link in page.links + page.fetched:
            address = urlsplit(link)
            if address.scheme or address.netloc: continue
            target = (path.parent / unquote(address.path)).resolve() if address.path else path
            if not target.is_file() or address.fragment and target in site and unquote(address.fragment) not in site[target].ids | {"", "top"}: nowhere.append((path.name, link))
    assert nowhere == [] and sum(len(p.links) for p in site.values()) > 1000


@pytest.mark.slow
def test_nothing_is_fetched_from_the_network(site):
    folder = next(p.parent for p in site if p.name == "index.html")
    assert [(path.name, f) for path, page in site.items() for f in page.fetched if urlsplit(f).scheme not in ("", "data") or urlsplit(f).netloc] == []
    for sheet in folder.rglob("*.css"): assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet.name


@pytest.mark.slow
def test_pages_show_every_public_name_every_parameter_formulas_and_no_directives(site):
    from fastcore.docments import docments
    folder = next(p.parent for p in site if p.name == "index.html")
    page = {p.relative_to(folder).as_posix(): p for p in site}
    for name in (p.stem for p in (folder / "_proc/api").glob("*.html")):
        module, found = importlib.import_module(f"mbd.{name}"), site[page[f"_proc/api/{name}.html"]]
        missing = {n for n in module.__all__ if f"mbd.{name}.{n}" not in found.ids}
        assert not missing, f"mbd.{name}: not on its page: {missing}"
        text = "".join(found.text)
        for function in (getattr(module, n) for n in module.__all__ if inspect.isfunction(getattr(module, n))):
            for comment in filter(None, docments(function).values()): assert " ".join(comment.replace("`", "").split()) in " ".join(text.split()), (function.__qualname__, comment)
    chapter = page["nbs/09_dominance.html"].read_text(encoding="utf-8")
    assert "<math" in chapter and "$$" not in chapter
    for path, found in site.items():
        if path.name == "CONTRIBUTING.html": continue      # it explains them
        assert "#| " not in "".join(found.text) and "skip_exec:" not in "".join(found.text), path.name
