"""The registry of backbones, weights from files, and torchvision's CNNs behind the interface of a stream."""
import hashlib, os, pickle, subprocess, sys
from collections import OrderedDict
from functools import partial
from pathlib import Path
import pytest, torch, torch.nn as nn
from mbd import local_stream
from mbd.clips import GLOBAL_VIEW, LOCAL_VIEW, Cut, View, cut
from mbd.local_stream import (BACKBONES, LocalStream, StreamOutput, TorchvisionCNN, Weights, _widen, build_stream, check_output, checkpointed, fetch_weights, find_backbone,
                              gradient_field, long_cnn, read_weights, receptive_field, register, stream_view)

ROOT = Path(__file__).resolve().parents[1]
RESNETS, CNNS = ("r3d_18", "mc3_18", "r2plus1d_18"), ("r3d_18", "mc3_18", "r2plus1d_18", "s3d")
zoo = pytest.importorskip("torchvision.models.video")


def clip(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lively(module, seed=0):
    "Batch norms as after some training: a fresh one's identity hides mistakes."
    torch.manual_seed(seed)
    for m in module.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm): m.running_mean.normal_(0, .1); m.running_var.uniform_(.8, 1.2); m.weight.data.uniform_(.8, 1.2); m.bias.data.normal_(0, .1)
    return module.eval()


@pytest.fixture
def registry():
    "What a test registers is gone after it."
    before = dict(BACKBONES)
    yield BACKBONES
    BACKBONES.clear(); BACKBONES.update(before)


class Small(nn.Module):
    def __init__(self, num_classes, width=4):
        super().__init__()
        self.layer, self.norm, self.head = nn.Conv3d(3, width, 3, padding=1), nn.BatchNorm3d(width), nn.Linear(width, num_classes)

    def forward(self, x):
        x = self.norm(self.layer(x))
        return StreamOutput(self.head(x.mean((2, 3, 4))), x.mean((2, 3, 4)), OrderedDict(layer=x))


# ---- the registry

def test_an_own_backbone_is_registered_built_and_used(registry):
    view = View(4, 2, 16)
    assert register("small", "either", view)(Small) is Small
    stream = build_stream("small", 3, width=6)
    assert stream(clip(2, 3, 4, 8, 8)).logits.shape == (2, 3) and stream_view("small") == view and registry["small"].kind == "either"
    assert (stream.backbone, stream.config, stream.seen, stream.new_head) == ("small", dict(num_classes=3, width=6), frozenset(), True)
    assert build_stream(stream.backbone, **stream.config).layer.out_channels == 6


def test_what_is_no_output_of_a_stream_is_named():
    stream = Small(3); output = stream(clip(2, 3, 4, 8, 8))
    assert check_output(stream, output) is output
    for odd, words in ((output.logits, "Small returned a Tensor without logits, embedding, stages; a stream returns StreamOutput"), ((output.logits, {}), "returned a tuple without logits")):
        with pytest.raises(TypeError, match=words): check_output(stream, odd)


def test_the_same_definition_may_be_registered_twice_and_another_may_not(registry):
    register("small", "local", LOCAL_VIEW)(Small)
    register("small", "global", GLOBAL_VIEW)(Small)
    assert registry["small"].kind == "global"
    for other in (LocalStream, partial(Small, width=3), lambda num_classes: Small(num_classes)):
        with pytest.raises(ValueError, match="backbone 'small' is already .*Small; choose another name"): register("small", "local", LOCAL_VIEW)(other)
    register("part", "local", LOCAL_VIEW)(partial(Small, width=3))
    assert build_stream("part", 2).layer.out_channels == 3


@pytest.mark.parametrize("make, words", [
    (lambda: find_backbone("r3d18"), "backbone 'r3d18' is unknown; did you mean 'r3d_18'"), (lambda: stream_view("nothing at all"), "valid: hand_cnn, long_cnn"), (lambda: build_stream("r3d-18", 5), "did you mean 'r3d_18'"),
    (lambda: find_backbone("r3d_18", "kinetics"), "no weights 'kinetics'; did you mean 'kinetics400'"), (lambda: build_stream("hand_cnn", 5, "kinetics400"), "'hand_cnn' has no weights 'kinetics400'; it is trained from random ones"),
    (lambda: register("new", "globel", LOCAL_VIEW), "kind = 'globel'; did you mean 'global'"),
])
def test_registry_errors_name_the_nearest(make, words):
    with pytest.raises(ValueError, match=words): make()


