"""JupyterLab in a real browser: notebooks opened, run from the menu and seen to the end, as a reader sees them. Pictures of every page lie in pytest's temporary folder."""
import json, os, shlex, shutil, subprocess, sys, time
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
# cells that answer in seconds
SHORT = ["import time\nfrom mbd import plots\nfrom mbd.experiment import Progress", "show = Progress('counting')\nfor n in range(5): time.sleep(.2); show(n + 1, 5)", "plots.style(); plots.method()"]

sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e '.[dev]'")
pytestmark = [pytest.mark.skipif(not BROWSER, reason=f"no browser: none of {', '.join(NAMES)} is installed"), pytest.mark.skipif(not (ROOT / "nbs").is_dir(), reason="an installed package has no notebooks")]


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    "A copy of what JupyterLab is started on; the notebooks have no outputs yet, and nothing of the checkout or of the user's own Jupyter is touched."
    folder = tmp_path_factory.mktemp("browser") / "kit"
    skip = shutil.ignore_patterns(".ipynb_checkpoints")
    shutil.copytree(ROOT / "nbs", folder / "nbs", ignore=skip)
    shutil.copytree(ROOT / "nbs", folder / "nbs/committed", ignore=skip)      # with their outputs
    shutil.copy(ROOT / "settings.ini", folder)
    shutil.copytree(ROOT / "reports", folder / "reports")      # the tour shows committed results
    for path in (folder / "nbs").glob("*.ipynb"):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code": cell.update(outputs=[], execution_count=None)
        path.write_text(json.dumps(notebook), encoding="utf-8")
    return folder


def instead(sources):
    "A change of a notebook's cells: these sources, in place of all."
    def change(cells): cells[:] = [{"cell_type": "code", "id": f"cell{n}", "metadata": {}, "outputs": [], "execution_count": None, "source": source} for n, source in enumerate(sources)]
    return change


def asked(source):
    "A change of a notebook's cells: this cell of parameters."
    def change(cells): next(c for c in cells if "parameters" in c["metadata"].get("tags", ()))["source"] = source
    return change


