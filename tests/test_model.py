import hashlib, json, os, re, subprocess, sys
from pathlib import Path
import pytest, torch, torch.nn as nn
from mbd import model as model_module
from mbd.clips import View
from mbd.dominance import DominanceMap
from mbd.fusion import FUSIONS, AdaptiveFusion, FeatureFusion, MeanFusion, ScalarFusion
from mbd.global_stream import GlobalStream
from mbd.local_stream import BACKBONES, LocalStream, StreamOutput, build_stream, register
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


def weights(folder): return next(folder.glob("*.safetensors"))


def words(folder): return json.loads((folder / "config.json").read_text())


def config(folder, **changes): (folder / "config.json").write_text(json.dumps({**words(folder), **changes}))


def stream(name="hand_cnn", seen=(), **options): return dict(name=name, config=dict(num_classes=3, **options), seen=list(seen))


@pytest.fixture
def own():
    "Names that a test registers are forgotten after it."
    before = dict(BACKBONES)
    yield
    BACKBONES.clear(); BACKBONES.update(before)


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


@pytest.mark.parametrize("classes, problem", [("ab", "the local stream has 3 answers, but there are 2 classes"), ("abcd", "the local stream has 3 answers, but there are 4 classes"), ("aba", "class 'a' is there twice")])
def test_classes_that_the_streams_do_not_answer_are_refused_when_the_model_is_made(classes, problem):
    with pytest.raises(ValueError, match=problem): MBD(LocalStream(3, (4,), (3,)), GlobalStream(3, frames=4, width=12, depth=1, heads=3), classes, *VIEWS)


# ---- save and load

@pytest.mark.parametrize("fusion, mapped", [(None, True), (None, False), (ScalarFusion(), False), (ScalarFusion(), True), (MeanFusion(), True)])
def test_a_saved_model_answers_alike(tmp_path, fusion, mapped):
    model = make(fusion=fusion, mapped=mapped)
    if isinstance(fusion, ScalarFusion): fusion.bias.fill_(.7)
    again = MBD.load(model.save(tmp_path / "m"))
    assert same(model, again) and not same(model, make(1)) and type(again.fusion) is type(model.fusion) and not again.training
    assert (again.local_view, again.global_view, again.classes) == (*VIEWS, ["a", "b", "c"]) and again.local.config == model.local.config
    assert model.state_dict().keys() == again.state_dict().keys() and all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", sorted(FUSIONS))
