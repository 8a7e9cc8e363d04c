"""The package works from anywhere, without notebook tools, decoders and the network."""
import importlib.metadata, os, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
ABSENT = ("av", "decord", "papermill", "IPython", "jupyterlab", "nbdev", "timm", "ipywidgets", "torchvision", "nbformat", "ipykernel", "pytest")

PREFIX = f"""
import sys, socket
sys.path.insert(0, {str(ROOT)!r})
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT!r}: raise ModuleNotFoundError(f"No module named {{name!r}} (blocked)", name=name)
sys.meta_path.insert(0, Blocker())
def refuse(*given, **more): raise AssertionError(f"the network was asked for: {{given}}")
for name in ("connect", "connect_ex", "sendto", "bind"): setattr(socket.socket, name, refuse)
socket.create_connection = socket.getaddrinfo = socket.gethostbyname = refuse
"""


def run(code, folder, **env):
    ended = subprocess.run([sys.executable, "-c", PREFIX + code], cwd=folder, capture_output=True, text=True, timeout=300,
                           env={**{k: v for k, v in os.environ.items() if not k.startswith("MBD_")}, "OMP_NUM_THREADS": "1", "MBD_CACHE": str(folder / "cache"), **env})
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


STEP = """
import importlib, pkgutil, mbd
assert mbd.__version__
names = [m.name for m in pkgutil.walk_packages(mbd.__path__, "mbd.")]
for name in names: importlib.import_module(name)
assert {"mbd.video", "mbd.training", "mbd.experiment", "mbd.plots", "mbd.miniactions"} <= set(names)

from pathlib import Path
import numpy as np, torch
from mbd import clips, datasets, distillation, training
from mbd.global_stream import GlobalStream
from mbd.local_stream import LocalStream
from mbd.model import MBD
rng = np.random.default_rng(0)
records = [datasets.Record(f"v{i}", Path(f"nowhere/v{i}.avi"), i % 3, f"s{i % 4}") for i in range(12)]
frames = {r.id: rng.integers(0, 256, (20, 24, 24, 3)).astype(np.uint8) for r in records}
views = clips.View(8, 2, 16), clips.View(4, 4, 8)
data, fixed = (clips.ClipDataset(records, frames, *views, train=t) for t in (True, False))
model = MBD(LocalStream(3), GlobalStream(3, frames=4), ["a", "b", "c"], *views)
training.measure_map(model, fixed)
before = model.global_.head.weight.clone()
rows = training.train(model, data, training.Training(epochs=1, batch_size=12), "distil", distillation.Distillation("both", only_right_teacher=False))
assert rows[0]["final_to_global"] > 0 and not torch.equal(before, model.global_.head.weight)
training.measure_map(model, fixed); training.fit_fusions(model, fixed)
again = MBD.load(model.save("model"))
assert torch.equal(training.predict(again, fixed).local, training.predict(model, fixed).local)
print("done", sorted(set(m.partition(".")[0] for m in sys.modules) & ABSENT))
"""


def test_every_module_and_a_training_step_with_distillation_in_a_bare_environment(tmp_path):
    assert run(f"ABSENT = set({ABSENT!r})\n" + STEP, tmp_path) == "done []\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]      # and nothing else is written


def test_importing_the_package_is_light(tmp_path):
    assert run("import mbd; print('torch' in sys.modules, 'numpy' in sys.modules)", tmp_path) == "False False\n"


def test_what_needs_a_decoder_says_which_one(tmp_path):
    code = """
from mbd import clips, video
from pathlib import Path
Path("a.mp4").write_bytes(b"x")
for act in (lambda: video.num_frames("a.mp4"), lambda: video.read_frames("a.mp4", [0])):
    try: act()
    except ImportError as error: print("PyAV" in str(error) and "pip install av" in str(error))
"""
    assert run(code, tmp_path) == "True\nTrue\n"


def test_the_version_is_that_of_the_installed_package():
    import mbd
    try: installed = importlib.metadata.version("mbd-kit")
    except importlib.metadata.PackageNotFoundError: pytest.skip("the package is not installed")
    assert mbd.__version__ == installed
