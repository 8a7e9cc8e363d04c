import json, os, re, shutil, subprocess, sys
from pathlib import Path
import pytest, torch
from mbd import model as model_module
from mbd.clips import View
from mbd.dominance import DominanceMap
from mbd.fusion import AdaptiveFusion, MeanFusion, ScalarFusion
from mbd.global_stream import GlobalStream
from mbd.local_stream import LocalStream
from mbd.model import FORMAT, MBD, load, save

VIEWS = View(6, 1, 16), View(4, 2, 12, mean=.5)
ODD = ["brush hair", "Ä/ö\\ü", '"quoted", \n and torn', "", "跳绳", "../up", "3"]


def dominance(classes):
    k = len(classes)
    share = torch.linspace(.2, .8, k, dtype=torch.float64) + 1 / 3e7      # digits that a careless format would drop
    return DominanceMap(list(classes), [5] * k, [2] * k, share, share - .1, share + .1, (["global", "balanced", "local"] * k)[:k], 1 / 3)


def make(seed=0, classes=("a", "b", "c"), fusion=None, mapped=True):
    torch.manual_seed(seed)
    k = len(classes)
    model = MBD(LocalStream(k, (4, 6), (3, 1)), GlobalStream(k, frames=4, width=12, depth=1, heads=3, grid=2), classes, *VIEWS)
    for m in model.modules():
        if isinstance(m, torch.nn.modules.batchnorm._BatchNorm): m.running_mean.normal_(0, .1)
    model.temperature.copy_(torch.tensor([1.7, .6]))
    if mapped: model.map = dominance(classes)
    if fusion is not None: model.fusion = fusion
    elif mapped:
        model.fusion = AdaptiveFusion(model.map.logit_share)
        model.fusion.slope.fill_(2.5); model.fusion.bias.fill_(-.3)
    return model.eval()


def clips(batch=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 6, 16, 16, generator=g), torch.randn(batch, 3, 4, 12, 12, generator=g)


@torch.no_grad()
def answer(model): return model(*clips())


def same(a, b):
    a, b = answer(a), answer(b)
    return torch.equal(a.fused, b.fused) and torch.equal(a.weight, b.weight) and torch.equal(a.local.logits, b.local.logits) and torch.equal(a.global_.logits, b.global_.logits)


@pytest.fixture
def folder(tmp_path): return save(make(), tmp_path / "deep" / "model")


def config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# ---- the model

def test_output():
    model = make()
    out = answer(model)
    assert out.local.logits.shape == out.global_.logits.shape == out.fused.shape == (4, 3) and out.weight.shape == (4,)
    local, global_ = ((z / t).softmax(1) for z, t in ((out.local.logits, 1.7), (out.global_.logits, .6)))
    evidence = (local + global_) / 2 @ model.map.logit_share.float()
    assert torch.allclose(out.weight, torch.sigmoid(2.5 * evidence - .3), atol=1e-6) and out.weight.std() > 1e-4
    assert torch.allclose(out.fused, out.weight[:, None] * local + (1 - out.weight[:, None]) * global_, atol=1e-6)


def test_a_new_model_is_not_calibrated_and_takes_the_mean():
    model = MBD(LocalStream(3, (4,), (3,)), GlobalStream(3, frames=4, width=12, depth=1, heads=3), "abc", *VIEWS).eval()
    out = answer(model)
    assert model.map is None and (out.weight == .5).all() and model.temperature.tolist() == [1, 1] and model.classes == ["a", "b", "c"]
    assert torch.allclose(out.fused, (out.local.logits.softmax(1) + out.global_.logits.softmax(1)) / 2)


# ---- save and load