@pytest.fixture(scope="module")
def lab(kit):
    "JupyterLab as the development container starts it: its address."
    base = kit.parent
    settings = base / "config/lab/user-settings/@jupyterlab"
    for name, values in {"apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False}, "notebook-extension/tracker": {"windowingMode": "none"}}.items():      # every cell stays in the page, seen or not
        path = settings / f"{name}.jupyterlab-settings"; path.parent.mkdir(parents=True, exist_ok=True); path.write_text(json.dumps(values))
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("MBD_", "JUPYTER", "MPLBACKEND"))}
    environment = {**kept, "JUPYTER_CONFIG_DIR": str(base / "config"), "JUPYTER_DATA_DIR": str(base / "data"), "JUPYTER_RUNTIME_DIR": str(base / "runtime"), "IPYTHONDIR": str(base / "ipython"),
                   "PYTHONPATH": str(ROOT), "MBD_CACHE": str(base / "cache"), "MBD_DEVICE": "cpu", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    with open(base / "lab.log", "w") as log:
        typed = shlex.split(json.loads((ROOT / ".devcontainer/devcontainer.json").read_text())["postAttachCommand"])
        words = [sys.executable, "-m", *typed, "--ServerApp.port=0", "--IdentityProvider.token=token"]
        server = subprocess.Popen(words, cwd=kit, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(3000):
            found = list((base / "runtime").glob(f"jpserver-{server.pid}.json"))
            if found and found[0].stat().st_size: break
            assert server.poll() is None, (base / "lab.log").read_text()[-3000:]
            time.sleep(.1)
        yield json.loads(found[0].read_text())["url"]
    finally:
        server.terminate()
        server.wait(60)


@pytest.fixture(scope="module")
def context(lab, tmp_path_factory):
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch_persistent_context(str(tmp_path_factory.mktemp("profile")), executable_path=BROWSER, headless=True, args=FLAGS, viewport={"width": 1280, "height": 1400})
        browser.set_default_timeout(240_000)      # a busy machine is no error
        yield browser
        browser.close()


def run_all(context, lab, name, seconds, pictures):
    "Open a notebook, choose Run All Cells, wait until the last cell is done. The page, with the notebook in it, and how many bars were seen while it ran."
    page = context.new_page()
    page.goto(f"{lab}lab/tree/{name}?token=token&reset")
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()      # the notebook names a kernel that there is: nobody is asked
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    bars, end = 0, time.monotonic() + seconds
    prompts, moving = page.locator(".jp-CodeCell .jp-InputArea-prompt"), page.locator(".jp-OutputArea .widget-hbox .widget-hprogress:visible")
    while True:
        texts, seen = prompts.all_inner_texts(), moving.count()
        if seen > bars:
            bars = seen
            moving.last.scroll_into_view_if_needed()      # JupyterLab has gone to the last cell
            page.screenshot(path=pictures / f"running-{bars}.png")
        if all(t.strip("[]: ").isdecimal() for t in texts): break
        assert not errors(page), errors(page)
        assert time.monotonic() < end, f"{name} is not done after {seconds} s: {texts}"
        page.wait_for_timeout(500)
    page.wait_for_timeout(1000)
    return page, bars


BROKEN = ("Error displaying widget", "Loading widget", "Math Processing Error", "<Figure size")


def errors(page):
    "Tracebacks on the page. JupyterLab gives them the type of any text on stderr."
    return [text for text in page.locator('.jp-Notebook [data-mime-type="application/vnd.jupyter.stderr"]').all_inner_texts() if "Traceback (most recent call last)" in text]


def photograph(page, pictures):
    "The notebook from top to bottom, a picture a screen."
    box = page.evaluate_handle("[...document.querySelectorAll('.jp-NotebookPanel *')].find(e => ['auto', 'scroll'].includes(getComputedStyle(e).overflowY) && e.querySelector('.jp-Cell'))")
    top, last = box.evaluate("e => e.scrollTop = 0"), -1
    while top != last:
        page.wait_for_timeout(300)
        page.screenshot(path=pictures / f"page-{top:06.0f}.png")
        last, top = top, box.evaluate("e => { e.scrollTop += e.clientHeight - 60; return e.scrollTop }")


def change_cells(kit, name, change):
    path = kit / "nbs" / name
    notebook = json.loads(path.read_text(encoding="utf-8")); change(notebook["cells"]); path.write_text(json.dumps(notebook), encoding="utf-8")


def test_a_cell_that_fails_is_noticed(kit, lab, context, tmp_path):
    change_cells(kit, "06_plots.ipynb", instead(["1/0", "print('never')"]))
    with pytest.raises(AssertionError, match="ZeroDivisionError"): run_all(context, lab, "06_plots.ipynb", 60, tmp_path)


@pytest.mark.parametrize("name, change, seconds, bars, figures", [      # at most so long; at least so many progress bars and figures
    pytest.param("06_plots.ipynb", instead(SHORT), 300, 1, 1, id="short"),
    pytest.param("00_tour.ipynb", None, 1500, 4, 7, id="tour", marks=pytest.mark.slow),
    pytest.param("demo.ipynb", None, 900, 1, 3, id="demo", marks=pytest.mark.slow),
    pytest.param("run_ucf101.ipynb", asked("preset = 'smoke'"), 900, 8, 10, id="run", marks=pytest.mark.slow),      # of the strips there are as many as cases were found
])
def test_a_notebook_runs_and_is_seen(kit, lab, context, tmp_path, name, change, seconds, bars, figures):
    if change: change_cells(kit, name, change)
    page, seen = run_all(context, lab, name, seconds, tmp_path)
    photograph(page, tmp_path)
    assert not errors(page)
    assert seen >= bars      # while it ran, not only after
    texts = page.locator(".jp-OutputArea .widget-hbox").all_inner_texts()
    assert len(texts) >= bars and all("100%" in t for t in texts), texts      # every bar came to its end
    sizes = page.locator(".jp-OutputArea .jp-RenderedImage img:visible").evaluate_all("list => list.map(i => [i.complete && i.naturalWidth, i.clientWidth])")
    assert len(sizes) >= figures and all(natural > 100 and shown > 100 for natural, shown in sizes), sizes
    shown = page.locator(".jp-Notebook").inner_text()
    for word in BROKEN: assert word not in shown, word
    page.close()


@pytest.mark.slow
def test_every_notebook_is_readable_as_it_is_committed(kit, lab, context, tmp_path):
    "Opened, nothing run: every picture there, every formula set, no widget that is only a promise."
    names = sorted(p.relative_to(kit / "nbs").as_posix() for p in (kit / "nbs/committed").rglob("*.ipynb"))
    assert len(names) > 40
    found = {}
    for name in names:
        page = context.new_page()
        page.goto(f"{lab}lab/tree/{name}?token=token&reset")
        page.locator(".jp-Notebook .jp-MarkdownCell .jp-RenderedMarkdown").first.wait_for()
        page.wait_for_function("[...document.querySelectorAll('.jp-Notebook img')].every(i => i.complete)")
        shown = page.locator(".jp-Notebook").inner_text()
        faults = [word for word in BROKEN if word in shown]
        faults += page.locator(".jp-Notebook img").evaluate_all("list => list.filter(i => !i.naturalWidth).map(i => 'no picture: ' + i.src.slice(0, 80))")
        faults += page.locator(".jp-Notebook mjx-merror").all_inner_texts()
        if "$$" in page.locator(".jp-Notebook .jp-RenderedMarkdown").evaluate_all("list => list.map(e => e.innerText).join(' ')"): faults.append("a formula that is not set: $$")
        if faults: found[name] = faults; page.screenshot(path=tmp_path / f"{Path(name).stem}.png")
        page.close()
        for kernel in context.request.get(f"{lab}api/kernels?token=token").json(): context.request.delete(f"{lab}api/kernels/{kernel['id']}?token=token")
    assert not found, found
