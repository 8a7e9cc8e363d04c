"What goes wrong in a run, through papermill as a user starts it: the exit status tells, the notebook is kept with the error, the record says why, and the same words go on."
import importlib.util, json, os, resource, signal, subprocess, sys, time
from pathlib import Path
import pytest
from mbd import experiment, miniactions

ROOT = Path(__file__).resolve().parents[1]
WORDS = dict(preset="smoke", train_videos=40, test_videos=20, resamples=200, checkpoint_minutes=0)
pytestmark = [pytest.mark.skipif(not (ROOT/"nbs").is_dir(), reason="an installed package has no notebooks"),
              pytest.mark.skipif(not all(map(importlib.util.find_spec, ("papermill", "ipykernel"))), reason="needs papermill and ipykernel")]


@pytest.fixture(scope="module")
def videos(tmp_path_factory): return tmp_path_factory.mktemp("videos")


@pytest.fixture
def papermill(tmp_path, videos):
    "Starts papermill on a run notebook: (process, path of the copy, folder of reports)."
    def start(*words, name="ucf101", stub="", limit=None, **environment):
        (tmp_path/"stub").mkdir(exist_ok=True); (tmp_path/"stub"/"sitecustomize.py").write_text(stub)
        paths = os.pathsep.join(map(str, [tmp_path/"stub", ROOT] if stub else [ROOT]))
        given = [x for n, v in (WORDS | dict(reports=tmp_path/"reports")).items() for x in ("-p", n, str(v))]
        known = {n: v for n, v in os.environ.items() if not n.startswith("MBD_DATA")} | dict(MBD_DATA_MINIACTIONS=str(videos), MBD_PROGRESS="lines", PYTHONPATH=paths, OMP_NUM_THREADS="1") | environment
        lower = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit else None
        return subprocess.Popen([sys.executable, "-m", "papermill", f"nbs/run_{name}.ipynb", str(tmp_path/"out.ipynb"), "--log-output", "--no-progress-bar", *given, *words], cwd=ROOT, env=known,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=lower)
    start.folder = tmp_path
    return start


def ended(process): return process.communicate(timeout=600)[0], process.returncode


def errors(folder): return [o for c in json.loads((folder/"out.ipynb").read_text())["cells"] for o in c.get("outputs", ()) if o["output_type"] == "error"]


def failed(papermill, *words, reason, **more):
    "Run, fail, and find all as it should be; returns what was printed."
    shown, status = ended(papermill(*words, **more))
    assert status != 0, shown[-3000:]
    [record] = [r for r in experiment.read_runs(papermill.folder/"reports") if r["status"] != "complete"]
    assert record["status"] == "failed" and reason in record["reason"], record.get("reason")
    assert any(reason in e["evalue"] for e in errors(papermill.folder)) and not experiment.comparable([record], True)
    return shown


def goes_on(papermill, *words, **more):
    "The same words again: the run continues, and is complete."
    shown, status = ended(papermill(*words, **more))
    assert status == 0 and "which goes on: it was" in shown, shown[-3000:]
    [record] = experiment.read_runs(papermill.folder/"reports")
    assert record["status"] == "complete" and len(record["sessions"]) == 1
    return record


@pytest.mark.parametrize("name, environment, words", [("hmdb51", {}, "no folder is configured for hmdb51"), ("ssv2", {"MBD_DATA_SSV2": "no/such/folder"}, "the folder configured for ssv2 does not exist")])
def test_data_that_are_not_there_end_the_run_before_it_begins(papermill, name, environment, words):
    shown, status = ended(papermill("-p", "data", "real", name=name, **environment))
    [error] = errors(papermill.folder)
    assert status != 0 and error["ename"] == "ParameterError" and words in error["evalue"] and "data = 'generated'" in error["evalue"] and not (papermill.folder/"reports").exists()


def test_mbd_run_says_in_a_line_what_went_wrong_and_keeps_the_notebook(tmp_path, videos, monkeypatch, capsys):
    from mbd.cli import main
    monkeypatch.setenv("MBD_DATA_MINIACTIONS", str(videos)); monkeypatch.setenv("PYTHONPATH", str(ROOT)); monkeypatch.chdir(ROOT)
    assert main(["run", "all", "-p", "warm_up_epoch", "3", "-p", "reports", str(tmp_path/"reports")]) == 2
    assert "did you mean 'warm_up_epochs'" in capsys.readouterr().err and not (tmp_path/"reports").exists()      # before any kernel
    (tmp_path/"empty").mkdir(); monkeypatch.setenv("MBD_DATA_SSV2", str(tmp_path/"empty"))
    assert main(["run", "ssv2", "-p", "preset", "smoke", "-p", "data", "real", "-p", "reports", str(tmp_path/"reports")]) == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ssv2: failed")]
    [kept] = (tmp_path/"reports").rglob("*.ipynb")
    assert str(tmp_path/"empty") in line and str(kept) in line and json.loads((kept.parent/"result.json").read_text())["status"] == "failed"
    assert any(o.get("output_type") == "error" for c in json.loads(kept.read_text())["cells"] for o in c.get("outputs", ()))