def test_every_fusion_is_saved_as_it_was_fitted(tmp_path, name):
    model, k, g = make(mapped=False), 3, torch.Generator().manual_seed(3)
    out = answer(model)
    given = {"AdaptiveFusion": lambda: FUSIONS[name](torch.tensor([-1., 0., 2.])), "FeatureFusion": lambda: FeatureFusion(out.local.embedding.shape[1], out.global_.embedding.shape[1], k, hidden=4),
             **{n: lambda: FUSIONS[name](k) for n in ("ClassFusion", "StackingFusion", "GateFusion")}}.get(name, FUSIONS[name])
    model.fusion = given()
    wide = (out.local.embedding.shape[1], out.global_.embedding.shape[1]) if model.fusion.inputs == "embeddings" else (k, k)
    pair = [torch.randn(60, n, generator=g) for n in wide]
    if model.fusion.inputs == "probabilities": pair = [2 * x for x in pair]; pair = [x.softmax(1) for x in pair]
    labels = (pair[0] + (pair[1] if wide[0] == wide[1] else 0))[:, :k].argmax(1)
    model.fusion.fit(*pair, labels, sources=[str(n // 3) for n in range(60)])
    model.eval()
    again = MBD.load(model.save(tmp_path / "m"))
    assert type(again.fusion) is FUSIONS[name] and again.fusion.config == model.fusion.config and same(model, again)
    if name != "MeanFusion":      # what was fitted is what answers: another fit answers otherwise
        again.fusion = given()
        assert not torch.equal(answer(model).fused, answer(again).fused)


def test_a_checkpoint_from_before_the_fusions_had_a_configuration_is_read(folder):
    old = words(folder); del old["fusion_config"]
    (folder / "config.json").write_text(json.dumps(old))
    assert same(load(folder), make())
    plain = save(make(fusion=ScalarFusion()), folder.parent / "plain")
    old = words(plain); del old["fusion_config"]
    (plain / "config.json").write_text(json.dumps(old))
    assert same(load(plain), make(fusion=ScalarFusion()))


@pytest.mark.parametrize("name, given", [("AdaptiveFusion", {"num_classes": 4}), ("AdaptiveFusion", {"num_classes": 10**12}), ("AdaptiveFusion", {}), ("AdaptiveFusion", []), ("AdaptiveFusion", None), ("AdaptiveFusion", {"num_classes": 3, "evil": 1}),
    ("GateFusion", {"num_classes": 3, "hidden": 10**12}), ("FeatureFusion", {"local_dim": 10**12, "global_dim": 1, "num_classes": 3}), ("ScalarFusion", {}), ("MeanFusion", {"num_classes": 3})])
def test_a_fusion_that_is_not_the_saved_one_is_refused(folder, name, given):
    config(folder, fusion=name, fusion_config=given)
    with pytest.raises(ValueError, match=re.escape(str(folder))): load(folder)


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


def test_a_checkpoint_is_three_files_without_pickle(folder):
    from safetensors import safe_open
    data = weights(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", data.name] and data.name == f"model-{hashlib.sha256(data.read_bytes()).hexdigest()[:16]}.safetensors"
    with safe_open(str(data), "pt") as f: assert set(f.keys()) == set(make().state_dict())
    assert all(isinstance(json.loads((folder / "config.json").read_text())[k], v) for k, v in (("format", int), ("mbd", str), ("classes", list), ("map", dict)))


def renamed(folder, data):
    "Put these bytes in place of the weights, under the name that their content has, and let the config point to it."
    weights(folder).unlink()
    name = f"model-{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
    (folder / name).write_bytes(data); config(folder, weights=name)


def test_loading_never_unpickles(folder, tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    class Evil:
        def __reduce__(self): return (open, (str(ran), "w"))
    import pickle
    monkeypatch.setattr(pickle, "Unpickler", None)
    for data in (pickle.dumps(Evil()), pickle.dumps(Evil(), 0)):
        renamed(folder, data)
        with pytest.raises(ValueError, match="damaged"): load(folder)
    monkeypatch.undo()
    torch.save({"x": Evil()}, tmp_path / "evil")
    renamed(folder, (tmp_path / "evil").read_bytes())
    with pytest.raises(ValueError, match="damaged"): load(folder)
    assert not ran.exists()


def test_nothing_in_a_config_is_imported_or_called(folder, tmp_path):
    for name in ("os.system", "torch.nn.Linear", "__import__", "MBD"):
        before = set(sys.modules)
        for saved in ({"name": name, "command": f"touch {tmp_path / 'ran'}"}, {**stream(name), "command": "touch"}, stream(name, command=f"touch {tmp_path / 'ran'}")):
            config(folder, local=saved)
            with pytest.raises(ValueError, match="config.json: local: "): load(folder)
        assert set(sys.modules) == before
    config(folder, local=stream("os.system"))
    with pytest.raises(ValueError, match="backbone 'os.system' is unknown; .*hand_cnn.* Import the module that registers"): load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("option", ["weights", "file", "pretrained"])
def test_a_saved_stream_reads_no_other_weights(folder, tmp_path, option, own):
    asked = []
    @register("greedy", "local", VIEWS[0])
    def greedy(num_classes, **options): asked.append(options); return LocalStream(num_classes)
    config(folder, local=stream("greedy", **{option: "elsewhere"}))
    with pytest.raises(ValueError, match=f"'{option}' is no option of a saved stream"): load(folder)
    assert not asked


# ---- streams by their names

class Tiny(nn.Module):
    def __init__(self, num_classes, width=4):
        super().__init__()
        self.config, self.head = dict(num_classes=num_classes, width=width), nn.Linear(width, num_classes)

    def forward(self, x): return StreamOutput(self.head(x.mean((2, 3, 4)).repeat(1, 2)[:, :self.config["width"]]), x, {})


def test_a_backbone_of_ones_own_comes_back(tmp_path, own):
    register("tiny", "local", VIEWS[0])(Tiny)
    for local in (Tiny(3, 5), build_stream("tiny", 3, width=5)):
        model = make(); model.local = local
        again = load(save(model, tmp_path / "m"))
        assert type(again.local) is Tiny and again.local.backbone == "tiny" and again.local.config == local.config and same(model, again)
    del BACKBONES["tiny"]
    with pytest.raises(ValueError, match="local: backbone 'tiny' is unknown.*Import the module that registers"): load(tmp_path / "m")


def test_a_backbone_that_cannot_be_built_without_memory_comes_back_too(tmp_path, own):
    class Counting(Tiny):
        def __init__(self, num_classes, width=4):
            super().__init__(num_classes, width)
            self.rates = [x.item() for x in torch.linspace(0, 1, width)]
    register("counting", "local", VIEWS[0])(Counting)
    model = make(); model.local = Counting(3)
    folder = save(model, tmp_path / "m")
    assert same(model, load(folder)) and load(folder).local.rates == model.local.rates
    config(folder, local=dict(name="counting", config=dict(num_classes=3, width=10**8), seen=[]))
    with pytest.raises(ValueError, match="far more than"): load(folder)


def test_what_nothing_could_rebuild_is_refused_before_anything_is_written(folder, tmp_path, own):
    class Mine(LocalStream): pass
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    for local, problem, kind in ((Mine(3), "a Mine is no registered backbone", ValueError), (nn.Identity(), "a Identity is no registered backbone", ValueError)):
        model = make(); model.local = local
        with pytest.raises(kind, match=problem): save(model, folder)
    @register("plain", "local", VIEWS[0])
    class Plain(nn.Module):
        def __init__(self, num_classes): super().__init__(); self.head = nn.Linear(3, num_classes)
    for config in (None, {"width": 4}):      # made by its class and not by build_stream; and with a config that lacks what `load` asks for
        model = make(); model.local = Plain(3)
        if config: model.local.config = config
        with pytest.raises(ValueError, match=r"a Plain does not say how it was built.*build_stream\('plain', num_classes, \.\.\.\)"): save(model, folder)
    model = make(); model.local.config["odd"] = object()
    with pytest.raises(TypeError): save(model, folder)
    with pytest.raises(TypeError): save(model, tmp_path / "new")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before and not (tmp_path / "new").exists()


def test_a_class_under_two_names_keeps_the_one_it_was_built_by(tmp_path, own):
    register("wide_cnn", "local", VIEWS[0])(LocalStream)
    model = make(); model.local = build_stream("wide_cnn", 3)
    assert load(save(model, tmp_path / "m")).local.backbone == "wide_cnn"


def test_what_weights_have_seen_is_kept(tmp_path):
    model = make()
    assert load(save(model, tmp_path / "m")).local.seen == frozenset()
    model.local.seen, model.global_.seen = frozenset(["kinetics400/train", "imagenet1k"]), frozenset(["not stated"])
    again = load(save(load(save(model, tmp_path / "m")), tmp_path / "n"))
    assert again.local.seen == {"kinetics400/train", "imagenet1k"} and again.global_.seen == {"not stated"}


@pytest.mark.parametrize("seen", [None, "kinetics400/train", [3], {"a": 1}])
def test_what_weights_have_seen_must_be_names(folder, seen):
    config(folder, local={**words(folder)["local"], "seen": seen})
    with pytest.raises(ValueError, match="local: seen must be a list of names"): load(folder)


def test_only_the_kits_own_later_chapters_are_imported_for_a_name(folder, tmp_path, monkeypatch, own):
    (tmp_path / "later_chapter.py").write_text("from mbd.local_stream import LocalStream, register\nfrom mbd.clips import View\nregister('later', 'local', View())(type('Later', (LocalStream,), {}))\n")
    monkeypatch.syspath_prepend(tmp_path)
    config(folder, local={**words(folder)["local"], "name": "later"})
    with pytest.raises(ValueError, match="'later' is unknown"): load(folder)
    assert "later_chapter" not in sys.modules
    monkeypatch.setitem(model_module.LATER, "later", "later_chapter")
    assert load(folder).local.backbone == "later"
    del sys.modules["later_chapter"]


def test_every_name_of_a_later_chapter_is_registered_by_it():
    import importlib
    for name, module in model_module.LATER.items():
        assert module.startswith("mbd.")
        importlib.import_module(module)
        assert name in BACKBONES


def test_a_checkpoint_of_format_1_is_read(folder):
    file, old = folder / "config.json", words(folder)
    weights(folder).rename(folder / "model.safetensors")
    for key, name in (("local", "LocalStream"), ("global_", "GlobalStream")): old[key] = dict(name=name, **old[key]["config"])
    del old["weights"]; old["format"] = 1
    file.write_text(json.dumps(old))
    again = load(folder)
    assert same(again, make()) and again.local.seen == frozenset()
    save(again, folder)
    assert same(load(folder), make()) and len(list(folder.iterdir())) == 3
    file.write_text(json.dumps({**old, "local": {**old["local"], "name": "os.system"}}))
    with pytest.raises((ValueError, FileNotFoundError), match="missing|'os.system' is unknown"): load(folder)


# ---- sizes

@pytest.mark.parametrize("changes", [
    dict(global_=stream("hand_transformer", frames=4, width=1_000_000)), dict(global_=stream("hand_transformer", frames=4, width=12, depth=1_000_000_000, heads=3, grid=2)), dict(global_=stream("hand_transformer", frames=4, width=12, depth=1, heads=3, grid=10_000_000)),
    dict(global_=stream("hand_transformer", frames=10**12, width=12, depth=1, heads=3, grid=2)), dict(local=stream(widths=[10_000_000, 10_000_000], temporal_kernels=[3, 3])), dict(local=stream(widths=[4, 6] * 50_000, temporal_kernels=[3, 1] * 50_000)),
    dict(local=dict(name="hand_cnn", config=dict(num_classes=1_000_000_000), seen=[])), dict(local=stream(widths=[4, 7], temporal_kernels=[3, 1])),
], ids=["width", "depth", "grid", "frames", "widths", "stages", "classes", "a little"])
def test_a_config_cannot_ask_for_more_than_the_weights_hold(folder, changes, monkeypatch):
    config(folder, **changes)
    import resource, time
    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    monkeypatch.setattr(model_module, "load_file", lambda *given: pytest.fail("the weights were read"))
    with pytest.raises(ValueError, match="far more than|not those of the weights|answers, but there are 3 classes"): load(folder)
    assert time.perf_counter() - begun < 5 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000      # KiB


@pytest.mark.parametrize("wish", [dict(depth=10**9), dict(frames=10**12), dict(size=10**7), dict(vit="vit_giant_patch14_224"), dict(vit="hf-hub:somebody/something")], ids=["depth", "frames", "size", "vit", "hub"])
def test_a_library_behind_a_backbone_is_held_back_too(tmp_path, wish):
    import resource, time
    pytest.importorskip("timm")
    model = make(mapped=False); model.local = build_stream("timesformer_s16", 3, **SMALL["timesformer_s16"])
    folder = save(model, tmp_path / "m")
    config(folder, local=dict(name="timesformer_s16", config={**words(folder)["local"]["config"], **wish}, seen=[]))
    begun, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="far more than|not those of the weights|is no model of timm"): load(folder)
    assert time.process_time() - begun < 8 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000      # seconds, KiB


def test_counting_ends_with_the_loading(folder):
    config(folder, global_=stream("hand_transformer", frames=4, width=1_000_000))
    with pytest.raises(ValueError): load(folder)
    assert sum(p.numel() for p in nn.Linear(3000, 1000).parameters()) == 3_001_000      # nothing counts any more


@pytest.mark.parametrize("name", ["../config.json", "/etc/passwd", "model-0123456789abcdef.safetensors/../x", "model.safetensors", "model-0123456789ABCDEF.safetensors", "model-0123456789abcdef.safetensors\n", "", None, 3, ["model"]])
def test_the_config_points_only_to_a_plain_name(folder, name):
    (folder.parent / "model-0123456789abcdef.safetensors").write_bytes(weights(folder).read_bytes())
    config(folder, weights=name)
    with pytest.raises(ValueError, match="no name of a file that MBD.save writes"): load(folder)


# ---- what is missing or damaged

@pytest.mark.parametrize("name", ["config.json", "weights"])
def test_a_missing_file_is_named(folder, name):
    if name == "weights": name = weights(folder).name
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing; give a folder written by MBD.save"): load(folder)


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="no MBD checkpoint"): load(tmp_path / "nowhere")


@pytest.mark.parametrize("found", [0, FORMAT + 1, "1", "2", True, None])
def test_another_format_names_both_and_the_version_that_wrote_it(folder, found):
    config(folder, format=found, mbd="9.8")
    with pytest.raises(ValueError, match=re.escape(f"format {found!r}, but this version") + f".*reads format {FORMAT}; install.*9.8"): load(folder)


@pytest.mark.parametrize("text", [b"", b"{", b"null", b"[]", b'"x"', b"5", b"\xff\xfe\x00", b"[" * 100_000])
def test_a_config_that_is_no_table(folder, text):
    (folder / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match="config.json"): load(folder)


@pytest.mark.parametrize("changes", [
    dict(local="hand_cnn"), dict(local=[]), dict(local=None), dict(local={"name": []}), dict(local={"name": "hand_cnn"}), dict(local={"name": "hand_cnn", "config": []}), dict(global_=5), dict(fusion=[]), dict(fusion={}), dict(fusion="eval"), dict(fusion=None),
    dict(classes=None), dict(classes=["a", "b"]), dict(classes=["a", "b", "c", "d"]), dict(classes="xyz"), dict(classes=["a", "b", 3]), dict(classes=["a", "b", "x"]), dict(map=5), dict(map={"classes": ["a"]}), dict(local_view=None), dict(local_view={"frames": -1}),
    dict(global_view={"frame": 3}), dict(local=stream()), dict(local={**stream(), "config": {"num_classes": "3"}}), dict(local={**stream(), "config": {"num_classes": True}}), dict(local=stream(evil=1)), dict(local=stream("hand_transformer")),
    dict(global_=stream("hand_transformer", heads=0)), dict(global_=stream("hand_transformer", frames="4")), dict(global_=stream("hand_transformer", frames=-4)),
], ids=lambda c: json.dumps(c)[:40])
def test_a_config_with_impossible_values(folder, changes):
    config(folder, **changes)
    with pytest.raises(ValueError, match=re.escape(str(folder))): load(folder)


@pytest.mark.parametrize("classes", [["a", "b"], ["a", "b", "c", "d"], []])
def test_as_many_names_as_answers(tmp_path, classes):
    folder = save(make(mapped=False), tmp_path)      # neither a map nor a fusion would notice
    config(folder, classes=classes)
    with pytest.raises(ValueError, match=re.escape(str(folder))): load(folder)


@pytest.mark.parametrize("key", ["format", "weights", "local", "global_", "classes", "local_view", "global_view", "map", "fusion"])
def test_a_config_with_a_hole(folder, key):
    values = json.loads((folder / "config.json").read_text())
    del values[key]
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=re.escape(str(folder))): load(folder)


@pytest.mark.parametrize("kept", [0, 4, 50, .5, .999])
def test_truncated_weights(folder, kept):
    data = weights(folder).read_bytes()
    part = data[:int(len(data) * kept) if isinstance(kept, float) else kept]
    weights(folder).write_bytes(part)
    with pytest.raises(ValueError, match="damaged"): load(folder)
    renamed(folder, part)                   # and where the name agrees
    with pytest.raises(ValueError, match="damaged"): load(folder)


def test_one_changed_bit_is_noticed(folder):
    data = bytearray(weights(folder).read_bytes()); data[-1] ^= 1
    weights(folder).write_bytes(data)
    with pytest.raises(ValueError, match="not those that were saved"): load(folder)


def test_weights_of_another_model(folder, tmp_path):
    other = save(make(classes=("a", "b")), tmp_path / "other")
    renamed(folder, weights(other).read_bytes())
    with pytest.raises(ValueError, match="do not fit together.*head"): load(folder)


# ---- what it is: the card

RECORD = {"schema": 1, "status": "complete", "experiment": "ucf101", "data": {"name": "miniactions", "layout": "ucf101", "fit": {"expected": 600, "found": 600}, "test": {"expected": 100, "found": 98}}, "protocol": {"clips": 5, "crops": 3},
          "top1": {"local": .75, "global": .5, "adaptive": .875}, "top1_interval": {"adaptive": [.8, .91]}, "seed": 3, "commit": "abc", "by_group": {"local": 1}}


def readme(folder): return (folder / "README.md").read_text(encoding="utf-8")


def test_the_card_says_data_protocol_result_and_limits(tmp_path):
    folder = make().save(tmp_path / "m", about=RECORD)
    text = readme(folder)
    assert text.startswith("---\nlibrary_name: mbd\n") and "| adaptive | 87.5 | 80.0 to 91.0 |" in text and "- clips: 5" in text and "test: expected 100, found 98" in text and weights(folder).name in text
    assert "generated figure videos" in text and "knows its 3 classes and no others" in text and "| local | hand_cnn |" in text and "1 classes global, 1 classes balanced, 1 classes local" in text and "not calibrated" not in text
    assert set(words(folder)["about"]) == {"experiment", "data", "protocol", "top1", "top1_interval", "seed", "commit"}


def test_the_card_of_an_unknown_model_says_what_is_not_known(tmp_path):
    model = make(mapped=False)
    model.temperature.fill_(1.); model.local.seen = frozenset(["not stated"])
    text = readme(model.save(tmp_path / "m"))
    for words_ in ("No test result came with it", "No dominance map was measured", "not calibrated", "pretrained weights were trained on is not known"): assert words_ in text, words_
    assert text.count("not stated") >= 3 and "generated figure" not in text


def test_the_card_goes_on_with_the_model_and_is_never_that_of_another(tmp_path):
    again = load(make().save(tmp_path / "m", about=RECORD))
    assert readme(again.save(tmp_path / "n")) == readme(tmp_path / "m") and again.about["seed"] == 3
    make(5).save(tmp_path / "m")
    assert "87.5" not in readme(tmp_path / "m") and weights(tmp_path / "m").name in readme(tmp_path / "m")
    (tmp_path / "n/README.md").write_text("# My own words\n")
    make(5).save(tmp_path / "n", about=RECORD)
    assert readme(tmp_path / "n") == "# My own words\n" and load(tmp_path / "n").about["seed"] == 3


@pytest.mark.parametrize("about", [{"data": 5, "protocol": ["x"], "top1": {"local": "much"}, "top1_interval": 3}, {"top1": [1], "top1_interval": {"local": "x"}, "data": {"a": {"b": None}}, "seed": {"<script>": "|"}}, {"top1": {"a|b\n# c": .5}}])
def test_a_strangers_card_is_only_text(folder, about):
    config(folder, about=about)
    text = readme(load(folder).save(folder.parent / "again"))
    assert "<script>" not in text and "\n# c" not in text and load(folder.parent / "again").about == about
    config(folder, about=["x"])
    with pytest.raises(ValueError, match="about is"): load(folder)


def test_odd_class_names_do_not_break_the_card(tmp_path):
    text = readme(make(classes=ODD).save(tmp_path / "m"))
    assert "跳绳" in text and '"quoted", and torn' in text


@pytest.mark.parametrize("found, kind", [({"model_type": "videomae", "hidden_size": 3}, "videomae"), ({"architectures": ["ViT"]}, "ViT"), ({"a": 1}, "it names none")])
def test_a_model_of_another_kind_is_named(folder, found, kind):
    (folder / "config.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match=f"config.json belongs to a model of another kind .*{kind}"): load(folder)


def test_a_model_of_another_kind_is_never_overwritten(tmp_path):
    theirs = {"config.json": b'{"model_type": "videomae"}', "model.safetensors": b"weights", "README.md": b"my page"}
    for name, text in theirs.items(): (tmp_path/name).write_bytes(text)
    with pytest.raises(ValueError, match="videomae.*a folder of its own"): make().save(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == theirs
    (tmp_path/"config.json").unlink()
    make().save(tmp_path)
    assert (tmp_path/"model.safetensors").read_bytes() == b"weights"      # the usual name of everybody's weights


def test_a_changed_stream_is_refused_however_its_parent_is_registered():
    from mbd.global_stream import DividedStream
    class Doubled(DividedStream): pass
    class Longer(LocalStream): pass
    divided = next(n for n, e in BACKBONES.items() if getattr(e.build, "func", None) is DividedStream)
    for parent, name in ((Doubled, divided), (Longer, "long_cnn")):
        stream = build_stream(name, 3)
        model_module._describe(stream)
        stream.__class__ = parent
        with pytest.raises(ValueError, match=f"a {parent.__name__} is no registered backbone"): model_module._describe(stream)


@pytest.mark.parametrize("key", ["local_view", "global_view"])
@pytest.mark.parametrize("change", [dict(size=10**6), dict(frames=10**9), dict(size=2.5)])
def test_a_checkpoint_cannot_ask_for_clips_that_fill_the_memory(folder, key, change):
    view = json.loads((folder/"config.json").read_text())[key]
    config(folder, **{key: view | change})
    with pytest.raises(ValueError, match=f"{key} is .*whole numbers, of no more than"): load(folder)


# ---- by way of the hub, which is a folder here

@pytest.fixture
def hub(tmp_path, monkeypatch):
    "The calls that would go out, at the edge of huggingface_hub."
    import fnmatch, shutil
    asked = []
    class Api:
        def __init__(self, token=None): asked.append(("token", token))
        def create_repo(self, repo_id, **options): asked.append(("create", repo_id, options)); return type("Url", (), {"repo_id": repo_id})
        def upload_folder(self, *, repo_id, folder_path, **options): asked.append(("upload", repo_id, options)); shutil.copytree(folder_path, tmp_path / "hub" / repo_id); return f"https://hub.example.org/{repo_id}"
    def snapshot_download(repo_id, *, revision, allow_patterns, **options):
        asked.append(("download", repo_id, revision, options))
        if not (tmp_path / "hub" / repo_id).is_dir(): raise OSError("404: no such\nrepository")
        for file in (tmp_path / "hub" / repo_id).iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns): (tmp_path / "cache" / repo_id).mkdir(parents=True, exist_ok=True); shutil.copy(file, tmp_path / "cache" / repo_id)
        return str(tmp_path / "cache" / repo_id)
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api); monkeypatch.setattr(model_module, "snapshot_download", snapshot_download)
    return tmp_path / "hub", tmp_path / "cache", asked


def test_to_the_hub_and_back(hub):
    there, cache, asked = hub
    model = make(); model.about = {"seed": 3}
    assert model.push_to_hub("me/figures", private=True, token="secret") == "https://hub.example.org/me/figures"
    assert ("create", "me/figures", {"private": True, "exist_ok": True}) in asked and sorted(p.suffix for p in (there / "me/figures").iterdir()) == [".json", ".md", ".safetensors"]
    (there / "me/figures/evil.py").write_text("raise SystemExit"); (there / "me/figures/pytorch_model.bin").write_text("x"); (there / "me/figures/model-x.safetensors").write_text("x")
    again = MBD.from_pretrained("me/figures", revision="abc")
    assert same(again, model) and again.about == {"seed": 3} and again.map.group == model.map.group and asked[-1][:3] == ("download", "me/figures", "abc")
    assert sorted(p.name for p in (cache / "me/figures").iterdir()) == ["config.json", weights(cache / "me/figures").name]      # nothing else is fetched


def test_what_comes_from_the_hub_is_checked_like_any_folder(hub):
    there, _, _ = hub
    make().push_to_hub("me/figures")
    config(there / "me/figures", local=stream("os.system"))
    with pytest.raises(ValueError, match="backbone 'os.system' is unknown"): MBD.from_pretrained("me/figures")
    with pytest.raises(OSError, match="'me/nothing' is no folder here, and cannot be fetched from the hub .*404: no such repository"): MBD.from_pretrained("me/nothing")


def test_from_a_local_folder_without_the_hub(tmp_path, hub):
    model = make()
    model.save_pretrained(tmp_path / "m")
    assert same(MBD.from_pretrained(tmp_path / "m"), model) and same(MBD.from_pretrained(str(tmp_path / "m")), model) and not hub[2]
    (tmp_path / "m/config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="config.json"): MBD.from_pretrained(tmp_path / "m")


def test_saved_under_its_other_name_a_save_that_is_cut_off_leaves_the_old_model(tmp_path, monkeypatch):
    model = make(); model.save_pretrained(tmp_path)
    other = make(); other.temperature.fill_(2.)
    with monkeypatch.context() as power:
        power.setattr(os, "replace", lambda *_: 1/0)
        with pytest.raises(ZeroDivisionError): other.save_pretrained(tmp_path)
    assert same(load(tmp_path), model)


def test_a_model_can_be_copied_with_what_it_carries():
    import copy
    model = make(); model.about = {"seed": 3}
    again = copy.deepcopy(model)
    assert same(again, model) and again.about == {"seed": 3} and again.about is not model.about


# ---- killed while saving

KILLED = """
import os, signal, sys
sys.path[:0] = [{tests!r}, {root!r}]
import torch, test_model as t, mbd.model as m
model, real, folder = t.make(7, classes=("x", "y", "z")), m.save_file, sys.argv[1]
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
def change(event, given):
    "Die before the n-th change of the file system."
    global left
    if watching and (event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree") or event == "open" and isinstance(given[1], str) and set(given[1]) & set("wax+")):
        left -= 1
        if left < 0: die()
def half(tensors, path):
    "Written outside Python: die before it, in the middle of it, or go on."
    global left
    left -= 1
    if left < 0: die()
    real(tensors, path)
    left -= 1
    if left < 0: os.truncate(path, os.path.getsize(path) // 2); die()
watching, n = False, 0
sys.addaudithook(change)
m.save(model, folder + "/warm")
while True:
    child = os.fork()
    if not child:
        left, m.save_file = n, half
        watching = True
        m.save(model, f"{{folder}}/{{n}}")
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print(status)
    if not status: break
    n += 1
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_save_that_is_killed_leaves_the_old_checkpoint_or_the_new_one(tmp_path):
    here = Path(__file__).resolve().parent
    old, new = make(), make(7, classes=("x", "y", "z"))
    folders = [save(old, tmp_path / f"{steps}") for steps in range(26)]
    ended = subprocess.run([sys.executable, "-c", KILLED.format(tests=str(here), root=str(here.parent)), str(tmp_path)], capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    *killed, whole = ended.stdout.split()
    assert set(killed) == {"9"} and whole == "0" and 8 <= len(killed) < 25, ended.stderr
    found = [load(f).classes == new.classes for f in folders[:len(killed) + 1]]
    assert found == sorted(found) and not found[0] and found[-1] and 0 < sum(found) < len(found)      # old, old, ..., new, new
    for f, replaced in zip(folders, found):
        assert same(load(f), new if replaced else old)
        assert same(load(save(new, f)), new) and len(list(f.iterdir())) == 3      # the folder can be used again, and nothing is left lying about


def test_a_failed_save_leaves_the_old_checkpoint_and_nothing_else(folder, monkeypatch):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    real = model_module.save_file
    def full(tensors, path): real(tensors, path); os.truncate(path, 100); raise OSError("No space left on device")
    monkeypatch.setattr(model_module, "save_file", full)
    with pytest.raises(OSError, match="No space"): save(make(7), folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before and same(load(folder), make())


def test_only_what_a_save_leaves_behind_is_removed(folder):
    kept = ["model.pt", "notes.txt", "model-best.safetensors", "optimizer.safetensors", ".config.backup", "model-0123456789abcdef.safetensors.txt", "model.safetensors"]
    for name in [*kept, "model-0123456789abcdef.safetensors", ".model.123.part", ".config.123.part", ".card.123.part"]: (folder / name).write_text("x")
    save(make(7), folder)
    assert sorted(p.name for p in folder.iterdir()) == sorted([*kept, "README.md", "config.json", words(folder)["weights"]])


def test_saving_the_same_twice(folder):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    save(make(), folder); save(load(folder), folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


# ---- every backbone of the kit

SMALL = {"timesformer_s16": dict(vit="test_vit", size=64, frames=2), "timesformer_b16": dict(vit="test_vit", size=64, frames=2), "features": dict(widths={"embedding": 12, "stage1": 6}, hidden=4)}
LARGE = ("r3d_18", "mc3_18", "s3d", "r2plus1d_18", "mvit_v2_s", "swin3d_t", "swin3d_s", "swin3d_b")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LARGE)) for name in sorted({*BACKBONES, *model_module.LATER})])
def test_every_backbone_of_the_kit_comes_back(name, tmp_path):
    if name in model_module.LATER: __import__(model_module.LATER[name])
    if name not in ("hand_cnn", "hand_transformer", "long_cnn", "window_transformer", "features"): pytest.importorskip("timm" if name.startswith("timesformer") else "torchvision")
    model = make(mapped=False)
    model.local = build_stream(name, 3, **SMALL.get(name, {}))
    model.local.seen = frozenset(["kinetics400/train"])
    folder = save(model, tmp_path / "m")
    again = load(folder)
    assert (again.local.backbone, again.local.seen, again.local.config) == (name, {"kinetics400/train"}, model.local.config)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    config(folder, local={**words(folder)["local"], "config": {**words(folder)["local"]["config"], "weights": "kinetics400"}})
    with pytest.raises(ValueError, match="'weights' is no option"): load(folder)
