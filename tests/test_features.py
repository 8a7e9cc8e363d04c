import json, math, os, shutil, signal, subprocess, sys, textwrap, time
from dataclasses import replace
from pathlib import Path
import numpy as np, pytest, torch
from mbd import clips, datasets, features, miniactions, training, video
from mbd.clips import LOCAL_VIEW, View
from mbd.datasets import Record
from mbd.distillation import Distillation
from mbd.features import FeatureDataset, FeatureStore, FeatureStream, extract, generated_features, generated_split, run_schedule, stream_on
from mbd.local_stream import build_stream
from mbd.model import MBD
from mbd.training import Training

ROOT = Path(__file__).resolve().parents[1]
VIEW, CLASSES = View(4, 1, 16), ["red", "green", "blue"]
WIDTHS = {"local": {"embedding": 48, "a": 8, "b": 16}, "global": {"embedding": 48, "c": 16}}
QUICK = dict(warm_up=Training(epochs=12, batch_size=64, learning_rate=3e-3), distil=Training(epochs=2, batch_size=64, learning_rate=1e-3), resamples=100)
SHORT = QUICK | dict(warm_up=Training(epochs=2, batch_size=64, learning_rate=3e-3))
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def backbone(seed=0):
    torch.manual_seed(seed)
    return build_stream("hand_cnn", 3, widths=(4, 6), temporal_kernels=(3, 3))


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    "Twelve short videos with a tint."
    folder, rng, made = tmp_path_factory.mktemp("videos"), np.random.default_rng(0), []
    for i in range(12):
        picture = rng.integers(40, 160, (8, 32, 48, 3))
        picture[..., i % 3] += 90
        path = folder/f"v{i:02d}.mp4"
        video.write_video(path, picture.astype(np.uint8))
        made.append(Record(f"v{i:02d}", path, i % 3, f"{CLASSES[i % 3]}_g{i // 6}", "train", origin="tints/train1"))
    return made


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch): monkeypatch.setenv("MBD_CACHE", str(tmp_path_factory.getbasetemp()/"cache"))


def store(records, folder, seed=0, **more):
    options = dict(dataset="tints", classes=CLASSES, view=VIEW) | more
    return extract(records, more.pop("stream", None) or backbone(seed), folder, **{k: v for k, v in options.items() if k != "stream"})


def same(a, b): return a.index["ids"] == b.index["ids"] and all(np.array_equal(a[r.id], b[r.id]) for r in a.records) and len(a) == len(b)


