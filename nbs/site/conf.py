"""The book as a site: `sphinx-build -M html . _docs -c nbs/site` at the top of the repository, after `pip install -e '.[site]'`.

The pages lie in _docs/html and are read from there; search shows excerpts too where they are served (`python -m http.server -d _docs/html`).
Nothing is executed (the notebooks hold their outputs) and nothing is fetched, neither now nor by a reader's browser.
A notebook's directives (`#| export`) and front matter (`- skip_exec: true`) become labels or vanish; formulas become MathML;
the API pages take their text from the docstrings and from the comment behind each parameter (nbdev's docments).
"""
import importlib, inspect, json, re, shutil, sys
from importlib.resources import files
from pathlib import Path

from docutils import nodes
from fastcore.docments import docments
from math_core import LatexError, LatexToMathML
from sphinx.util import logging

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import mbd

project, author, release = "MBD kit", "The MBD kit authors", mbd.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc"]
root_doc = "README"
SECTIONS = {      # what the side bar lists: caption -> files
    "The book": ["nbs/[0-9]*.ipynb"],
    "Exercises": ["nbs/exercises/**/*.ipynb", "nbs/exercises/**/*.md"],
    "Experiments": ["nbs/[a-z]*.ipynb"],
    "Executed runs": ["reports/**/*.ipynb"],
    "Library": ["_proc/api/*.rst"],
    "Repository": ["C*.md", "data/*.md", "reports/**/*.md"],
}
include_patterns = ["README.md", *(pattern.replace("**/*", "**") for patterns in SECTIONS.values() for pattern in patterns)]
exclude_patterns = ["**/.ipynb_checkpoints"]

smartquotes = False      # `--output` in a sentence stays what a shell takes

html_theme, html_title = "furo", f"MBD kit {release}"
html_static_path = ["static", str(files("ziamath") / "fonts/STIXTwoMath-Regular.ttf")]      # for formulas; not every system has such a font
html_css_files = ["site.css"]
html_show_sphinx = html_show_copyright = html_copy_source = html_show_sourcelink = False
html_math_renderer = "mathml"

nb_execution_mode, nb_merge_streams = "off", True
nb_ipywidgets_js = {}      # these would come from the network; a widget's static figure is shown instead
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]
myst_enable_extensions, myst_heading_anchors = ["dollarmath"], 4

autodoc_typehints, autodoc_typehints_description_target = "description", "documented_params"
autodoc_preserve_defaults, autodoc_member_order, add_module_names = True, "bysource", False
autodoc_inherit_docstrings = False

DIRECTIVE = re.compile(r"^#\|[ \t]*(\w+)[ \t]*(.*)\n?", re.M)


def cell_text(cell): return "".join(cell["source"])


