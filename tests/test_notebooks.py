"""The book and its package agree, the chapters run, and the experiment ends with a whole record."""
import ast, json, os, re, shutil, subprocess, sys
from pathlib import Path
import pytest
from mbd import experiment

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
NOTEBOOKS = sorted(p for p in NBS.rglob("*.ipynb") if not p.name.startswith(".") and ".ipynb_checkpoints" not in p.parts)
CHAPTERS = [p for p in NOTEBOOKS if p.parent == NBS and re.match(r"\d\d_", p.name)]
BOOK = [*CHAPTERS, NBS / "analyse.ipynb", NBS / "compare.ipynb"]      # what runs from top to bottom without parameters
HEAVY = "00_tour|04_miniactions|13_training|14_features|15_prediction"      # a minute of processor time each, and more
LATER = {"training": {"evaluation"}}      # which scores what was trained; everything else points down the book
TOOLS = Path(sys.executable).parent      # not resolved: in a virtual environment the console scripts are beside the link
pytestmark = pytest.mark.skipif(not NOTEBOOKS, reason="an installed package has no notebooks")


def tool(name):
    path = shutil.which(name, path=str(TOOLS))
    if not path: pytest.skip(f"{name} is not installed beside {Path(sys.executable).name}")
    return path


def cells(path): return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell): return "".join(cell["source"])


def names(paths): return [p.relative_to(NBS).as_posix() for p in paths]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    "As for somebody who has just installed the kit: this interpreter as kernel, data and caches of its own."
    base = tmp_path_factory.mktemp("environment")
    kernel = base / "jupyter/kernels/python3"
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text(json.dumps({"argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"], "display_name": "Python 3", "language": "python"}))
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("MBD_", "JUPYTER_", "GIT_", "OMP_", "MPLBACKEND"))}
    return {**kept, "PATH": f"{TOOLS}{os.pathsep}{kept.get('PATH', '')}", "JUPYTER_PATH": str(base / "jupyter"), "IPYTHONDIR": str(base / "ipython"), "PYTHONPATH": str(ROOT),
            "MBD_DATA_MINIACTIONS": str(base / "miniactions"), "MBD_CACHE": str(base / "cache"), "MBD_DEVICE": "cpu", "MBD_PROGRESS": "lines", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}


def git(folder, *words): return subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "core.autocrlf=false", "-c", "core.hooksPath=/dev/null", "-C", str(folder), *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    "A copy of what git knows, as it stands in the working tree, committed in a repository of its own."
    try: listed = git(ROOT, "ls-files", "-z").split("\0")
    except (OSError, subprocess.CalledProcessError): listed = []
    if "pyproject.toml" not in listed: pytest.skip("not a git checkout of the kit")
    copy = tmp_path_factory.mktemp("tree") / "kit"
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    git(copy, "init", "-q"); git(copy, "add", "-A"); git(copy, "commit", "-q", "-m", "copy")
    return copy


# ---- the book as it is written

@pytest.mark.parametrize("name", ["nbdev-export", "nbdev-clean"])
def test_export_and_clean_leave_no_diff(tree, environment, name):
    ended = subprocess.run([tool(name)], cwd=tree, env={**environment, "PYTHONPATH": str(tree)}, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-2000:]
    changed = git(tree, "status", "--porcelain")
    git(tree, "checkout", "-q", "--", "."); git(tree, "clean", "-qfd")
    assert changed == "", f"{name} changes files; run it and commit:\n{changed}"


@pytest.mark.parametrize("path", CHAPTERS, ids=names(CHAPTERS))
def test_a_chapter_opens_with_its_module_title_and_subtitle(path):
    first = cells(path)
    exports = [re.search(r"^#\|\s*default_exp\s+(\w+)\s*$", source(c), re.M) for c in first if c["cell_type"] == "code"]
    if path.name != "00_tour.ipynb":
        module = exports[0]
        assert module and module[1] == path.stem[3:] and (ROOT / f"mbd/{module[1]}.py").is_file() and source(first[0]).startswith("#|")
    title = next(source(c) for c in first if c["cell_type"] == "markdown")
    assert re.match(r"# [^#\s].*\n+> \S", title), title[:80]
    assert [c["cell_type"] for c in first[:2]].count("markdown") >= 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names(NOTEBOOKS))