def test_what_stands_in_the_registry():
    assert {"hand_cnn", "long_cnn", *CNNS} <= set(BACKBONES)
    assert (BACKBONES["hand_cnn"].kind, stream_view("hand_cnn")) == ("local", LOCAL_VIEW) and (BACKBONES["long_cnn"].kind, stream_view("long_cnn")) == ("global", GLOBAL_VIEW)
    assert all(BACKBONES[name].kind == "local" and BACKBONES[name].name == name for name in CNNS)
    assert isinstance(build_stream("hand_cnn", 3), LocalStream) and build_stream("long_cnn", 3).backbone == "long_cnn" and long_cnn(3).backbone == "long_cnn" and LocalStream(3).backbone == "hand_cnn"


@pytest.mark.parametrize("name", CNNS)
def test_entries_agree_with_torchvisions_own_table(name):
    entry, weights = find_backbone(name, "kinetics400")
    theirs = zoo.__dict__[{"r3d_18": "R3D_18", "mc3_18": "MC3_18", "r2plus1d_18": "R2Plus1D_18", "s3d": "S3D"}[name] + "_Weights"].KINETICS400_V1
    preset = theirs.transforms()
    assert weights.url == theirs.url and weights.classes == len(theirs.meta["categories"]) and weights.top1 == theirs.meta["_metrics"]["Kinetics-400"]["acc@1"]
    assert [weights.view.size] * 2 == list(preset.crop_size) and weights.view.resize == preset.interpolation.value
    assert weights.view.mean == tuple(preset.mean) and weights.view.std == tuple(preset.std) and preset.crop_size[0] / preset.resize_size[0] == .875      # what our views cut of the short side
    told = theirs.meta["_docs"]
    assert f"clip_len={weights.view.frames}" in told and f"frame_rate={1 / weights.view.seconds:.0f}`" in told and f"clips_per_video={5 if '5 clips' in weights.views else 1}" in told
    assert weights.seen == ("kinetics400/train",) and stream_view(name, "kinetics400") == weights.view == stream_view(name) and "torchvision" in weights.source


def test_a_view_prepares_pixels_as_torchvision_does_where_nothing_is_resized():
    frames = torch.randint(0, 256, (31, 128, 171, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    theirs = zoo.R3D_18_Weights.KINETICS400_V1.transforms()(frames[::2].permute(0, 3, 1, 2))
    ours = cut(frames.numpy(), stream_view("r3d_18", "kinetics400"), Cut(0, 30, (8, 30, 112, 112), False), rate=30)
    assert ours.shape == theirs.shape == (3, 16, 112, 112) and torch.allclose(ours, theirs, atol=1e-5)


# ---- weights from a file

def test_a_pickle_that_would_run_a_program_is_refused_and_not_run(tmp_path):
    class Evil:
        def __reduce__(self): return os.system, (f"echo ran > {tmp_path / 'ran'}",)
    torch.save({"head.weight": Evil()}, tmp_path / "evil.pth")
    torch.save({"head.weight": Evil()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"head.weight": Evil()}, protocol=2))
    for name in ("evil.pth", "old.pth", "plain.pth"):
        with pytest.raises(ValueError) as caught: build_stream("hand_cnn", 3, file=tmp_path / name)
        assert name in str(caught.value) and "give a state dict" in str(caught.value) and "weights_only" not in str(caught.value)
        assert not (tmp_path / "ran").exists()
    with pytest.raises(ValueError, match=r"asks for the Python object (posix|nt)\.system"): read_weights(tmp_path / "evil.pth")
    torch.load(tmp_path / "evil.pth", weights_only=False)
    assert (tmp_path / "ran").exists()      # it was a real one


def test_files_that_hold_no_state_dict(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth"); torch.save({}, tmp_path / "empty.pth"); torch.save({"epoch": 3}, tmp_path / "epoch.pth"); torch.save(torch.ones(2), tmp_path / "tensor.pth")
    for name in ("list", "empty", "epoch", "tensor"):
        with pytest.raises(ValueError, match=f"{name}.pth' hold no state dict"): read_weights(tmp_path / f"{name}.pth")
    (tmp_path / "page.pth").write_text("<html>"); (tmp_path / "page.safetensors").write_text("<html>"); (tmp_path / "nothing.pth").touch()
    torch.save(Small(2), tmp_path / "whole.pth")
    for name, why in [("page.pth", "is damaged"), ("page.safetensors", "is damaged"), ("nothing.pth", "is damaged"), ("whole.pth", r"asks for the Python object \S*Small")]:
        with pytest.raises(ValueError, match=why): read_weights(tmp_path / name)
    for absent in ("absent.pth", ""):
        with pytest.raises(FileNotFoundError, match="no such file"): read_weights(tmp_path / absent)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}, lambda s: {"model_state": s, "optimizer": {}}])