def exports():
    "Module -> notebook that exports it, in the order of the book"
    found = {}
    for path in sorted((ROOT / "nbs").glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"][:2]:
            found |= {value: path for name, value in DIRECTIVE.findall(cell_text(cell)) if name == "default_exp"}
    return found


# ---- pages

def contents():
    "What the side bar lists"
    text = ""
    for caption, patterns in SECTIONS.items():
        pages = [p for pattern in patterns for p in sorted(ROOT.glob(pattern)) if ".ipynb_checkpoints" not in p.parts]
        if caption == "Library": pages = [ROOT / f"_proc/api/{name}.rst" for name in exports()]
        if pages: text += "\n```{toctree}\n:hidden:\n:caption: " + caption + "\n" + "\n".join(p.relative_to(ROOT).with_suffix("").as_posix() for p in pages) + "\n```\n"
    return text


def title_of(path, title):
    "Chapters carry their number, executed runs their preset and seed"
    number, run = re.match(r"(\d\d)_", path.name), re.match(r"\d+-\d+-(\w+)-seed(\d+)", path.parent.name)
    return f"{number[1]} {title}" if number else f"{title}: {run[1]}, seed {run[2]}" if run else title


def as_page(path, notebook):
    "A notebook as a reader wants it: without what speaks to nbdev alone"
    shown, module = [], None
    for cell in notebook["cells"]:
        directives = dict(DIRECTIVE.findall(cell_text(cell))) if cell["cell_type"] == "code" else {}
        module = directives.get("default_exp", module)
        text = DIRECTIVE.sub("", cell_text(cell)) if directives else cell_text(cell)
        if "hide" in directives or not text.strip(): continue
        if "export" in directives: cell["metadata"]["tags"] = [*cell["metadata"].get("tags", []), "export"]
        if cell["cell_type"] == "markdown" and text.startswith("# "):
            text = re.sub(r"^# (.*)", lambda m: "# " + title_of(path, m[1]), text)
            text = re.sub(r"\A(# .*\n+(?:>.*\n+)*)(?:- \w+: .*\n*)+", r"\1", text)
            if module: text = re.sub(r"\A(# .*\n+(?:>.*\n?)*)", rf"\1\n\nExports [`mbd.{module}`](/_proc/api/{module}.rst), from the cells with a blue edge.\n\n", text)
        shown.append({**cell, "source": text.strip("\n")})
    shown.sort(key=lambda c: not (c["cell_type"] == "markdown" and c["source"].startswith("# ")))      # what stands before the title comes behind it
    return {**notebook, "cells": shown}


def read(app, name, source):
    path = Path(app.env.doc2path(name))
    if name == root_doc: source[0] += contents()
    if path.suffix == ".ipynb": source[0] = json.dumps(as_page(path, json.loads(source[0])))


# ---- library

def write_api(app):
    "One short page for each module; autodoc fills it"
    folder = ROOT / "_proc/api"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = exports()
    for old in folder.glob("*.rst"):
        if old.stem not in wanted: old.unlink()
    for name, path in wanted.items():
        module = importlib.import_module(f"mbd.{name}")
        constants = [n for n in module.__all__ if not callable(getattr(module, n))]
        text = f"mbd.{name}\n{'=' * 30}\n\nBuilt in :doc:`/nbs/{path.stem}`.\n\n.. automodule:: mbd.{name}\n   :members:\n" + "   :inherited-members:\n" * (name == "schedule") + "\n"      # the steps of Schedule are methods of the classes it is built up from
        for n in constants: text += f".. autodata:: mbd.{name}.{n}\n" + "   :no-value:\n" * (len(repr(getattr(module, n))) > 200) + "\n"
        page = folder / f"{name}.rst"
        if not page.is_file() or page.read_text(encoding="utf-8") != text: page.write_text(text, encoding="utf-8")


def rst(text):
    "Markdown of a docstring as reStructuredText: code stays code, everything else is taken by the letter"
    return "".join(rf"\ ``{part}``\ " if i % 2 else re.sub(r"([\\*_|])", r"\\\1", part) for i, part in enumerate(text.split("`")))


def document(app, what, name, obj, options, lines):
    "A docstring, and below it what nbdev's docments say of each parameter"
    lines[:] = [] if what == "data" else rst("\n".join(lines)).split("\n")      # of a constant Python has only what its type says
    if what not in ("function", "method", "class"): return
    for parameter, comment in docments(obj).items():
        if comment: lines += ["", f":{'returns' if parameter == 'return' else 'param ' + parameter.replace('_', chr(92) + '_')}: {rst(comment)}"]


def keep(app, what, name, obj, skip, options):
    "A method whose parameters are explained is shown, even where a docstring would only repeat its name"
    if skip and not name.startswith("_") and inspect.isfunction(obj) and any(docments(obj).values()): return False


def tidy(app, tree):
    "`name (type): comment`, as it stands in the code, where Sphinx writes two hyphens"
    for text in list(tree.findall(nodes.Text)):
        if text == " -- ": text.parent.replace(text, nodes.Text(": "))


# ---- formulas

def mathml(writer, node):
    "MathML, which browsers draw themselves: no script"
    block, tex = isinstance(node, nodes.math_block), node.astext()
    try: formula = LatexToMathML().convert_with_local_state(tex, displaystyle=block)
    except LatexError as error:
        logging.getLogger(__name__).warning("a formula is not understood: %s: %s", error, tex, location=node)
        formula = f"<code>{writer.encode(tex)}</code>"
    writer.body.append(f'<div class="formula">{formula}</div>' if block else formula)
    raise nodes.SkipNode


def finish(app, exception):
    "The front page; and the tables of the studies, to which outputs of notebooks link"
    if exception or app.builder.format != "html": return
    shutil.copy(Path(app.outdir) / "README.html", Path(app.outdir) / "index.html")
    for table in ROOT.glob("reports/study_*/cells.csv"):
        place = Path(app.outdir) / table.relative_to(ROOT)
        place.parent.mkdir(parents=True, exist_ok=True); shutil.copy(table, place)


def setup(app):
    app.connect("builder-inited", write_api)
    app.connect("env-get-outdated", lambda *_: [root_doc])      # it lists the others, and there may be new ones
    app.connect("source-read", read)
    app.connect("autodoc-process-docstring", document)
    app.connect("autodoc-skip-member", keep)
    app.connect("doctree-read", tidy)
    app.connect("build-finished", finish)
    app.add_html_math_renderer("mathml", inline_renderers=(mathml, None), block_renderers=(mathml, None))