def test_stored_outputs_hold_no_errors_no_machine_paths_no_widgets_and_are_small(path):
    assert "widgets" not in json.loads(path.read_text(encoding="utf-8"))["metadata"], f"{path.name}: the state of widgets is stored; run nbdev-clean"
    for number, cell in enumerate(cells(path)):
        for output in cell.get("outputs", ()):
            text = json.dumps({k: v for k, v in output.items() if k != "data"} | {k: v for k, v in output.get("data", {}).items() if not k.startswith("image/png")})
            where = f"{path.name}, cell {number}"
            assert output["output_type"] != "error" and "Traceback (most recent call last)" not in text, f"{where}: an error is stored"
            found = re.search(r"(?<![\w.])/(tmp|home|root|Users|work|mnt|opt|var/folders|private)/[\w.-]|[A-Z]:\\\\+Users", text)
            assert not found, f"{where}: a path of this machine is stored: ...{text[max(0, found.start() - 20):found.end() + 40]}"
            assert not any("widget" in kind for kind in output.get("data", {})), f"{where}: a widget is stored, which nobody can use without a kernel; execute with nbconvert"
            assert len(json.dumps(output)) <= 300_000, f"{where}: an output of {len(json.dumps(output))} bytes"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=names(NOTEBOOKS))
def test_sources_hold_no_machine_paths_and_code_cells_are_not_empty(path):
    for number, cell in enumerate(cells(path)):
        found = re.search(r"(?<![\w.:])/(tmp|home|root|Users|work|mnt|opt)/\w", source(cell))
        assert not found, f"{path.name}, cell {number}: {source(cell)[max(0, found.start() - 20):found.end() + 40]}"
        assert source(cell).strip(), f"{path.name}, cell {number} is empty"