def test_a_state_dict_is_taken_out_of_a_checkpoint(wrap, tmp_path):
    state = Small(2).state_dict()
    torch.save(wrap(state), tmp_path / "a.pth")
    read = read_weights(tmp_path / "a.pth")
    assert read.keys() == state.keys() and all(torch.equal(read[k], state[k]) for k in state)


def test_weights_of_another_network_are_refused(tmp_path, registry):
    register("small", "local", LOCAL_VIEW)(Small)
    torch.save(Small(3).state_dict(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match="not those of 'hand_cnn' as built here: .*missing.*; 5 unknown|not those of 'hand_cnn' as built here: .*missing"): build_stream("hand_cnn", 3, file=tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"of another shape \(layer.weight, layer.bias, norm.weight, ...\)"): build_stream("small", 3, file=tmp_path / "a.pth", width=5)
    torch.save({k: v for k, v in Small(3).state_dict().items() if k != "layer.bias"}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match=r"1 missing \(layer.bias\)$"): build_stream("small", 3, file=tmp_path / "b.pth")
    torch.save({**Small(3).state_dict(), "more": torch.ones(1)}, tmp_path / "c.pth")
    with pytest.raises(ValueError, match=r"1 unknown or of another shape \(more\)$"): build_stream("small", 3, file=tmp_path / "c.pth")
    torch.save({**Small(3).state_dict(), "head.weight": torch.ones(9, 7), "head.bias": torch.ones(9)}, tmp_path / "d.pth")      # not only the classes differ
    with pytest.raises(ValueError, match="head.weight"): build_stream("small", 3, file=tmp_path / "d.pth")
    register("wrong", "local", LOCAL_VIEW, head="fc.")(partial(Small))
    with pytest.raises(ValueError, match="no parameter's name begins with head = 'fc.'"): build_stream("wrong", 3, file=tmp_path / "a.pth")


@pytest.mark.parametrize("change, words", [(lambda t: t * float("nan"), "holds NaN or infinite values"), (lambda t: t.to(torch.complex64), "holds torch.complex64")])
def test_weights_that_are_no_numbers_are_refused(tmp_path, change, words):
    state = build_stream("hand_cnn", 3).state_dict(); key = next(k for k, v in state.items() if v.is_floating_point())
    torch.save(state | {key: change(state[key])}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=f"a.pth': '{key}' {words}.*take a whole copy"): build_stream("hand_cnn", 3, file=tmp_path / "a.pth")


def test_a_head_with_other_classes_or_none_is_left_out(tmp_path, registry):
    register("small", "local", LOCAL_VIEW)(Small)
    state = Small(3).state_dict()
    for name, kept in [("a", state), ("b", {k: v for k, v in state.items() if not k.startswith("head.")}), ("c", {k: v for k, v in state.items() if "tracked" not in k})]: torch.save(kept, tmp_path / f"{name}.pth")
    for name, classes, new in [("a", 3, False), ("a", 5, True), ("b", 3, True), ("c", 3, False)]:
        stream = build_stream("small", classes, file=tmp_path / f"{name}.pth")
        assert stream.new_head is new and torch.equal(stream.layer.weight, state["layer.weight"]) and stream.head.weight.shape == (classes, 4)
        assert torch.equal(stream.head.weight, state["head.weight"]) == (not new) and stream.seen == {"not stated"}


def test_parameters_that_the_file_cannot_know_stay_as_they_are(tmp_path, registry):
    class Fresh(Small):
        fresh = ("gate",)
        def __init__(self, num_classes): super().__init__(num_classes); self.gate = nn.Parameter(torch.zeros(1))
    register("fresh", "global", GLOBAL_VIEW)(Fresh)
    torch.save(Small(3).state_dict(), tmp_path / "a.pth")
    stream = build_stream("fresh", 3, file=tmp_path / "a.pth")
    assert stream.gate.item() == 0 and not stream.new_head


# ---- weights from an address

def test_weights_are_fetched_once_into_torchs_cache_and_their_hash_is_checked(tmp_path, registry, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    torch.save(Small(3).state_dict(), tmp_path / "w.pth")
    data = (tmp_path / "w.pth").read_bytes()
    good, bad = tmp_path / f"w-{hashlib.sha256(data).hexdigest()[:8]}.pth", tmp_path / "w-00000000.pth"
    for file in (good, bad): file.write_bytes(data)
    entry = lambda file: Weights(file.as_uri(), LOCAL_VIEW, 3, ("mine/train",))
    register("small", "local", LOCAL_VIEW, {"good": entry(good), "bad": entry(bad)})(Small)
    assert not (tmp_path / "home").exists()
    stream = build_stream("small", 3, "good")
    assert stream.seen == {"mine/train"} and not stream.new_head
    good.unlink()
    assert torch.equal(build_stream("small", 3, "good").layer.weight, stream.layer.weight)      # from the cache
    for file in (bad, tmp_path / "absent-11111111.pth"):
        with pytest.raises(OSError, match="cannot be fetched.*give file="): fetch_weights(entry(file))
    with pytest.raises(OSError, match="w-00000000.pth cannot be fetched"): build_stream("small", 3, "bad")


def test_nothing_is_fetched_or_imported_before_it_is_asked_for(tmp_path):
    code = f"""
import sys
def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "urllib.Request"): raise AssertionError(f"the network was asked for: {{args}}")
sys.addaudithook(hook)
sys.path.insert(0, {str(ROOT)!r})
from mbd import local_stream
print(sorted(name for name in ("torchvision", "timm") if name in sys.modules))
stream = local_stream.build_stream("mc3_18", 3)
print(stream.new_head, set(stream.seen))
try: local_stream.build_stream("mc3_18", 3, "kinetics400")
except OSError as error: print("asked" if "network was asked" in str(error) else error)
"""
    env = {**os.environ, "TORCH_HOME": str(tmp_path / "torch"), "HF_HOME": str(tmp_path / "hf")}
    ended = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-2000:]
    lines = [line for line in ended.stdout.splitlines() if not line.startswith("Downloading")]
    assert lines == ["[]", "True set()", "asked"]
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


# ---- torchvision's CNNs

SMALL = {**dict.fromkeys(RESNETS, (4, 32, 32)), "s3d": (13, 209, 209)}
SHAPES = {"r3d_18": [(64, 4, 16, 16), (64, 4, 16, 16), (128, 2, 8, 8), (256, 1, 4, 4), (512, 1, 2, 2)], "mc3_18": [(64, 4, 16, 16), (64, 4, 16, 16), (128, 4, 8, 8), (256, 4, 4, 4), (512, 4, 2, 2)],
          "s3d": [(64, 7, 53, 53), (192, 7, 53, 53), (480, 7, 27, 27), (832, 4, 14, 14), (1024, 2, 7, 7)]}
SHAPES["r2plus1d_18"] = SHAPES["r3d_18"]


@pytest.mark.parametrize("name, ending", [*((name, "pth") for name in CNNS), ("mc3_18", "safetensors")])
def test_logits_are_torchvisions_own_and_maps_have_the_documented_shapes(name, ending, tmp_path):
    from safetensors.torch import save_file
    torch.manual_seed(0)
    net, x = lively(zoo.__dict__[name](weights=None)), clip(2 if name != "s3d" else 1, 3, *SMALL[name])
    nn.init.normal_(net.fc.weight if name != "s3d" else net.classifier[1].weight, 0, .05)
    path = tmp_path / f"weights.{ending}"
    torch.save(net.state_dict(), path) if ending == "pth" else save_file(net.state_dict(), path)
    stream = build_stream(name, 400, weights="kinetics400", file=path).eval()
    with torch.no_grad(): output, theirs = stream(x), net(x)
    assert theirs.std() > 1e-3 and torch.allclose(output.logits, theirs, atol=1e-5)
    assert [tuple(m.shape[1:]) for m in output.stages.values()] == SHAPES[name] and list(output.stages) == ["stem", "layer1", "layer2", "layer3", "layer4"]
    assert torch.allclose(output.embedding, output.stages["layer4"].mean((2, 3, 4)), atol=1e-5)
    head = net.fc if name != "s3d" else net.classifier[1]
    assert torch.allclose(output.embedding @ head.weight.flatten(1).T + head.bias, output.logits, atol=1e-5)
    assert (stream.new_head, stream.seen, stream.backbone, stream.config) == (False, {"kinetics400/train"}, name, dict(num_classes=400, checkpointing=False))


@pytest.mark.parametrize("name", ["mc3_18", "s3d"])
def test_five_classes_keep_all_but_the_head(name, tmp_path):
    net = zoo.__dict__[name](weights=None)
    torch.save(net.state_dict(), tmp_path / "a.pth")
    stream = build_stream(name, 5, weights="kinetics400", file=tmp_path / "a.pth")
    own, head = stream.net.state_dict(), BACKBONES[name].head.removeprefix("net.")
    assert stream.new_head and stream.seen == {"kinetics400/train"} and all(torch.equal(own[k], v) == (not k.startswith(head)) for k, v in net.state_dict().items() if k in own and v.shape == own[k].shape)
    assert {k for k, v in net.state_dict().items() if own[k].shape != v.shape} == {k for k in own if k.startswith(head)}
    other = "s3d" if name == "mc3_18" else "mc3_18"
    with pytest.raises(ValueError, match=f"not those of '{other}'"): build_stream(other, 5, weights="kinetics400", file=tmp_path / "a.pth")


def test_weights_saved_from_a_stream_load_too(tmp_path):
    stream = lively(build_stream("mc3_18", 4))
    torch.save(stream.state_dict(), tmp_path / "a.pth")
    again, x = build_stream("mc3_18", 4, file=tmp_path / "a.pth").eval(), clip(1, 3, 4, 24, 24)
    assert not again.new_head and again.seen == {"not stated"} and torch.equal(again(x).logits, stream(x).logits)


TOO_SMALL = [(12, 209, 209), (13, 208, 224), (13, 224, 208)]      # that (13, 209, 209) is enough is seen above


def test_s3d_says_how_small_a_clip_may_be():
    stream = build_stream("s3d", 3)
    for t, h, w in TOO_SMALL:
        with pytest.raises(ValueError, match=f"s3d needs 13 frames of 209 x 209 pixels or more, got {t} of {h} x {w}; use stream_view"): stream(clip(1, 3, t, h, w))


@pytest.mark.slow
@pytest.mark.parametrize("shape", TOO_SMALL)
def test_where_we_refuse_torchvisions_s3d_fails_too(shape):
    with torch.no_grad(), pytest.raises(RuntimeError): zoo.s3d(weights=None, num_classes=3).eval()(clip(1, 3, *shape))


@pytest.mark.parametrize("shape", [(3, 4, 16, 16), (1, 4, 3, 16, 16), (1, 1, 4, 16, 16)])
def test_a_clip_of_the_wrong_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"expected a clip \(B, 3, T, H, W\)"): build_stream("mc3_18", 3)(clip(*shape))