@pytest.mark.parametrize("fusion, mapped", [(None, True), (None, False), (ScalarFusion(), False), (ScalarFusion(), True), (MeanFusion(), True)])
def test_a_saved_model_answers_alike(tmp_path, fusion, mapped):
    model = make(fusion=fusion, mapped=mapped)
    if isinstance(fusion, ScalarFusion): fusion.bias.fill_(.7)
    again = MBD.load(model.save(tmp_path / "m"))
    assert same(model, again) and not same(model, make(1)) and type(again.fusion) is type(model.fusion) and not again.training
    assert (again.local_view, again.global_view, again.classes) == (*VIEWS, ["a", "b", "c"]) and again.local.config == model.local.config
    assert model.state_dict().keys() == again.state_dict().keys() and all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


def test_the_map_comes_back_without_loss(folder):
    before, after = dominance("abc").to_dict(), load(folder).map.to_dict()
    assert {n: v for n, v in after.items() if n != "classes"} == {n: v for n, v in before.items() if n != "classes"} and load(folder).map.classes == ["a", "b", "c"]
    assert load(folder).map.group_codes.tolist() == [-1, 0, 1]


def test_odd_names_of_classes(tmp_path):
    model = make(classes=ODD)
    again = load(save(model, tmp_path / "m"))
    assert again.classes == ODD and again.map.classes == ODD and same(model, again)


def test_a_model_on_its_way_in_training_is_saved_as_it_is_and_stays_in_training(tmp_path):
    model = make().train()
    again = load(save(model, tmp_path / "m"))
    assert model.training and not again.training and same(model.eval(), again)


def test_saving_again_replaces(folder):
    other = make(5, classes=("x", "y"))
    save(other, folder)
    assert same(load(folder), other) and load(folder).classes == ["x", "y"]


def test_a_checkpoint_is_two_files_without_pickle(folder):
    from safetensors import safe_open
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    with safe_open(str(folder / "model.safetensors"), "pt") as f: assert set(f.keys()) == set(make().state_dict())
    assert all(isinstance(json.loads((folder / "config.json").read_text())[k], v) for k, v in (("format", int), ("mbd", str), ("classes", list), ("map", dict)))


def test_loading_never_unpickles(folder, tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    class Evil:
        def __reduce__(self): return (open, (str(ran), "w"))
    import pickle
    monkeypatch.setattr(pickle, "Unpickler", None)
    for data in (pickle.dumps(Evil()), pickle.dumps(Evil(), 0)):
        (folder / "model.safetensors").write_bytes(data)
        with pytest.raises(ValueError): load(folder)
    monkeypatch.undo()
    torch.save({"x": Evil()}, folder / "model.safetensors")
    with pytest.raises(ValueError): load(folder)
    assert not ran.exists()


def test_nothing_in_a_config_is_imported_or_called(folder, tmp_path):
    for name in ("os.system", "torch.nn.Linear", "__import__", "MBD"):
        config(folder, local={"name": name, "command": f"touch {tmp_path / 'ran'}"})
        with pytest.raises(ValueError, match=f"local is '{re.escape(name)}'; known streams are LocalStream, GlobalStream"): load(folder)
    assert not (tmp_path / "ran").exists()


# ---- what is missing or damaged

@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing; give a folder written by MBD.save"): load(folder)


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="no MBD checkpoint"): load(tmp_path / "nowhere")


@pytest.mark.parametrize("found", [0, FORMAT + 1, "1", None])
def test_another_format_names_both_and_the_version_that_wrote_it(folder, found):
    config(folder, format=found, mbd="9.8")
    with pytest.raises(ValueError, match=re.escape(f"format {found!r}, but this version") + f".*reads format {FORMAT}; install.*9.8"): load(folder)


@pytest.mark.parametrize("text", [b"", b"{", b"null", b"[]", b'"x"', b"5", b"\xff\xfe\x00", b"[" * 100_000])
def test_a_config_that_is_no_table(folder, text):
    (folder / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match="config.json"): load(folder)