@pytest.mark.parametrize("path", CHAPTERS, ids=names(CHAPTERS))
def test_a_module_imports_only_earlier_chapters(path):
    order = [p.stem[3:] for p in CHAPTERS]
    module = ROOT / "mbd" / f"{path.stem[3:]}.py"
    if not module.is_file(): return
    used = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level: used |= {node.module} if node.module else {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mbd"): used |= {node.module[4:]} if node.module != "mbd" else {a.name for a in node.names}
    later = {m for m in used & set(order) if order.index(m) > order.index(path.stem[3:])}      # itself it may name: a fresh process finds a function by its module
    assert later <= LATER.get(path.stem[3:], set()), f"{path.name}: its module imports from later chapters: {sorted(later)}"


# ---- the book run

@pytest.mark.parametrize("names", [rf"^(?!{HEAVY})(\d\d_|analyse|compare).*\.ipynb$", pytest.param(rf"^({HEAVY}).*\.ipynb$", marks=pytest.mark.slow)], ids=["light", "heavy"])
def test_every_chapter_runs_top_to_bottom(tree, environment, names):
    before = git(tree, "status", "--porcelain")
    command = [tool("nbdev-test"), "nbs", "--n-workers", "2", "--file-re", names, "--timing", "--do-print"]
    ended = subprocess.run(command, cwd=tree, env={**environment, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1200)
    failed = re.findall(r"Error in cell .*? in (.*)|Error in notebook:?\s*(.*)", ended.stdout)
    print(ended.stdout[-3000:])
    assert ended.returncode == 0, f"failed: {failed}\n{ended.stdout[-6000:]}"
    ran = set(re.findall(r"- Completed (?:.*/)?(\w+\.ipynb)", ended.stdout))
    assert ran == {p.name for p in BOOK if re.match(names, p.name)} and len(ran) > 2, ended.stdout[-3000:]
    assert git(tree, "status", "--porcelain") == before      # nothing is left behind


@pytest.fixture(scope="module")
def smoke(tree, environment, tmp_path_factory):
    "run_ucf101 by papermill at smoke: (finished process, executed notebook, folder of reports)."
    return papermill(tree, environment, tmp_path_factory.mktemp("smoke"), "-p", "preset", "smoke")


def papermill(tree, environment, folder, *words):
    pytest.importorskip("papermill"), pytest.importorskip("ipykernel")
    command = [sys.executable, "-m", "papermill", "nbs/run_ucf101.ipynb", str(folder / "out.ipynb"), "-p", "reports", str(folder / "reports"), "--log-output", "--no-progress-bar", *words]
    ended = subprocess.run(command, cwd=tree, env={**environment, "PYTHONPATH": str(tree)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1200)
    return ended, folder / "out.ipynb", folder / "reports"


def test_run_ucf101_ends_with_a_complete_record(smoke):
    ended, _, reports = smoke
    assert ended.returncode == 0, ended.stdout[-6000:]
    [record] = experiment.read_runs(reports)
    assert record["status"] == "complete" and record["folder"].parent.name == "ucf101-generated"
    record = json.loads((record["folder"] / "result.json").read_text())
    experiment.check_record(record)
    assert (record["experiment"], record["preset"], record["data"]["name"], record["data"]["layout"]) == ("ucf101", "smoke", "miniactions", "ucf101")
    for name, part in record["data"].items():
        if name in ("fit", "map", "gate", "test"): assert part["expected"] == part["found"] > 0 == part["unreadable"], (name, part)
    assert record["data"]["test"]["found"] >= 40 and sum(record["data"][n]["found"] for n in ("fit", "map", "gate")) >= 80
    assert [s["name"] for s in record["stages"] if s["epochs"]] == ["warm-up", "distil", "control"] and all(s["flops"] > 0 and s["seconds"] > 0 for s in record["stages"] if s["epochs"])
    assert record["control"]["kind"] == "equal steps" and set(record["control"]["top1"]) == set(record["top1"])


def test_run_ucf101_files_everything(smoke):
    [record] = experiment.read_runs(smoke[2])
    folder = record["folder"]
    assert {"parameters.json", "result.json", "log.csv", "dominance.csv", "predictions.npz", "figures", "checkpoints"} <= {p.name for p in folder.iterdir()}
    figures = {p.stem for p in (folder / "figures").glob("*.png")}
    assert {"videos", "dominance_warm_up", "curves", "accuracy", "dominance", "share_against_range", "confusion_local", "confusion_global", "confusion_adaptive"} <= figures
    assert all((folder / "figures" / f"{f}.png").read_bytes().startswith(b"\x89PNG") for f in figures)
    kept = experiment.load_predictions(folder / "predictions.npz")
    assert len(set(kept["ids"])) == record["data"]["test"]["found"] == len(kept["labels"]) and kept["local_logits"].shape == (len(kept["ids"]), 10)
    right = kept["local_logits"].argmax(1) == kept["labels"]
    assert right.mean() == pytest.approx(record["top1"]["local"], abs=1e-6)
    assert json.loads((folder / "parameters.json").read_text())["given"]["preset"] == "smoke"
    rows = (folder / "log.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 3 and all(any(r.startswith(stage) for r in rows) for stage in ("warm-up", "distil", "control"))
    assert not [p for p in folder.rglob("*") if p.name.startswith(".")]      # no half-written files


def test_run_ucf101_leaves_a_model_that_answers_as_recorded(smoke):
    import torch
    from mbd.dominance import DominanceMap
    from mbd.model import MBD
    [record] = experiment.read_runs(smoke[2])
    model, kept = MBD.load(record["folder"] / "checkpoints/model"), experiment.load_predictions(record["folder"] / "predictions.npz")
    local, global_ = (torch.tensor(kept[n]).softmax(1) for n in ("local_logits", "global_logits"))
    assert torch.allclose(model.fusion.weight(local, global_).double(), torch.tensor(kept["weight"]).double(), atol=1e-5)
    stored = DominanceMap.from_csv(record["folder"] / "dominance.csv")
    assert stored.classes == model.classes == record["classes"] and torch.allclose(stored.share, model.map.share)


def test_run_ucf101_says_that_its_data_are_generated_and_where_it_stands(smoke):
    ended, notebook, _ = smoke
    shown = json.dumps([c.get("outputs", []) for c in cells(notebook)])
    assert "Generated data" in shown and "GENERATED DATA" in shown and not [o for c in cells(notebook) for o in c.get("outputs", ()) if o["output_type"] == "error"]
    for words in ("generating: ", "decoding: ", "warm-up: ", "distil: ", "control: ", "run folder: reports/ucf101-generated/"): assert words in ended.stdout, words
    assert sum(o.get("data", {}).get("image/png") is not None for c in cells(notebook) for o in c.get("outputs", ())) >= 8


def test_a_misspelt_parameter_ends_the_run_at_its_first_cell_with_nothing_but_the_error(tree, environment, tmp_path):
    ended, notebook, reports = papermill(tree, environment, tmp_path, "-p", "warm_up_epoch", "3")
    assert ended.returncode != 0 and "warm_up_epochs" in ended.stdout and not reports.exists()
    outputs = [o for c in cells(notebook) if c["cell_type"] == "code" for o in c.get("outputs", ())]
    errors = [o for o in outputs if o["output_type"] == "error"]
    assert len(errors) == 1 and errors[0]["ename"] == "ParameterError" and "unknown parameter 'warm_up_epoch' (= 3); did you mean 'warm_up_epochs'" in errors[0]["evalue"]
    assert len(errors[0]["traceback"]) == 1 and "File " not in errors[0]["traceback"][0]
    assert not [o for o in outputs if o["output_type"] != "error"]
    ran = [c for c in cells(notebook) if c["cell_type"] == "code" and c.get("execution_count")]
    assert max(c["execution_count"] for c in ran) <= 4      # the kit, parameters, the given ones, the first cell


def test_an_impossible_value_ends_it_too(tree, environment, tmp_path):
    ended, _, reports = papermill(tree, environment, tmp_path, "-p", "preset", "smok", "-p", "batch_size", "1")
    assert ended.returncode != 0 and "did you mean 'smoke'" in ended.stdout and "batch_size = 1 is out of range" in ended.stdout and not reports.exists()


TITLES = {"ucf101": "UCF101", "hmdb51": "HMDB51", "kinetics400": "Kinetics-400", "ssv2": "Something-Something V2"}


@pytest.mark.parametrize("name", TITLES)
def test_the_run_notebooks_differ_in_their_words_only(name):
    def code(name): return ["".join(c["source"]).replace(f'"{name}"', '"NAME"').replace(TITLES[name], "TITLE") for c in cells(NBS / f"run_{name}.ipynb") if c["cell_type"] == "code"]
    assert code(name) == code("ucf101")
    words = "".join("".join(c["source"]) for c in cells(NBS / f"run_{name}.ipynb") if c["cell_type"] == "markdown")
    assert f"mbd run {name}" in words and f"run_{name}.ipynb" in words and not [t for n, t in TITLES.items() if n != name and f"**What {t} tests.**" in words]


def test_on_a_hosted_notebook_the_first_cell_gets_the_kit_and_elsewhere_it_does_nothing(monkeypatch, tmp_path):
    import importlib.util
    first = next("".join(c["source"]) for c in cells(NBS / "run_ssv2.ipynb") if c["cell_type"] == "code")
    asked, before = [], os.getcwd()
    monkeypatch.setattr(subprocess, "run", lambda words, check: asked.append(words))
    exec(first, {})
    assert not asked and os.getcwd() == before
    monkeypatch.chdir(tmp_path); (tmp_path / "mbd-kit" / "nbs").mkdir(parents=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None); monkeypatch.setattr(sys, "path", [*sys.path]); monkeypatch.setenv("MBD_KIT", "/a/clone")
    exec(first, {})
    assert [words[:2] for words in asked] == [["git", "clone"], [sys.executable, "-m"]] and "/a/clone" in asked[0] and Path.cwd() == tmp_path / "mbd-kit" / "nbs" and sys.path[0] == str(tmp_path / "mbd-kit")


@pytest.mark.slow
def test_all_four_run_one_after_the_other_and_file_their_notebooks(tree, environment, tmp_path):
    ended = subprocess.run([sys.executable, "-m", "mbd.cli", "run", "all", "-p", "preset", "smoke", "-p", "reports", str(tmp_path)], cwd=tree, env={**environment, "PYTHONPATH": str(tree)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1200)
    assert ended.returncode == 0, ended.stdout[-6000:]
    runs = experiment.read_runs(tmp_path)
    assert {r["experiment"]: r["status"] for r in runs} == dict.fromkeys(TITLES, "complete") and all(r["data"]["layout"] == r["experiment"] and r["data"]["name"] == "miniactions" for r in runs)
    for r in runs:
        assert (r["folder"] / "notebook.html").stat().st_size > 10**5 and str(tmp_path) not in json.dumps(json.loads((r["folder"] / "notebook.ipynb").read_text())["metadata"]["papermill"]["output_path"])
        assert not [o for c in cells(r["folder"] / "notebook.ipynb") for o in c.get("outputs", ()) if o["output_type"] == "error"]
    [kinetics] = [r for r in runs if r["experiment"] == "kinetics400"]
    assert kinetics["data"]["map_on_val"] and set(kinetics["also"]) == {"1x3"} and kinetics["data"]["fit"]["found"] == 80
    assert [p for p in tmp_path.iterdir() if p.suffix == ".ipynb"] == []      # each copy lies with its run


@pytest.mark.slow
def test_run_ucf101_reads_the_same_from_files_by_worker_processes_as_from_memory(tree, environment, smoke, tmp_path):
    import numpy as np
    ended, _, reports = papermill(tree, environment, tmp_path, "-p", "preset", "smoke", "-p", "read", "files", "-p", "workers", "2")
    assert ended.returncode == 0, ended.stdout[-6000:]
    files, memory = (experiment.load_predictions(experiment.read_runs(r)[0]["folder"] / "predictions.npz") for r in (reports, smoke[2]))
    assert files["ids"].tolist() == memory["ids"].tolist()
    for name in ("local_logits", "global_logits", "weight"): np.testing.assert_allclose(files[name], memory[name], atol=1e-5)


@pytest.mark.slow
def test_run_ucf101_takes_another_pair_and_protocol(tree, environment, tmp_path):
    ended, _, reports = papermill(tree, environment, tmp_path, "-p", "preset", "smoke", "-p", "pair", "swapped", "-p", "protocol", "2x3", "-p", "augmentation", "standard", "-p", "warm_up_epochs", "1", "-p", "distil_epochs", "0")
    assert ended.returncode == 0, ended.stdout[-6000:]
    [record] = experiment.read_runs(reports)
    assert (record["data"]["pair"], record["protocol"]["clips"], record["protocol"]["crops"]) == ("swapped", 2, 3)
    from mbd.model import MBD
    model = MBD.load(record["folder"] / "checkpoints/model")
    assert (model.local.backbone, model.global_.backbone) == ("window_transformer", "long_cnn")