def step(name, checkpointing, shape):
    "Gradients and buffers after two training steps (the second sees what the first left)."
    torch.manual_seed(0)
    stream = build_stream(name, 3, checkpointing=checkpointing).train()
    for seed in range(2):
        torch.manual_seed(seed)
        output = stream(clip(2, 3, *shape, seed=seed))
        (output.logits.square().sum() + output.stages["layer2"].square().mean() + output.stages["layer4"].square().mean()).backward()
    return {n: p.grad for n, p in stream.named_parameters()}, dict(stream.named_buffers())


@pytest.mark.parametrize("name, shape", [("mc3_18", (2, 24, 24)), pytest.param("r3d_18", (4, 32, 32), marks=pytest.mark.slow), pytest.param("r2plus1d_18", (4, 32, 32), marks=pytest.mark.slow), pytest.param("s3d", (13, 209, 209), marks=pytest.mark.slow)])
def test_checkpointing_gives_the_same_gradients_and_running_statistics(name, shape):
    (plain, before), (saved, after) = (step(name, flag, shape) for flag in (False, True))
    assert plain.keys() == saved.keys() and before.keys() == after.keys()
    for key in plain: assert plain[key].abs().max() > 0 and (plain[key] - saved[key]).abs().max() <= 1e-4 * plain[key].abs().max(), key
    for key in before: assert torch.allclose(before[key].double(), after[key].double(), rtol=1e-5, atol=1e-7), key
    assert {int(v) for k, v in after.items() if k.endswith("num_batches_tracked")} == {2}