@pytest.mark.parametrize("changes", [
    dict(local="LocalStream"), dict(local=[]), dict(local=None), dict(local={"name": []}), dict(global_=5), dict(fusion=[]), dict(fusion={}), dict(fusion="eval"), dict(fusion=None),
    dict(classes=None), dict(classes=["a", "b"]), dict(classes=["a", "b", "c", "d"]), dict(classes="xyz"), dict(classes=["a", "b", 3]), dict(classes=["a", "b", "x"]), dict(map=5), dict(map={"classes": ["a"]}), dict(local_view=None), dict(local_view={"frames": -1}),
    dict(global_view={"frame": 3}), dict(local={"name": "LocalStream", "num_classes": 3}), dict(local={"name": "LocalStream", "num_classes": "3"}), dict(local={"name": "LocalStream", "num_classes": 3, "evil": 1}), dict(local={"name": "GlobalStream", "num_classes": 3}),
], ids=lambda c: json.dumps(c)[:40])
def test_a_config_with_impossible_values(folder, changes):
    config(folder, **changes)
    with pytest.raises(ValueError, match=re.escape(str(folder))): load(folder)


@pytest.mark.parametrize("classes", [["a", "b"], ["a", "b", "c", "d"], []])
def test_as_many_names_as_answers(tmp_path, classes):
    folder = save(make(mapped=False), tmp_path)      # neither a map nor a fusion would notice
    config(folder, classes=classes)
    with pytest.raises(ValueError, match=re.escape(str(folder))): load(folder)


@pytest.mark.parametrize("key", ["format", "local", "global_", "classes", "local_view", "global_view", "map", "fusion"])
def test_a_config_with_a_hole(folder, key):
    values = json.loads((folder / "config.json").read_text())
    del values[key]
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=re.escape(str(folder))): load(folder)


@pytest.mark.parametrize("kept", [0, 4, 50, .5, .999])
def test_truncated_weights(folder, kept):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:int(len(data) * kept) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match="damaged"): load(folder)


def test_weights_of_another_model(folder, tmp_path):
    other = save(make(classes=("a", "b")), tmp_path / "other")
    shutil.copy(other / "model.safetensors", folder)
    with pytest.raises(ValueError, match="do not fit together"): load(folder)


# ---- killed while saving

KILLED = """
import os, signal, sys
sys.path[:0] = [{tests!r}, {root!r}]
import test_model as t, mbd.model as m
model, real = t.make(7, classes=("x", "y", "z")), dict(replace=os.replace, save_file=m.save_file)
def dying(name):
    def step(*given):
        global left
        if not left: os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return real[name](*given)
    return step
for left, folder in enumerate(sys.argv[1:]):
    child = os.fork()
    if not child:
        os.replace, m.save_file = dying("replace"), dying("save_file")
        m.save(model, folder)
        os._exit(0)
    print(os.waitpid(child, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_killed_save_is_never_taken_for_something_else(tmp_path):
    here = Path(__file__).resolve().parent
    old, new = make(), make(7, classes=("x", "y", "z"))
    folders = [save(old, tmp_path / f"{steps}") for steps in range(4)]      # killed before the weights, their renaming, the config's; not at all
    ended = subprocess.run([sys.executable, "-c", KILLED.format(tests=str(here), root=str(here.parent)), *map(str, folders)], capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.stdout.split() == ["9", "9", "9", "0"], ended.stderr
    for steps, f in enumerate(folders):
        try: found = load(f)
        except FileNotFoundError as error: assert "is missing" in str(error) and steps < 3; continue
        assert same(found, old) and found.classes == old.classes if steps < 3 else same(found, new) and found.classes == new.classes
    for f in folders: assert same(load(save(new, f)), new)      # and the folder can be used again


def test_a_failed_save_leaves_nothing_that_loads_as_something_else(folder, monkeypatch):
    def full(*given): raise OSError("No space left on device")
    monkeypatch.setattr(model_module, "save_file", full)
    with pytest.raises(OSError, match="No space"): save(make(7), folder)
    try: assert same(load(folder), make())
    except FileNotFoundError as error: assert "is missing" in str(error)