def snapshot(folder): return {f.relative_to(folder).as_posix(): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.fixture(scope="module")
def pair(tmp_path_factory): return tuple(FeatureStore(p) for p in generated_features(tmp_path_factory.mktemp("pair"), classes=9, videos=900, widths=WIDTHS, signal=3.))


# ---- storing

def test_what_is_stored_is_what_the_stream_answers(records, tmp_path):
    stream = backbone().eval()
    made = FeatureStore(store(records, tmp_path, stream=stream, protocol="1x3"))
    data = clips.ClipDataset(records, None, VIEW, View(1, 1, 8, sampling="shared"), clips=1, crops=3)
    for r in (0, 7):
        with torch.no_grad(): out = stream(torch.stack([i["local"] for i in data.read(r, range(3))]))
        wanted = torch.cat([out.embedding, *[m.mean((2, 3, 4)) for m in out.stages.values()]], 1)
        assert np.allclose(made[records[r].id], wanted.numpy(), rtol=2e-3, atol=1e-3) and made[records[r].id].dtype == np.float16
    assert len(made) == 12 and made.widths == {"embedding": 6, "stage1": 4, "stage2": 6} and made.view == VIEW and not made.seen
    assert [(r.id, r.label, r.source, r.origin) for r in made.records] == [(r.id, r.label, r.source, r.origin) for r in records]
    views = [made[r.id] for r in records]
    assert any(not np.array_equal(v[0], v[2]) for v in views)      # left and right crop differ


def test_asking_again_reads_nothing_and_changes_nothing(records, tmp_path):
    store(records, tmp_path)
    before, steps = snapshot(tmp_path), []
    gone = [replace(r, path=Path("nowhere.mp4")) for r in records]
    store(gone, tmp_path, progress=lambda *s: steps.append(s))
    assert snapshot(tmp_path) == before and steps == []


def test_shards_read_as_one_run_in_any_order_and_of_any_number(records, tmp_path):
    whole = FeatureStore(store(records, tmp_path/"a", augmented=2))
    for shard in [(2, 3), (0, 3), (1, 3)]: place = store(records, tmp_path/"b", augmented=2, shard=shard)
    assert same(FeatureStore(place), whole)
    store(records, tmp_path/"c", augmented=2, shard=(1, 4))
    with pytest.raises(ValueError, match="9 not done"): FeatureStore(tmp_path/"c/tints/hand_cnn-unnamed-1x3+2")
    assert len(FeatureStore(tmp_path/"c/tints/hand_cnn-unnamed-1x3+2", max_missing=1.)) == 3
    steps = []
    place = store(records, tmp_path/"c", augmented=2, progress=lambda *s: steps.append(s))     # goes on with another number of shards
    assert same(FeatureStore(place), whole) and steps[0] == (4, 12)
    with pytest.raises(ValueError, match="0 <= i < n"): store(records, tmp_path/"d", shard=(3, 3))


def test_augmented_views_mirror_only_classes_that_allow_it(records, tmp_path):
    still = clips.Augmentation(scale=1., brightness=0.)
    plain, mirrored = (FeatureStore(store(records, tmp_path/name, augmented=6, flip=flip, augment=still)) for name, flip in (("plain", frozenset({0, 1, 2})), ("some", frozenset({0, 1}))))
    changed = {r.label for r in records if not np.array_equal(plain[r.id][3:], mirrored[r.id][3:])}
    assert changed == {2}
    assert all(np.array_equal(plain[r.id][:3], mirrored[r.id][:3]) for r in records)       # the fixed views are never mirrored


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from mbd import features
from mbd.clips import View
from mbd.datasets import Record
from mbd.local_stream import build_stream
rows, folder, place, count = eval(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
calls = 0
def die(*_):
    global calls
    calls += 1
    if calls > count: os.kill(os.getpid(), signal.SIGKILL)
def before(module, name):
    old = getattr(module, name)
    def new(*a, **k): die(); return old(*a, **k)
    setattr(module, name, new)
for target in place.split(","):
    if target == "write": before(features._Part, "write")
    elif target == "flush": before(features._Part, "flush")
    elif target == "fsync": before(os, "fsync")
    elif target == "truncate": before(os, "open")
    elif target == "replace": before(os, "replace")
if place == "progress": progress = die
else: progress = None
import mbd.features
part = mbd.features._Part.write
def often(self, row, values, size):
    part(self, row, values, size); self.flush()
if place != "write": mbd.features._Part.write = often
torch.manual_seed(0)
features.extract([Record(*r[:1], Path(r[1]), *r[2:], origin="tints/train1") for r in rows], build_stream("hand_cnn", 3, widths=(4, 6), temporal_kernels=(3, 3)), folder,
                 dataset="tints", classes=["red", "green", "blue"], view=View(4, 1, 16), progress=progress)
"""


def killed(records, folder, place, count):
    rows = repr([(r.id, str(r.path), r.label, r.source, r.subset) for r in records])
    return subprocess.run([sys.executable, "-c", KILLED, rows, str(folder), place, str(count)], env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
@pytest.mark.parametrize("place,count", [("progress", 4), pytest.param("fsync", 7, marks=pytest.mark.slow)] + [pytest.param(p, c, marks=pytest.mark.slow) for p, c in [("replace", 0), ("fsync", 0), ("fsync", 1), ("fsync", 8), ("write", 5), ("flush", 3), ("progress", 10)]])
def test_a_killed_run_goes_on_and_ends_with_the_same_features(records, tmp_path, place, count):
    ended = killed(records, tmp_path/"killed", place, count)
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-2000:]
    steps = []
    left = store(records, tmp_path/"killed", progress=lambda *s: steps.append(s))
    whole = FeatureStore(store(records, tmp_path/"whole"))
    assert same(FeatureStore(left), whole)
    if place == "progress": assert steps[0][0] == count + 2           # the finished part survived
    assert not [f for f in left.iterdir() if f.suffix == ".part"] or (place, count) in {("replace", 0), ("fsync", 0)}      # killed before the description was whole


def test_a_video_is_never_said_to_be_done_before_its_features_are_written(records, tmp_path, monkeypatch):
    "The order of writes: features, fsync, then the byte."
    events, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.fstat(fd).st_size), fsync(fd))[1])
    part = features._Part
    write = part.write
    monkeypatch.setattr(part, "write", lambda self, row, values, size: (write(self, row, values, size), events.append("data"), [f for f in [np.fromfile(self.states, np.uint8)] if f[row]] and pytest.fail("said too early"))[0])
    place = store(records, tmp_path)
    assert events.index("data") < len(events) - 2 and isinstance(events[-1], int) and events[-1] == 12        # the states come last
    assert len(FeatureStore(place)) == 12


def test_unreadable_videos_are_counted_and_never_replaced(records, tmp_path):
    broken = tmp_path/"broken.mp4"
    broken.write_bytes(b"no video")
    bad = [replace(r, path=broken) if r.id == "v04" else replace(r, path=tmp_path/"gone.mp4") if r.id == "v05" else r for r in records]
    with pytest.raises(RuntimeError, match="mbd data check"): store(bad, tmp_path/"strict")
    place = store(bad, tmp_path/"f", max_failures=.2)
    with pytest.raises(ValueError, match="2 unreadable"): FeatureStore(place)
    made = FeatureStore(place, max_missing=.2)
    assert set(made.unreadable) == {"v04", "v05"} and not made.missing and len(made) == 10 and all(made.unreadable.values())
    with pytest.raises(KeyError, match="v04"): made["v04"]
    with pytest.raises(KeyError): made.read(np.array([4]), np.array([0]))
    steps = []
    store(records, tmp_path/"f", max_failures=.2, progress=lambda *s: steps.append(s)); assert not steps      # known to be unreadable
    again = FeatureStore(store(records, tmp_path/"f", retry=True))                                            # mended meanwhile
    assert len(again) == 12 and not again.unreadable
    data = FeatureDataset(records, made, made, max_failures=.2)
    assert set(data.unreadable) == {"v04", "v05"} and len(data.records) == 10
    with pytest.raises(ValueError, match="2 of 12 videos have no stored features"): FeatureDataset(records, made, made)


@pytest.mark.parametrize("change,word", [(dict(seed=1), "digest"), (dict(view=View(4, 2, 16)), "view"), (dict(classes=["a", "b", "c"]), "classes"), (dict(fewer=True), "ids")])
def test_other_weights_views_classes_or_videos_are_never_mixed(records, tmp_path, change, word):
    place = store(records, tmp_path)
    before = snapshot(place)
    with pytest.raises(ValueError, match=f"(?s)holds other features.*{word} .*never mixed"): store(records[:-1] if change.pop("fewer", False) else records, tmp_path, **change)
    assert snapshot(place) == before


def test_parts_of_another_description_are_not_seen(records, tmp_path):
    a, b = store(records, tmp_path/"a"), store(records, tmp_path/"b", seed=1)
    for f in b.glob("*.npy"): shutil.copy(f, a/f.name)
    for f in b.glob("*.state"): shutil.copy(f, a/f.name)
    kept = FeatureStore(a)
    shutil.copy(b/"index.json", a/"index.json")
    assert same(FeatureStore(a), FeatureStore(b)) and not same(kept, FeatureStore(b))


@pytest.mark.parametrize("value,word", [(70000., "reach 7e"), (float("nan"), "not finite"), (float("inf"), "not finite")])
def test_what_float16_cannot_hold_is_refused_by_name(records, tmp_path, value, word):
    stream = backbone()
    forward = stream.forward
    def big(x):
        out = forward(x)
        if x.abs().sum() > 0: out.embedding = out.embedding.clone(); out.embedding[0, 1] = value
        return out
    stream.forward = big
    with pytest.raises(ValueError, match=f"v00.*embedding.*{word}"): store(records, tmp_path, stream=stream)
    with pytest.raises(ValueError, match="12 not done"): FeatureStore(next((tmp_path/"tints").iterdir()))


def test_the_stream_is_left_as_it_was(records, tmp_path):
    stream = backbone().train()
    before = {n: v.clone() for n, v in stream.state_dict().items()}
    store(records, tmp_path, stream=stream)
    assert stream.training and all(torch.equal(v, before[n]) for n, v in stream.state_dict().items())


# ---- hostile stores

def rewrite(place, **changes):
    index = json.loads((place/"index.json").read_text()) | changes
    (place/"index.json").write_text(json.dumps(index))


HOSTILE = [dict(ids=["../../etc/passwd"] + [f"v{i:02d}" for i in range(1, 12)]), dict(ids=["a\\b"] + [f"v{i:02d}" for i in range(1, 12)]), dict(ids=["v00"]*12), dict(ids=[]), dict(ids="v00"),
           dict(labels=[99]*12), dict(labels=[-1]*12), dict(labels=[True]*12), dict(labels=[0]*11), dict(widths={"embedding": -4}), dict(widths={"embedding": 10**12}), dict(widths=[["embedding", 6]]), dict(widths={}),
           dict(clips=0), dict(clips=10**9), dict(crops="3"), dict(augmented=-1), dict(view={"frames": -1}), dict(view={"unknown": 1}), dict(view=None), dict(format=99), dict(seen=[1]), dict(seen="x"), dict(classes=["a", "a", "b"]), dict(backbone=7), dict(expected="many")]


@pytest.mark.parametrize("change", HOSTILE, ids=lambda c: f"{list(c)[0]}={str(list(c.values())[0])[:20]}")
def test_a_hostile_description_is_refused_with_words(records, tmp_path_factory, change, pytestconfig):
    place = _hostile_place(records, tmp_path_factory)
    saved = (place/"index.json").read_text()
    try:
        rewrite(place, **change)
        with pytest.raises(ValueError, match="index.json"): FeatureStore(place)
    finally: (place/"index.json").write_text(saved)
    assert len(FeatureStore(place)) == 12


_place = {}
def _hostile_place(records, factory):
    if not _place: _place["it"] = store(records, factory.mktemp("hostile"))
    return _place["it"]


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100000, "\"x\"", "{\"format\": 1}"])
def test_what_is_no_description_is_refused(tmp_path, text):
    (tmp_path/"index.json").write_text(text)
    with pytest.raises(ValueError, match="index.json"): FeatureStore(tmp_path)


def test_a_folder_without_a_store_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="mbd features"): FeatureStore(tmp_path/"nothing")


def test_files_of_another_size_or_kind_are_refused(records, tmp_path):
    place = store(records, tmp_path)
    (file,) = place.glob("*.npy"); data = file.read_bytes()
    pickled = tmp_path/"evil.npy"
    np.save(pickled, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    shaped = tmp_path/"other.npy"
    np.save(shaped, np.zeros((12, 3, 17), np.float16))
    wide = tmp_path/"wide.npy"
    np.save(wide, np.zeros((12, 3, 16), np.float32))
    for wrong in (data[:-2], data + b"xx", b"", b"no array", pickled.read_bytes(), shaped.read_bytes(), wide.read_bytes()):
        file.write_bytes(wrong)
        with pytest.raises(ValueError, match="delete this part"): FeatureStore(place)
    file.write_bytes(data); assert len(FeatureStore(place)) == 12
    (states,) = place.glob("*.state"); states.write_bytes(b"\1"*11)
    with pytest.raises(ValueError, match="delete this part"): FeatureStore(place)
    assert rewrite(place, clips=2, protocol="2x3") is None                  # a description that fits other files finds no parts
    with pytest.raises(ValueError, match="12 not done"): FeatureStore(place)


def test_names_of_parts_cannot_lead_elsewhere_or_ask_for_much(records, tmp_path):
    place = store(records, tmp_path)
    key = next(place.glob("*.state")).name[:16]
    for name in (f"{key}-0-of-0.state", f"{key}-5-of-2.state", f"{key}-0-of-999999.state", f"{key}-0-of-99999999999999.state", f"{key}-x-of-1.state"): (place/name).write_bytes(b"\1")
    assert len(FeatureStore(place)) == 12


def test_the_store_cannot_be_written_to(records, tmp_path):
    made = FeatureStore(store(records, tmp_path))
    with pytest.raises(ValueError): made["v00"][0, 0] = 1


# ---- lists, stream, data

def test_an_official_list_finds_its_stored_videos_where_the_files_are_gone(tmp_path):
    mini = miniactions.generate(tmp_path/"mini", classes=("PushUpsSlow", "PushUpsFast"), train_groups=3, test_groups=1, clips=1, workers=1)
    made = features.features_command("ucf101", "hand_cnn", protocol="1x1", root=mini, output=tmp_path/"features", device="cpu", workers=0)
    assert made.dataset == "ucf101" and len(made) == made.expected == 8 and made.digest == features.features_command("ucf101", "hand_cnn", protocol="1x1", root=mini, output=tmp_path/"features", device="cpu", workers=0).digest
    with_files = {s: made.of(datasets.load("ucf101", mini, 1, s)) for s in ("train", "test")}
    shutil.rmtree(mini/"UCF-101")
    for subset, records in with_files.items():
        found = made.of(datasets.load("ucf101", mini, 1, subset))
        assert found == records and {(r.subset, r.origin) for r in found} == {(subset, f"ucf101/{subset}1")} and len(found) == {"train": 6, "test": 2}[subset]
    lines = (mini/"ucfTrainTestlist/classInd.txt").read_text()
    (mini/"ucfTrainTestlist/classInd.txt").write_text(lines + "3 Another\n")
    with pytest.raises(ValueError, match="other classes"): made.of(datasets.load("ucf101", mini, 1, "train"))
    with pytest.raises(ValueError, match="none of 6 videos"): features.features_command("ucf101", "hand_cnn", subset="train", root=mini, output=tmp_path/"g", device="cpu", workers=0)


def test_a_store_goes_on_after_data_check_has_found_a_broken_video(tmp_path):
    mini = miniactions.generate(tmp_path/"mini", classes=("PushUpsSlow", "PushUpsFast"), train_groups=3, test_groups=1, clips=1, workers=1)
    bad, *others = datasets.load("ucf101", mini).records
    whole, ask = bad.path.read_bytes(), dict(name="ucf101", backbone="hand_cnn", protocol="1x1", root=mini, output=tmp_path/"features", device="cpu", workers=0)
    bad.path.write_bytes(b"no video")
    with pytest.raises(RuntimeError, match="1 of 8 videos could not be read.*mbd data check"): features.features_command(**ask)
    (mini/"unreadable.csv").write_text(f"path,reason\n{bad.path.relative_to(mini).as_posix()},no frame decodes\n")
    made = features.features_command(**ask)
    assert set(made.unreadable) == {bad.id} and len(made) == 7 and "8 videos expected, 8 found, 7 stored, 1 unreadable, 0 not done" in repr(made)
    again = features.features_command(**ask, retry=True)                              # still on the list: noted, not tried
    assert again.unreadable == {bad.id: "no frame decodes"} and len(again) == 7
    bad.path.write_bytes(whole); (mini/"unreadable.csv").unlink()
    mended = features.features_command(**ask, retry=True)
    assert len(mended) == 8 and not mended.unreadable and all(np.array_equal(mended[r.id], made[r.id]) for r in others)


def test_a_video_that_comes_later_goes_into_the_same_store(tmp_path):
    mini = miniactions.generate(tmp_path/"mini", classes=("PushUpsSlow", "PushUpsFast"), train_groups=3, test_groups=1, clips=1, workers=1)
    late, *others = datasets.load("ucf101", mini).records
    ask = dict(name="ucf101", backbone="hand_cnn", protocol="1x1", root=mini, output=tmp_path/"features", device="cpu", workers=0)
    whole = late.path.read_bytes(); late.path.unlink()
    first = features.features_command(**ask)
    assert first.absent == [late.id] and not first.missing and "8 videos expected, 7 found, 7 stored, 0 unreadable, 0 not done" in repr(first)
    assert len(FeatureStore(first.folder)) == 7                                       # nothing is lacking of what was there
    late.path.write_bytes(whole); others[0].path.unlink()                             # one comes, one goes
    second = features.features_command(**ask)
    assert len(second) == 8 and not second.absent and all(np.array_equal(second[r.id], first[r.id]) for r in others)


def test_files_of_another_size_are_not_mixed_into_a_store(records, tmp_path):
    place = store(records, tmp_path, shard=(0, 2))
    before = FeatureStore(place, max_missing=1.)["v02"].copy()
    other = tmp_path/"other.mp4"
    video.write_video(other, np.random.default_rng(1).integers(0, 255, (9, 32, 48, 3)).astype(np.uint8))
    replaced = [replace(r, path=other) if r.id == "v02" else r for r in records]
    for shard in ((0, 2), (1, 2), (0, 1)):
        with pytest.raises(RuntimeError, match="1 stored videos are other files now; the first: .*other.mp4.*another output folder.*retry"): store(replaced, tmp_path, shard=shard)
    store(replaced, tmp_path, shard=(0, 2), retry=True)
    made = FeatureStore(store(replaced, tmp_path, shard=(1, 2)))
    assert same(made, FeatureStore(store(replaced, tmp_path/"fresh"))) and not np.array_equal(made["v02"], before)
    with pytest.raises(RuntimeError, match="v02.mp4 and 0 more were stored in another number of shards"): store(records, tmp_path, retry=True)


def test_the_limit_of_unreadable_videos_is_of_the_whole_store_and_names_a_bad_one(records, tmp_path):
    bad = [replace(r, path=tmp_path/"gone.mp4") if r.id == "v03" else r for r in records]
    for shard in range(3): place = store(bad, tmp_path, shard=(shard, 3), max_failures=.09)      # one of four in its shard, one of twelve in all
    assert set(FeatureStore(place, max_missing=.1).unreadable) == {"v03"}
    for _ in range(2):
        with pytest.raises(RuntimeError, match="1 of 12 videos could not be read.*gone.mp4"): store(bad, tmp_path)
    with pytest.raises(ValueError, match="shard = 0/13: there are 12 videos"): store(records, tmp_path/"b", shard=(0, 13))


@pytest.mark.parametrize("words,what", [(dict(name="ucf11"), "did you mean 'ucf101'"), (dict(backbone="r3d"), "unknown"), (dict(subset="trian"), "did you mean 'train'"), (dict(weights="imagenet"), "weights"), (dict(protocol="3x3"), "protocol"), (dict(shard=(4, 4)), "0 <= i < n")])
def test_the_command_refuses_with_words(records, tmp_path, words, what):
    (tmp_path/"UCF-101/red").mkdir(parents=True); (tmp_path/"ucfTrainTestlist").mkdir()
    shutil.copy(records[0].path, tmp_path/"UCF-101/red/v_red_g01_c01.mp4")
    for name, text in [("classInd", "1 red\n"), ("trainlist01", "red/v_red_g01_c01.avi 1\n"), ("testlist01", "red/v_red_g02_c01.avi\n")]: (tmp_path/f"ucfTrainTestlist/{name}.txt").write_text(text)
    asked = dict(name="ucf101", backbone="hand_cnn", root=tmp_path, output=tmp_path/"f", device="cpu", workers=0) | words
    with pytest.raises(ValueError, match=what): features.features_command(**asked)
    assert not (tmp_path/"f").exists()


def test_an_untrained_stream_is_a_linear_probe_and_its_stages_can_be_moved():
    torch.manual_seed(0)
    stream = FeatureStream(3, {"embedding": 5, "x": 4, "y": 6}, hidden=7)
    x = torch.randn(16, 15)
    out = stream(x)
    expected = torch.nn.functional.batch_norm(x, None, None, training=True)[:, :5]
    assert torch.allclose(out.embedding, expected, atol=1e-6) and torch.allclose(out.logits, stream.head(expected), atol=1e-5)
    assert {n: tuple(m.shape) for n, m in out.stages.items()} == {"x": (16, 7, 1, 1, 1), "y": (16, 7, 1, 1, 1)} and list(out.stages) == ["x", "y"]
    sum(m.sum() for m in out.stages.values()).backward()
    assert all(p.grad.abs().sum() > 0 for p in stream.adapters.parameters())
    bare = FeatureStream(3, {"embedding": 5})
    assert not bare(torch.randn(4, 5)).stages
    for wrong in (torch.randn(4, 14), torch.randn(4, 3, 2, 8, 8)):
        with pytest.raises(ValueError, match="packed features"): stream(wrong)
    with pytest.raises(ValueError, match="embedding"): FeatureStream(3, {"x": 4, "embedding": 5})


def test_the_registry_builds_it_from_its_json():
    stream = build_stream("features", 3, widths={"embedding": 5, "x": 4}, hidden=6)
    again = build_stream("features", **json.loads(json.dumps(stream.config)))
    again.load_state_dict(stream.state_dict())
    x = torch.randn(4, 9)
    assert torch.equal(stream.eval()(x).logits, again.eval()(x).logits) and stream.backbone == "features"


def test_a_model_on_features_comes_back_from_a_checkpoint(pair, tmp_path):
    model = MBD(stream_on(pair[0]), stream_on(pair[1]), pair[0].classes, pair[0].view, pair[1].view).eval()
    model.save(tmp_path/"m")
    again, x = MBD.load(tmp_path/"m"), [s.read(np.arange(5), np.zeros(5, int)) for s in pair]
    assert torch.equal(again(*x).fused, model(*x).fused) and again.local_view == pair[0].view


def test_a_stream_on_a_store_has_seen_what_its_weights_have_seen(pair, tmp_path):
    shutil.copytree(pair[0].folder, tmp_path/"s")
    rewrite(tmp_path/"s", seen=["kinetics400/train"])
    key = features._key(json.loads((tmp_path/"s/index.json").read_text()))
    for f in (tmp_path/"s").glob("*-0-of-1.*"): f.rename(f.with_name(key + f.name[16:]))
    made = FeatureStore(tmp_path/"s")
    model = MBD(stream_on(made), stream_on(pair[1]), made.classes)
    seen = [replace(r, origin="kinetics400/train") for r in made.records]
    with pytest.raises(ValueError, match="kinetics400/train"): training.measure_map(model, FeatureDataset(seen, made, pair[1]))
    training.measure_map(model, FeatureDataset(made.records, made, pair[1]))


def test_batches_hold_both_streams_features_of_the_same_video_and_view(pair):
    local, global_ = pair
    train, test = generated_split(local.records, 2)
    fit = FeatureDataset(train, local, global_, train=True, seed=3)
    seen = []
    for batch in clips.batches(fit, 50, shuffle=True):
        for k in range(len(batch["label"])):
            id, view = fit.records[batch["index"][k]].id, int(batch["view"][k])
            assert np.array_equal(batch["local"][k].numpy().astype(np.float16), local[id][view]) and np.array_equal(batch["global_"][k].numpy().astype(np.float16), global_[id][view])
            assert batch["label"][k] == fit.records[batch["index"][k]].label
            seen.append((id, view))
    assert len({i for i, _ in seen}) == len(seen) == len(fit)//50*50 and {v for _, v in seen} == {0, 1, 2}
    held = FeatureDataset(test, local, global_)
    order = [(int(i), int(v)) for b in clips.batches(held, 7) for i, v in zip(b["index"], b["view"])]
    assert order == [(i, v) for i in range(len(test)) for v in range(3)] and len(held) == 3*len(test) and held.views == 3


def test_order_and_views_follow_from_seed_and_epoch(pair):
    fit = FeatureDataset(pair[0].records, *pair, train=True)
    def draw(seed, epoch):
        fit.seed, fit.epoch = seed, epoch
        return [tuple(b["index"].tolist() + b["view"].tolist()) for b in fit.batches(100, True)]
    assert draw(0, 0) == draw(0, 0) and len({str(draw(s, e)) for s in (0, 1) for e in (0, 1)}) == 4


def test_stores_that_do_not_belong_together_are_refused(pair, tmp_path):
    other = FeatureStore(generated_features(tmp_path/"a", classes=9, videos=900, views=2, widths=WIDTHS)[1])
    with pytest.raises(ValueError, match="protocol"): FeatureDataset(pair[0].records, pair[0], other)
    other = FeatureStore(generated_features(tmp_path/"b", classes=8, videos=800, widths=WIDTHS)[1])
    with pytest.raises(ValueError, match="classes"): FeatureDataset(pair[0].records, pair[0], other)
    wrong = [replace(pair[0].records[0], label=5), *pair[0].records[1:]]
    with pytest.raises(ValueError, match="the record says class 5"): FeatureDataset(wrong, *pair)


# ---- schedule, map, study

def test_the_schedule_follows_from_its_seed_and_does_not_touch_the_callers(pair):
    train, test = generated_split(pair[0].records, 1)
    torch.manual_seed(5); expected = torch.rand(3); torch.manual_seed(5)
    a = run_schedule(*pair, train, test, seed=1, **SHORT)
    assert torch.equal(torch.rand(3), expected)
    b = run_schedule(*pair, train, test, seed=1, **SHORT)
    c = run_schedule(*pair, train, test, seed=2, **SHORT)
    assert a.result == b.result and torch.equal(a.answers.local, b.answers.local) and a.result != c.result
    assert {r["stage"] for r in a.rows} == {"warm-up", "distil", "control"} and a.result["control"]["kind"] == "equal steps"
    steps = {s: sum(r["stage"] == s for r in a.rows) for s in ("distil", "control")}
    assert steps["distil"] == steps["control"]
    assert not {r.id for r in a.data["test"].records} & {r.id for p in ("fit", "map", "gate") for r in a.data[p].records}
    sources = [{r.source for r in a.data[p].records} for p in ("fit", "map", "gate", "test")]
    assert len(set.union(*sources)) == sum(map(len, sources))
    assert any("taught_global" in r for r in a.rows if r["stage"] == "distil")


def test_a_map_on_features_recovers_the_planted_dominance(pair):
    train, test = generated_split(pair[0].records, 1)
    run = run_schedule(*pair, train, test, control=False, **QUICK)
    planted = [name.split("_")[0] for name in pair[0].classes]
    share = {kind: np.mean([float(s) for s, k in zip(run.first_map.share, planted) if k == kind]) for kind in ("local", "balanced", "global")}
    assert share["local"] > share["balanced"] + .05 and share["balanced"] > share["global"] + .05
    groups = list(zip(planted, run.first_map.group))
    assert sum(k == g for k, g in groups) >= 6 and not any({k, g} == {"local", "global"} for k, g in groups)


@pytest.mark.slow
def test_where_nothing_was_planted_the_map_stays_balanced(tmp_path):
    made = [FeatureStore(p) for p in generated_features(tmp_path, classes=9, videos=900, widths={s: WIDTHS["local"] for s in ("local", "global")}, signal=3., strong=.75, weak=.75)]
    train, test = generated_split(made[0].records, 1)
    run = run_schedule(*made, train, test, control=False, **QUICK)
    assert run.first_map.group.count("balanced") >= 6


def test_generated_features_say_so_and_are_the_same_however_interrupted(tmp_path, pair):
    assert all(s.dataset == "generated" and s.backbone.startswith("generated_") and "generated" in s.digest and {r.origin for r in s.records} == {"generated"} for s in pair)
    assert "(generated, seed 0, signal 3.0: " in repr(pair[0])        # what made them, not the first letters of it
    class Stop(Exception): pass
    def stop(done, total):
        if done > 1000: raise Stop
    with pytest.raises(Stop): generated_features(tmp_path, classes=9, videos=900, widths=WIDTHS, signal=3., progress=stop)
    for whole, place in zip(pair, generated_features(tmp_path, classes=9, videos=900, widths=WIDTHS, signal=3.)): assert same(FeatureStore(place), whole)
    splits = [generated_split(pair[0].records, s) for s in (1, 2, 3)]
    tests = [{r.id for r in test} for _, test in splits]
    assert not tests[0] & tests[1] and not tests[1] & tests[2] and all(len(train) + len(test) == 900 for train, test in splits)


def fake(split, seed):
    rng = np.random.default_rng([split, seed])
    d = .01*split + .02*rng.standard_normal()
    return {"adaptive": .8 + d, "gain": d, "gain_low": d - .0392, "gain_high": d + .0392}


def test_a_study_goes_on_where_it_was_cut_off(tmp_path):
    whole = features.study(fake, tmp_path/"whole.csv", seeds=range(4), about="a")
    calls = []
    def counted(split, seed):
        if len(calls) == 5: raise KeyboardInterrupt
        calls.append((split, seed)); return fake(split, seed)
    with pytest.raises(KeyboardInterrupt): features.study(counted, tmp_path/"cut.csv", seeds=range(4), about="a")
    with open(tmp_path/"cut.csv", "a") as f: f.write("2,3,a,0.7")              # a line that was cut off in the middle
    assert features.study(fake, tmp_path/"cut.csv", seeds=range(4), about="a") == whole
    assert (tmp_path/"cut.csv").read_text() == (tmp_path/"whole.csv").read_text() and calls[:3] == [(1, 0), (2, 0), (3, 0)]
    with pytest.raises(ValueError, match="name another file"): features.study(fake, tmp_path/"cut.csv", about="b")
    with pytest.raises(ValueError, match="columns"): features.study(lambda s, k: {"other": 1.}, tmp_path/"cut.csv", seeds=range(5), about="a")
    (tmp_path/"no.csv").write_text("split,seed,about\nx,y,z\n")
    with pytest.raises(ValueError, match="no table of a study"): features.study(fake, tmp_path/"no.csv")


def test_shards_of_a_study_share_the_runs(tmp_path):
    for i in (1, 0): rows = features.study(fake, tmp_path/"s.csv", seeds=range(3), about="a", shard=(i, 2))
    assert rows == features.study(fake, tmp_path/"w.csv", seeds=range(3), about="a") and len(rows) == 9
    assert len({f.name for f in tmp_path.glob("s*.csv")}) == 2


def test_intervals_of_a_study_say_what_they_are_about(tmp_path):
    few, many = (features.study(fake, tmp_path/f"{n}.csv", seeds=range(n), about="a") for n in (4, 200))
    a, b = features.summarise(few, "gain"), features.summarise(many, "gain")
    assert abs(b.mean - .02) < .003 and set(b.splits) == {1, 2, 3} and b.runs == 600
    width = lambda i: i[1] - i[0]
    assert width(b.seeds) < width(a.seeds)/4                                     # seeds average out,
    assert width(b.videos) == pytest.approx(2*1.96*.02/math.sqrt(3), rel=.02)    # test videos do not
    assert width(features.summarise(many, "gain", disjoint=False).videos) == pytest.approx(2*1.96*.02, rel=.02)      # test lists that share videos are no more than one
    assert width(a.videos) >= width(a.seeds)
    assert features.summarise(many, "adaptive").videos is None
    assert features.summarise(features.study(fake, tmp_path/"1.csv", seeds=range(1), about="a"), "gain").seeds is None
    assert "600 runs" in features.study_table(many)


def test_other_seeds_and_videos_are_covered_as_often_as_it_says_with_few_runs():
    rng, hits, wider = np.random.default_rng(1), 0, 0
    for _ in range(400):
        video = .01*rng.standard_normal(3)
        values = [(s, video[s] + .02*rng.standard_normal()) for s in range(3) for _ in range(2)]
        rows = [dict(split=s, seed=k, x=v, x_low=v - 1.96*.01, x_high=v + 1.96*.01) for k, (s, v) in enumerate(values)]
        found = features.summarise(rows, "x")
        hits += found.videos[0] < 0 < found.videos[1]; wider += found.videos[1] - found.videos[0] >= found.seeds[1] - found.seeds[0]
    assert .92 <= hits/400 and wider == 400


def test_a_study_keeps_numbers_and_one_line(tmp_path):
    with pytest.raises(ValueError, match="one line"): features.study(fake, tmp_path/"a.csv", about="two\nlines")
    with pytest.raises(ValueError, match="None as other"): features.study(lambda s, k: {"other": None}, tmp_path/"b.csv", seeds=range(1), about="a")
    assert not (tmp_path/"a.csv").exists() and not (tmp_path/"b.csv").exists()


def test_views_that_were_drawn_apart_do_not_belong_together(records, tmp_path):
    one = FeatureStore(store(records, tmp_path/"a", augmented=2, flip=True))
    other = FeatureStore(store(records, tmp_path/"b", augmented=2, flip=False))
    FeatureDataset(records, one, one)
    with pytest.raises(ValueError, match="augmented views were drawn in another way"): FeatureDataset(records, one, other)


def test_a_refused_call_leaves_the_stream_in_its_mode(records, tmp_path):
    stream = backbone().train(); norm = next(m for m in stream.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)).eval()
    store(records, tmp_path, stream=stream)
    with pytest.raises(ValueError): extract(records, stream, tmp_path, dataset="tints", classes=CLASSES[::-1], view=VIEW)
    assert stream.training and not norm.training


def test_seeds_interval_covers_as_often_as_it_says(tmp_path):
    rng, hits = np.random.default_rng(0), 0
    for _ in range(400):
        rows = [dict(split=s, seed=k, x=s + rng.standard_normal()) for s in (1, 2, 3) for k in range(5)]
        low, high = features.summarise(rows, "x").seeds
        hits += low < 2 < high
    assert .92 <= hits/400 <= .98


@pytest.mark.slow
def test_the_size_of_ucf101_runs(tmp_path):
    begun = time.process_time()
    rows = features.bench(tmp_path, splits=(1,), seeds=range(1))
    assert rows[0]["adaptive"] > rows[0]["local"] and rows[0]["oracle"] >= rows[0]["adaptive"]
    assert time.process_time() - begun < 400
    index = json.loads((tmp_path/"generated/generated_local-unnamed-3x1/index.json").read_text())
    assert len(index["ids"]) == 13320 and len(index["classes"]) == 101


@pytest.mark.slow
def test_a_part_of_stored_real_lists_is_what_was_asked_for(tmp_path):
    "Stores of the command, lists on disk, and the notebook under papermill."
    root = miniactions.generate(tmp_path/"set", classes=miniactions.CLASSES[:4], train_groups=12, test_groups=4, clips=2)
    known = ENVIRONMENT | dict(MBD_PROGRESS="lines", MBD_DATA_UCF101=str(root))
    for name in ("hand_cnn", "hand_transformer"):
        subprocess.run([sys.executable, "-m", "mbd.cli", "features", "ucf101", "--backbone", name, "--output", str(tmp_path/"stores"), "--workers", "0"], check=True, cwd=ROOT, env=known)
    words = dict(preset="full", features=tmp_path/"stores", local_store="hand_cnn-unnamed-1x3", global_store="hand_transformer-unnamed-1x3", train_videos=48, test_videos=16, batch_size=16, resamples=200, reports=tmp_path/"reports")
    subprocess.run([sys.executable, "-m", "papermill", "nbs/run_features.ipynb", str(tmp_path/"out.ipynb"), "--cwd", "nbs", *(x for n, v in words.items() for x in ("-p", n, str(v)))], check=True, cwd=ROOT, env=known)
    record = json.loads(next((tmp_path/"reports").rglob("result.json")).read_text())["data"]
    assert sum(record[n]["expected"] for n in ("fit", "map", "gate")) == 48 and record["test"] == {"expected": 16, "found": 16, "unreadable": 0}


def test_what_stores_lack_counts_over_all_parts_of_a_schedule(pair, tmp_path):
    train, test = generated_split(pair[0].records)
    local = FeatureStore(pair[0].folder)
    gone = datasets.cut_parts(train, {"map": .2, "gate": .15}, 0)["gate"][:2]
    for r in gone: local._part[local.number[r.id]] = -1
    limit = 1.5*len(gone)/(len(train) + len(test))                         # of the gate alone it would be none
    result = run_schedule(local, pair[1], train, test, **SHORT, control=False, fusions=[], max_failures=limit)
    assert set(result.data["gate"].unreadable) == {r.id for r in gone} and not result.data["fit"].unreadable
    with pytest.raises(ValueError, match=f"2 of {len(train) + len(test)} videos have no stored features, and max_failures = "): run_schedule(local, pair[1], train, test, **SHORT, max_failures=limit/2)


def test_run_features_goes_on_with_the_stores_it_was_killed_in(tmp_path, monkeypatch):
    notebook = ROOT/"nbs"/"run_features.ipynb"
    if not notebook.is_file(): pytest.skip("an installed package has no notebooks")
    pytest.importorskip("IPython")
    monkeypatch.setenv("MBD_DATA_MINIACTIONS", str(tmp_path/"videos")); monkeypatch.setenv("MBD_PROGRESS", "none")
    source = ["".join(c["source"]) for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]
    stores = next(k for k, text in enumerate(source) if "features.extract" in text)
    given = dict(preset="smoke", train_videos=30, test_videos=10, pretrain_epochs=1, workers=0, reports=str(tmp_path/"reports"))
    written, steps, write, step = [], [], features._Part.write, training._one_step
    def begin(most):
        "All up to the stores, which are killed after so many videos."
        def counted(*values):
            if len(written) == most: raise MemoryError("killed")
            written.append(1); return write(*values)
        written.clear(); steps.clear(); space = {}
        monkeypatch.setattr(features._Part, "write", counted); monkeypatch.setattr(training, "_one_step", lambda *given: steps.append(1) or step(*given))
        exec(source[0], space); space |= given
        for text in source[1:stores + 1]: exec(text, space)
        return space
    with pytest.raises(MemoryError): begin(60)                          # all of the local stream's forty, half of the global one's
    assert steps
    space = begin(99)
    assert len(written) == 20 and not steps and [len(s) for s in space["store"].values()] == [40, 40]
    assert len(list((tmp_path/"reports").glob("*/*/result.json"))) == 1
    space["run"].fail("stopped")