def test_checkpointing_saves_memory_and_keeps_out_of_the_way_without_gradients():
    def kept(flag):
        torch.manual_seed(0)
        sizes, stream = [], build_stream("mc3_18", 3, checkpointing=flag).train()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t): output = stream(clip(1, 3, 4, 32, 32)).logits
        return sum(sizes), output
    (plain, a), (saved, b) = kept(False), kept(True)
    assert saved < plain / 4 and torch.allclose(a, b, atol=1e-6)
    stream = build_stream("mc3_18", 3, checkpointing=True).eval()
    with torch.no_grad(): assert not stream(clip(1, 3, 2, 16, 16)).logits.requires_grad


def test_checkpointed_restores_the_norms_even_where_the_backward_pass_fails():
    class Fails(nn.Module):
        calls = 0
        def forward(self, x):
            Fails.calls += 1
            if Fails.calls > 1: raise RuntimeError("the second time")
            return x * 2
    part = nn.Sequential(nn.Conv3d(3, 2, 1), nn.BatchNorm3d(2, momentum=.3), Fails(), nn.Conv3d(2, 2, 1))
    output = checkpointed(part, clip(2, 3, 2, 4, 4))
    with pytest.raises(RuntimeError, match="the second time"): output.sum().backward()
    assert part[1].momentum == .3 and part[1].num_batches_tracked.item() == 1