@pytest.fixture
def real(tmp_path):
    "A small set that passes for UCF101 on the disk."
    folder = miniactions.generate(tmp_path/"ucf101", classes=miniactions.CLASSES[:4], train_groups=8, test_groups=3, clips=1)
    return folder, sorted((folder/"UCF-101").rglob("*.mp4"))


REAL = ("-p", "data", "real", "-p", "train_videos", "0", "-p", "test_videos", "0")


@pytest.mark.slow
def test_missing_videos_are_counted_and_a_list_without_any_is_refused(papermill, real):
    folder, files = real
    for path in files[::11]: path.unlink()
    shown, status = ended(papermill(*REAL, MBD_DATA_UCF101=str(folder)))
    [record] = experiment.read_runs(papermill.folder/"reports")
    parts = [record["data"][n] for n in ("fit", "map", "gate", "test")]
    assert status == 0 and record["data"]["name"] == "ucf101" and sum(p["expected"] for p in parts) == len(files) and sum(p["found"] for p in parts) == len(files) - len(files[::11]), parts
    for path in files: path.unlink(missing_ok=True)
    failed(papermill, *REAL, MBD_DATA_UCF101=str(folder), reason="were the videos found?")


@pytest.mark.slow
@pytest.mark.parametrize("read", ["memory", "files"])
def test_too_many_unreadable_videos_end_the_run_and_few_are_counted(papermill, real, read):
    folder, files = real
    for path in files[::6]: path.write_bytes(b"no video at all")
    words = (*REAL, "-p", "read", read)
    shown = failed(papermill, *words, MBD_DATA_UCF101=str(folder), reason="could not be read")
    assert "mbd data check" in shown and "max_failures" in shown
    shown, status = ended(papermill(*words, "-p", "max_failures", "0.5", MBD_DATA_UCF101=str(folder)))
    [record] = [r for r in experiment.read_runs(papermill.folder/"reports") if r["status"] == "complete"]
    assert status == 0 and sum(record["data"][n]["unreadable"] for n in ("fit", "map", "gate", "test")) == len(files[::6]), record["data"]


FULL = """
import torch, mbd.training as training
inner, taken = training._one_step, []
def step(trainer, place, read, data, stage):
    taken.append(stage)
    if len(taken) == 3: raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return inner(trainer, place, read, data, stage)
training._one_step = step
"""


@pytest.mark.slow
def test_memory_that_is_full_in_the_middle_names_the_remedy_and_the_run_goes_on(papermill):
    shown = failed(papermill, stub=FULL, reason="CUDA out of memory")
    assert "lower batch_size, raise accumulate" in shown and "checkpointing" in shown
    assert "out of memory" in goes_on(papermill)["sessions"][0]["reason"]


def kernel_of(process):
    "The kernel's process, once there is one."
    for _ in range(600):
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            if "ipykernel" in Path(f"/proc/{child}/cmdline").read_text(): return int(child)
        time.sleep(.1)
    raise AssertionError("no kernel was started")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the kernel in /proc")
@pytest.mark.parametrize("whom", ["kernel", "papermill"])
def test_a_run_that_is_killed_is_interrupted_and_goes_on(papermill, whom):
    process = papermill("-p", "warm_up_epochs", "6")
    kernel = kernel_of(process)
    for _ in range(1200):
        if process.poll() is not None or list((papermill.folder/"reports").glob("*/*/checkpoints/stages/warm-up*")): break
        time.sleep(.1)
    os.kill(kernel if whom == "kernel" else process.pid, signal.SIGKILL)
    shown, status = ended(process)
    assert status != 0 and (papermill.folder/"out.ipynb").is_file(), shown[-2000:]
    for _ in range(300):      # a kernel without its parent ends by itself
        [record] = experiment.read_runs(papermill.folder/"reports")
        if record["status"] != "running": break
        time.sleep(.1)
    assert record["status"] == "interrupted" and not experiment.comparable([record], True)
    goes_on(papermill, "-p", "warm_up_epochs", "6")


@pytest.mark.slow
def test_a_full_disk_is_named_and_the_run_goes_on_once_there_is_room(papermill):
    shown = failed(papermill, limit=1_500_000, reason="checkpoint")
    assert "File too large" in shown or "No space left" in shown
    goes_on(papermill)