# ---- how far they see

@pytest.mark.parametrize("name, field", [("r3d_18", (109, 219)), ("mc3_18", (11, 219)), ("r2plus1d_18", (109, 219)), ("s3d", (99, 379)), ("hand_cnn", (7, 31)), ("long_cnn", (15, 63))])
def test_fields_of_the_registered_networks(name, field): assert receptive_field(build_stream(name, 2)) == field


class Front:
    "The first stages of a stream, as a stream."
    def __init__(self, stream, count): self.stages = stream.stages[:count]


@pytest.mark.parametrize("name, count, shape, place", [
    ("r2plus1d_18", 2, (15, 27, 27), "layer1"), ("s3d", 2, (23, 51, 51), "layer1"),
    pytest.param("r3d_18", 3, (33, 65, 65), "layer2", marks=pytest.mark.slow), pytest.param("mc3_18", 3, (15, 65, 65), "layer2", marks=pytest.mark.slow), pytest.param("s3d", 3, (31, 91, 91), "layer2", marks=pytest.mark.slow),
])
def test_the_computed_field_is_what_the_gradient_measures(name, count, shape, place):
    stream = lively(build_stream(name, 2))
    expected, touched = receptive_field(Front(stream, count)), torch.zeros(shape, dtype=torch.bool)
    for seed in range(2):
        x = clip(1, 3, *shape, seed=seed).requires_grad_()
        y = x
        for part in stream.stages[:count]: y = part(y)
        seen, = torch.autograd.grad(y[0, :, y.shape[2] // 2, y.shape[3] // 2, y.shape[4] // 2].sum(), x)
        touched |= (seen[0] != 0).any(0)
    t, rows = touched.any(2).any(1).nonzero().flatten(), touched.any(2).any(0).nonzero().flatten()
    assert (int(t[-1] - t[0]) + 1, int(rows[-1] - rows[0]) + 1) == expected


def test_mc3_is_local_in_time_and_r3d_is_not():
    seen = {name: gradient_field(lively(build_stream(name, 2)), clip(3, 16, 16, 16)).sum((1, 2)) > 0 for name in ("mc3_18", "r3d_18")}
    assert seen["r3d_18"].all() and seen["mc3_18"].nonzero().flatten().tolist() == list(range(3, 14))


def test_gradient_field_leaves_the_stream_as_it_was():
    stream, x = LocalStream(3).train(), clip(3, 8, 24, 24)
    before = {k: v.clone() for k, v in stream.state_dict().items()}
    seen = gradient_field(stream, x, "stage1", (2, 3, 4))
    assert seen.shape == (8, 24, 24) and seen.nonzero().amin(0).tolist() == [1, 5, 7] and seen.nonzero().amax(0).tolist() == [3, 7, 9]
    assert stream.training and not x.requires_grad and all(torch.equal(before[k], v) for k, v in stream.state_dict().items()) and all(p.grad is None for p in stream.parameters())
    with torch.no_grad(): assert torch.equal(gradient_field(stream, x, "stage1", (2, 3, 4)), seen)
    with pytest.raises(ValueError, match="the stream has no stage 'stage9'; .*valid: stage1, stage2, stage3, stage4"): gradient_field(stream, x, "stage9")
    assert stream.training


def test_what_cannot_be_followed_is_refused():
    class Attends(nn.Module):
        def __init__(self): super().__init__(); self.stages = [nn.MultiheadAttention(4, 1)]
    class Branches(nn.Module):
        def __init__(self): super().__init__(); self.stages = [Branch()]
    class Branch(nn.Module):
        def forward(self, x): return x if x.sum() > 0 else -x
    class Mixes(nn.Module):
        def forward(self, x): return x - x.mean()
    mixed = nn.Module(); mixed.stages = [Mixes()]
    for stream in (Small(2), Attends(), Branches(), mixed):
        with pytest.raises(ValueError, match=f"the field of {type(stream).__name__} cannot be computed .*gradient_field"): receptive_field(stream)


def test_a_chapter_that_defines_its_class_anew_may_register_it_beside_the_module(registry):
    "Notebooks are run in the process that has imported the module already."
    here = type("Small", (Small,), {"__module__": "__main__", "__qualname__": Small.__qualname__})
    for first, second in ((Small, here), (here, Small), (partial(Small, width=3), partial(here, width=3))):
        registry.pop("small", None)
        register("small", "local", LOCAL_VIEW)(first)
        register("small", "local", LOCAL_VIEW)(second)
        assert registry["small"].build is second


@pytest.mark.parametrize("layer, centre", [(nn.Conv3d(1, 1, 3, 2, 1), 0), (nn.Conv3d(1, 1, 3, 2), 1), (nn.Conv3d(1, 1, 3, padding="same", dilation=2), 0), (nn.Conv3d(1, 1, 5, padding="valid"), 2), (nn.MaxPool3d(2), .5),
                                           (nn.Conv3d(1, 1, 7, 2, 3), 0), (nn.MaxPool3d(3, 2, 1), 0), (nn.Conv3d(1, 1, 4, 4), 1.5)])
def test_where_the_first_position_looks(layer, centre):
    assert _widen(nn.Sequential(layer), [1]*3, [1]*3)[2] == [centre]*3
    assert _widen(nn.Sequential(nn.MaxPool3d(2), layer), [1]*3, [1]*3)[2] == [.5 + 2*centre]*3


def test_positions_of_the_kits_cnns_stand_on_their_steps():
    for stream in (LocalStream(2), long_cnn(2), build_stream("window_transformer", 2)):
        field = [1]*3, [1]*3, [0]*3
        for stage in stream.stages:
            field = _widen(stage, *field)
            assert field[2] == [0]*3
