"""A video of one's own: the same answer as the tests of a run, however long the video, with reasons that hold, and errors that say what to do."""
import csv, json, os, subprocess, sys
from dataclasses import replace
from pathlib import Path
import numpy as np, pytest, torch
from mbd import clips, datasets, prediction, training, video
from mbd.clips import View
from mbd.dominance import DominanceMap
from mbd.fusion import AdaptiveFusion, FeatureFusion
from mbd.global_stream import GlobalStream
from mbd.local_stream import BACKBONES, LocalStream, StreamOutput, build_stream, gradient_field
from mbd.model import MBD
from mbd.prediction import Share, attention_rollout, expected_share, explain, find_model, gradient_activation, predict, window_length
from mbd.video import VideoError, sliding_windows, write_video

pytest.importorskip("av")
ROOT, VIEWS, CLASSES = Path(__file__).resolve().parents[1], (View(6, 2, 16), View(4, 3, 12, mean=.5)), ["a", "b", "c"]


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    for name in [n for n in os.environ if n.startswith("MBD_") and n != "MBD_REALDATA"]: monkeypatch.delenv(name)
    monkeypatch.setenv("MBD_CACHE", str(tmp_path / "cache"))


def film(n, height=32, width=40, seed=0):
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(seed).integers(0, 40, (n, height, width, 3))
    return np.stack([np.stack([100 + 60 * np.sin((x + 3 * i) / 7), 100 + 60 * np.sin((y - 2 * i) / 5), 0 * x + 4 * i % 200], -1) + noise[i] for i in range(n)]).clip(0, 255).astype(np.uint8)


def dominance(share, half=.1):
    share = torch.tensor(share, dtype=torch.float64)
    return DominanceMap(CLASSES, [5] * 3, [2] * 3, share, share - half, share + half, ["global", "balanced", "local"], .5)


def make(mapped=True, views=VIEWS, seed=0):
    torch.manual_seed(seed)
    model = MBD(LocalStream(3, (4, 6), (3, 1)), GlobalStream(3, frames=views[1].frames, width=12, depth=2, heads=3, grid=2), CLASSES, *views)
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm3d): m.running_mean.normal_(0, .1)
    for stream in (model.local, model.global_): torch.nn.init.normal_(stream.head.weight, std=3.)      # so that answers differ
    model.temperature.copy_(torch.tensor([1.7, .6]))
    if mapped:
        model.map = dominance([.2, .5, .8])
        model.fusion = AdaptiveFusion(model.map.logit_share); model.fusion.slope.fill_(2.)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("videos")
    write_video(path / "one.mp4", film(12)); write_video(path / "film.mp4", film(100)); write_video(path / "short.mp4", film(3)); write_video(path / "nearly.mp4", film(9))
    (path / "text.mp4").write_text("no video"); (path / "empty.mp4").write_bytes(b"")
    (path / "cut.mp4").write_bytes((path / "film.mp4").read_bytes()[:3000])
    return path


# ---- windows

def test_what_is_no_model_and_what_is_no_stream_is_named(folder):
    with pytest.raises(TypeError, match=r"model must be an MBD, not a \w+Path; MBD.load"): predict(folder / "film.mp4", folder)
    model = make(); model.local = torch.nn.Sequential(torch.nn.AdaptiveAvgPool3d(1), torch.nn.Flatten())
    with pytest.raises(TypeError, match="Sequential returned a Tensor without logits"): predict(folder / "film.mp4", model)


def test_frames_spread_over_a_short_video_are_not_held(folder):
    found = predict(folder / "film.mp4", make(views=(VIEWS[0], View(4, size=16, sampling="segments"))))
    assert not any("held" in note for note in found.notes) and "1 window of 4.00 s" in str(found)


def test_too_few_frames_a_second_are_named(tmp_path):
    model = make(views=(View(6, size=16, seconds=1/15), VIEWS[1]))
    slow = write_video(tmp_path/"slow.mp4", film(60), fps=2)
    with pytest.raises(ValueError, match=r"slow.mp4: at 2 frames per second.*the local stream reads 6, one every 0.0667 s, and only [12] of them.*more frames per second.*\(rate\)"): predict(slow, model)
    assert predict(slow, model, rate=25).frames == 60


@pytest.mark.parametrize("length, step, begins", [(30, None, [0, 30, 60, 70]), (32, None, [0, 32, 64]), (25, None, [0, 25, 50, 75]), (30, 20, [0, 20, 40, 60, 70]), (30, 50, [0, 50, 70]), (100, None, [0]), (80, None, [0]), (79, None, [0, 21]), (70, None, [0, 30])])
def test_windows_cover_the_video_but_for_a_small_rest(folder, length, step, begins):
    frames, seen = video.read_video(folder / "film.mp4"), []
    for w in sliding_windows(folder / "film.mp4", length, step):
        seen.append(w.begin)
        assert (w.count, w.size) == (length, (32, 40)) and np.array_equal(w.read([0, length - 1, 1]), frames[[w.begin, w.begin + length - 1, w.begin + 1]])
    assert seen == begins and 100 - (begins[-1] + length) <= length / 4


def test_a_window_that_has_passed_gives_no_other_frames(folder):
    windows = sliding_windows(folder / "film.mp4", 31)
    first, second = next(windows), next(windows)
    with pytest.raises(RuntimeError, match="the window that begins at frame 0 has passed"): first.read([0])
    assert np.array_equal(second.read([0])[0], video.read_video(folder / "film.mp4")[31])


def test_windows_of_a_short_video_and_from_a_later_frame(folder):
    [w] = sliding_windows(folder / "one.mp4", 50)
    assert (w.begin, w.count) == (0, 12) and np.array_equal(w.read(range(12)), video.read_video(folder / "one.mp4"))
    assert [w.begin for w in sliding_windows(folder / "film.mp4", 30, first=35)] == [35, 65] and next(sliding_windows(folder / "film.mp4", 30, first=90)).begin == 70
    with pytest.raises(VideoError, match="ends before frame 100"): next(sliding_windows(folder / "film.mp4", 30, first=100))
    for wrong in (dict(length=0), dict(length=5, step=0), dict(length=5, first=-1)):
        with pytest.raises(ValueError): next(sliding_windows(folder / "film.mp4", **wrong))


def test_a_file_without_keyframe_index_is_read_in_one_decoding(folder, tmp_path, monkeypatch):
    import av
    path = tmp_path / "b.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25, options={"bf": "2"}); stream.height, stream.width, stream.pix_fmt = 32, 40, "yuv420p"
        for frame in film(60): container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    truth, decoded, real = video.read_video(path), [], video._decode
    def counting(path):
        for frame in real(path): decoded.append(1); yield frame
    monkeypatch.setattr(video, "_decode", counting)
    for w in sliding_windows(path, 20): assert np.array_equal(w.read([0, 19]), truth[[w.begin, w.begin + 19]])
    assert len(decoded) == len(truth)


def test_how_long_a_window_is():
    model = make()
    assert window_length(model, 25) == 11      # 6 frames, 2 apart
    model.global_view = View(16, size=12, seconds=.1)
    assert window_length(model, 25) == 39 and window_length(model, 50) == 76
    model.global_view = View(4, size=12, sampling="segments")
    assert window_length(model, 25) == 150
    model.global_view = View(4, size=12, sampling="shared")
    assert window_length(model, 25) == 11


# ---- the answer

def test_one_window_answers_as_a_run_records_it(folder):
    model, path = make(), folder / "one.mp4"
    data = clips.ClipDataset([datasets.Record("one", path, 0, "s")], None, *VIEWS)
    answers = training.predict(model, data)
    local, global_ = (z.exp() for z in training.calibrate(answers, model.temperature))
    found = predict(path, model)
    for name, p in (("local", local), ("global", global_), ("fused", model.fusion(local, global_))): np.testing.assert_allclose(found.whole[name], p[0], atol=1e-5)
    assert found.whole["weight"] == pytest.approx(float(model.fusion.weight(local, global_)), abs=1e-5) and len(found.begin) == 1 and (found.frames, found.rate) == (11, 25)


def test_the_whole_is_the_mean_over_windows_of_each_stream_then_fused(folder):
    model = make()
    found = predict(folder / "film.mp4", model, batch_size=3)
    assert found.begin.tolist() == list(range(0, 99, 11)) and found.windows["fused"].shape == (9, 3) and found.windows["local"].std(0).max() > 1e-3
    frames = video.read_video(folder / "film.mp4")
    for n in (0, 4, 8):      # each window is answered as if it were a video
        part = frames[found.begin[n]:found.begin[n] + 11]
        where = clips.draw(part.shape[:3], VIEWS)
        with torch.no_grad(): out = model(*(clips.cut(part, v, where)[None] for v in VIEWS))
        np.testing.assert_allclose(found.windows["fused"][n], out.fused[0], atol=1e-5); assert found.windows["weight"][n] == pytest.approx(float(out.weight), abs=1e-5)
    local, global_ = (torch.tensor(found.windows[n]).mean(0, keepdim=True) for n in ("local", "global"))
    np.testing.assert_allclose(found.whole["fused"], model.fusion(local, global_)[0], atol=1e-6)
    np.testing.assert_allclose(found.times, (found.begin + 5.5) / 25); assert found.duration == pytest.approx(99 / 25)
    again = predict(folder / "film.mp4", model, batch_size=1)
    np.testing.assert_allclose(again.windows["fused"], found.windows["fused"], atol=1e-5)


def test_windows_overlap_on_request_and_the_rate_can_be_told(folder):
    assert predict(folder / "film.mp4", make(), step=.2).begin[:4].tolist() == [0, 5, 10, 15]
    found = predict(folder / "film.mp4", make(), rate=50., step=.2)
    assert found.begin[:2].tolist() == [0, 10] and found.times[1] == pytest.approx(15.5 / 50)
    for wrong in (dict(step=0), dict(step=-1), dict(rate=float("inf")), dict(batch_size=0)):
        with pytest.raises(ValueError, match="must be above 0"): predict(folder / "film.mp4", make(), **wrong)


def test_a_fusion_of_embeddings_gets_them(folder):
    model = make()
    model.fusion = FeatureFusion(6, 12, 3, hidden=4)
    g = torch.Generator().manual_seed(0)
    model.fusion.fit(torch.randn(40, 6, generator=g), torch.randn(40, 12, generator=g), torch.arange(40) % 3)
    found = predict(folder / "film.mp4", model)
    first = next(sliding_windows(folder / "film.mp4", 11))
    with torch.no_grad(): out = model(*(c[None] for c in prediction._clips(first, VIEWS, None)[0]))
    np.testing.assert_allclose(found.windows["fused"][0], out.fused[0], atol=1e-5); assert found.whole["fused"].sum() == pytest.approx(1)


def test_progress_ends_at_the_end(folder):
    seen = []
    predict(folder / "film.mp4", make(), progress=lambda done, total: seen.append((done, total)))
    assert seen[0] == (11, 100) and seen[-1] == (99, 99) and [d for d, _ in seen] == sorted(d for d, _ in seen)


def test_where_the_file_does_not_say_how_long_it_is_progress_does_not_either(folder, monkeypatch):
    monkeypatch.setattr(prediction, "_declared", lambda *_: 0); seen = []
    predict(folder / "film.mp4", make(), progress=lambda done, total: seen.append(total))
    assert set(seen[:-1]) == {0} and seen[-1] == 99
    with pytest.raises(ValueError, match="batch_size must be a whole number, not 2.5"): predict(folder / "film.mp4", make(), batch_size=2.5)


def test_who_decided():
    def whole(local, global_, fused): return prediction.Prediction(Path("x"), CLASSES, 25., np.array([0]), 11, 11, {}, {n: np.eye(3)[i] for n, i in (("local", local), ("global", global_), ("fused", fused))}, None, None, None).decided
    assert [whole(0, 0, 0), whole(0, 1, 0), whole(0, 1, 1), whole(0, 1, 2)] == ["both", "local", "global", "neither"]


# ---- the share

def test_the_share_is_the_maps_where_the_class_is_sure_and_its_interval_holds_it():
    found = expected_share(dominance([.2, .5, .8]), torch.eye(3, dtype=torch.float64))
    np.testing.assert_allclose(found, [[.2, .1, .3], [.5, .4, .6], [.8, .7, .9]], atol=1e-9)
    mixed = expected_share(dominance([.2, .5, .8]), torch.tensor([[.5, 0., .5], [.25, .25, .5]]))
    assert mixed[0, 0] == pytest.approx(.5) and (mixed[:, 1] < mixed[:, 0]).all() and (mixed[:, 0] < mixed[:, 2]).all()
    odds = lambda s: np.log(s / (1 - s))
    assert mixed[1, 0] == pytest.approx(1 / (1 + np.exp(-(.25 * odds(.2) + .5 * odds(.8)))))


def test_the_share_of_a_video_and_of_its_windows(folder):
    model = make()
    found = predict(folder / "film.mp4", model)
    p = torch.tensor((found.whole["local"] + found.whole["global"]) / 2)[None]
    np.testing.assert_allclose(found.share, expected_share(model.map, p)[0]); assert isinstance(found.share, Share) and found.reference == .5
    assert found.shares.shape == (9, 3) and "share of the local stream: 0." in str(found) and "over its sources" in str(found)


def test_without_a_map_the_share_is_not_measured(folder):
    found = predict(folder / "film.mp4", make(mapped=False))
    assert found.share is None and found.shares is None and found.reference is None and (found.windows["weight"] == .5).all()
    assert "share of the local stream: not measured (the model has no map)" in str(found)


# ---- words

def test_the_words(folder):
    model = make()
    text = predict(folder / "film.mp4", model).describe(2)
    rows = [line.split() for line in text.splitlines()]
    assert text.startswith("film.mp4: 3.96 s, 99 frames, 9 windows of 0.44 s") and sum(row[:1] in (["a"], ["b"], ["c"]) for row in rows) == 2
    for words in ("local stream alone: ", "global stream alone: ", "decided by ", "weight of the local stream in the fusion: 0.", " times real time", "the model knows 3 classes"): assert words in text, words
    assert "generated figure" not in text and "not calibrated" not in text
    model.about, model.temperature = {"data": {"name": "miniactions"}}, torch.ones(2)
    assert "generated figure videos" in str(predict(folder / "film.mp4", model)) and "not calibrated" in str(predict(folder / "film.mp4", model))


def test_what_is_kept(folder, tmp_path):
    for model, share in ((make(), True), (make(mapped=False), False)):
        found = predict(folder / "film.mp4", model)
        files = prediction.save(found, tmp_path / "out", explain(folder / "film.mp4", model, found.begin[found.surest]))
        assert {p.name for p in files} == {"prediction.json", "timeline.csv", "share.png", "timeline.png", "answer.png", "evidence.png"} and all(p.read_bytes().startswith(b"\x89PNG") for p in files if p.suffix == ".png")
        about, rows = json.loads(files[0].read_text()), list(csv.DictReader(files[1].open()))
        assert about["top5"][0] == list(found.top(1)[0]) and (about["share"] is not None) == share and len(rows) == 9 and (rows[0]["share"] != "") == share
        assert float(rows[3][found.classes[0]]) == pytest.approx(found.windows["fused"][3][0], abs=1e-4)
    one = predict(folder / "one.mp4", make())
    assert {p.name for p in prediction.save(one, tmp_path / "one")} == {"prediction.json", "timeline.csv", "share.png"}
    prediction.save(one, tmp_path / "out")                       # nothing of the video before stays beside it
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"prediction.json", "timeline.csv", "share.png"}


def test_a_long_timeline_is_drawn_as_means():
    from mbd import plots
    p = np.random.default_rng(0).dirichlet(np.ones(3), 1000)
    for figure, points in ((plots.timeline(np.arange(1000.), CLASSES, p, p[:, 0]), 240), (plots.timeline(np.arange(100.), CLASSES, p[:100], p[:100, 0], np.stack([p[:100, 0]] * 3, 1)), 100)):
        lines = figure.axes[0].lines
        assert {line.get_label(): len(line.get_xdata()) for line in lines} == dict.fromkeys(CLASSES, points) and lines[0].get_ydata().mean() == pytest.approx(1 / 3, abs=.1)
    assert "minutes" in plots.timeline(np.arange(1000.), CLASSES, p, p[:, 0]).axes[1].get_xlabel()


# ---- what is wrong with a video

@pytest.mark.parametrize("name, error, said", [("gone.mp4", VideoError, "no such file"), ("text.mp4", VideoError, "no video that FFmpeg knows"), ("empty.mp4", VideoError, "the file is empty"), ("cut.mp4", VideoError, "cut.mp4"), ("", VideoError, "no regular file"),
    ("short.mp4", ValueError, "short.mp4: 3 frames are too few: the local stream reads 6, and only 2 of them would differ. Give a longer video")])
def test_errors_name_the_file_and_the_remedy(folder, name, error, said):
    for act in (lambda: predict(folder / name, make()), lambda: explain(folder / name, make())):
        with pytest.raises(error, match=said.replace(".", r"\.")): act()


def test_a_video_a_little_too_short_says_so(folder):
    found = predict(folder / "nearly.mp4", make())
    assert "the video is 2 frames shorter than what the model looks at: its last frame was held" in found.notes and found.frames == 9
    assert explain(folder / "nearly.mp4", make()).times[-1] <= 8 / 25


def test_a_file_that_ends_early_without_an_error_says_so(folder, tmp_path):
    whole = write_video(tmp_path/"whole.avi", film(100)); (tmp_path/"part.avi").write_bytes(whole.read_bytes()[:whole.stat().st_size*2//3])
    assert any("damaged" in note and "is cut off" in note for note in predict(tmp_path/"part.avi", make()).notes)
    assert not any("damaged" in note for note in predict(whole, make()).notes)


def test_damage_in_the_middle_ends_the_looking_and_not_the_answer(folder, monkeypatch):
    import av
    real = video._decode
    def breaking(path):
        for n, frame in enumerate(real(path)):
            if n == 40: raise av.error.InvalidDataError(1, "Invalid data found")
            yield frame
    monkeypatch.setattr(video, "_decode", breaking)
    found = predict(folder / "film.mp4", make())
    assert found.begin.tolist() == [0, 11, 22, 29] and "only what decodes was looked at: decoding breaks off after 40 frames" in found.notes[0]


# ---- memory

LONG = """
import resource, sys
sys.path[:0] = [{tests!r}, {root!r}]
import test_prediction as t
from mbd.prediction import predict
model = t.make()
for path in sys.argv[1:]:
    found = predict(path, model)
    print(len(found.begin), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_video(tmp_path):
    "100 and 1500 frames of 320 x 240: all of the second would be 330 MiB."
    import av
    frames, paths = film(50, 240, 320), [tmp_path / "a.mp4", tmp_path / "b.mp4"]
    for path, n in zip(paths, (100, 1500)):
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=25, options={"preset": "ultrafast", "crf": "30"}); stream.height, stream.width, stream.pix_fmt, stream.thread_count = 240, 320, "yuv420p", 1
            for i in range(n): container.mux(stream.encode(av.VideoFrame.from_ndarray(frames[i % 50], format="rgb24")))
            container.mux(stream.encode())
    ended = subprocess.run([sys.executable, "-c", LONG.format(tests=str(ROOT / "tests"), root=str(ROOT)), *map(str, paths)], capture_output=True, text=True, timeout=300)
    (few, before), (many, after) = (tuple(map(int, line.split())) for line in ended.stdout.splitlines())
    assert many > 10 * few and after - before < 30_000, ended.stderr      # KiB


# ---- where the streams looked

class Corner(torch.nn.Module):
    "Knows one thing: how bright the upper left quarter of its first frames is (class 0), and the lower right of its last ones (class 1)."
    def __init__(self, view=False):
        super().__init__()
        self.scale, self.view = torch.nn.Parameter(torch.ones(())), view

    def forward(self, x):
        early = torch.nn.functional.avg_pool3d(x.mean(1, keepdim=True), (1, 4, 4)) * self.scale + 1      # (B, 1, T, H / 4, W / 4)
        tokens = early.flatten(2).transpose(1, 2) * 1                                                   # (B, N, 1)
        maps = {"first": early, "last": tokens.transpose(1, 2).unflatten(2, early.shape[2:]), "unread": early.detach() * self.scale} if self.view else {"first": early, "last": early * 1}
        read = tokens.transpose(1, 2).unflatten(2, early.shape[2:]) if self.view else maps["last"]
        t, h, w = (n // 2 for n in early.shape[2:])
        logits = torch.stack([read[:, 0, :t, :h, :w].mean((1, 2, 3)), read[:, 0, t:, h:, w:].mean((1, 2, 3)), read.mean((1, 2, 3, 4)) * 0], 1)
        return StreamOutput(logits, logits, maps)


def lit():
    "Clips that are bright where `Corner` looks, and noise elsewhere."
    clip = .1 * torch.rand(2, 3, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    clip[:, :, :4, :8, :8] += 1; clip[:, :, 4:, 8:, 8:] += 1
    return clip


@pytest.mark.parametrize("stage", [None, "first", "last"])
@pytest.mark.parametrize("view", [False, True])
def test_evidence_lies_where_the_answer_comes_from(view, stage):
    if view and stage is None: stage = "first"
    for k, (t, h, w) in enumerate([(slice(0, 4), slice(0, 2), slice(0, 2)), (slice(4, 8), slice(2, 4), slice(2, 4))]):
        r, name = gradient_activation(Corner(view), lit(), k, stage)
        assert r.shape == (2, 8, 4, 4) and (r[:, t, h, w] > 0).all() and r.sum() == pytest.approx(float(r[:, t, h, w].sum())) and name == (stage or "first")
    both, _ = gradient_activation(Corner(view), lit(), torch.tensor([0, 1]), stage)
    assert both[0, :4].sum() > 0 == both[0, 4:].sum() and both[1, 4:].sum() > 0 == both[1, :4].sum()


def test_a_part_that_is_everywhere_is_no_evidence():
    "What every place has in common is left out: a brighter clip with the same differences gives the same map."
    r, brighter = (gradient_activation(Corner(), lit() + more, 0)[0] for more in (0, 5))
    assert torch.allclose(r, brighter, atol=1e-5) and r.sum() > 0
    assert gradient_activation(Corner(), torch.ones(1, 3, 8, 16, 16), 0)[0].abs().max() < 1e-6


def test_a_stage_that_tells_nothing_is_refused():
    with pytest.raises(ValueError, match="does not depend on stage 'unread'; choose another of first, last"): gradient_activation(Corner(True), lit(), 0, "unread")
    with pytest.raises(ValueError, match="no stage 'lats'; did you mean 'last'"): gradient_activation(Corner(), lit(), 0, "lats")
    with pytest.raises(ValueError, match="does not depend on stage"): gradient_activation(Corner(), lit(), 2, "last")


SMALL = {"timesformer_s16": dict(vit="test_vit", size=64, frames=2, depth=4)}
SHAPES = {"timesformer_s16": (2, 64), "r2plus1d_18": (8, 32), "swin3d_t": (8, 64), "mvit_v2_s": (16, 224), "hand_transformer": (8, 28)}


@pytest.mark.parametrize("name", ["hand_cnn", "hand_transformer", "long_cnn", "window_transformer", "timesformer_s16", pytest.param("r2plus1d_18", marks=pytest.mark.slow), pytest.param("swin3d_t", marks=pytest.mark.slow), pytest.param("mvit_v2_s", marks=pytest.mark.slow)])
def test_every_kind_of_stream_is_explained(name):
    if name == "timesformer_s16": pytest.importorskip("timm")
    if name in ("r2plus1d_18", "swin3d_t", "mvit_v2_s"): pytest.importorskip("torchvision")
    torch.manual_seed(0)
    stream, (frames, size) = build_stream(name, 3, **SMALL.get(name, {})), SHAPES.get(name, (8, 32))
    for p in stream.parameters(): p.data += .02 * torch.randn_like(p)      # timesformer's time attention begins at zero
    clip = torch.randn(1, 3, frames, size, size)
    stream.train()
    r, stage = gradient_activation(stream, clip, 1)
    with torch.no_grad(): shape = stream.eval()(clip).stages[stage].shape
    assert r.shape == (1, *shape[2:]) and (r >= 0).all() and r.sum() > 0 and torch.isfinite(r).all() and all(p.grad is None for p in stream.parameters())


@pytest.mark.parametrize("look", [lambda x: x.transpose(1, 2).unflatten(2, (2, 3, 2)), lambda x: x[:, 4:].transpose(1, 2).unflatten(2, (2, 2, 2)), lambda x: x.unflatten(1, (2, 6))[:, :, 2:].unflatten(2, (2, 2)).permute(0, 4, 1, 2, 3), lambda x: x * 1],
                         ids=["tokens", "without a class token", "frames of tokens", "no view"])
def test_the_gradient_of_a_view_is_that_of_what_lies_under_it(look):
    tokens = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(0), requires_grad=True) * 1
    features = look(tokens)
    read = tokens if features._is_view() else features
    assert torch.allclose(prediction._gradient((read ** 3).sum(), features), look(3 * tokens.detach() ** 2) if features._is_view() else 3 * features.detach() ** 2)


def test_a_stream_is_left_in_the_mode_it_was_in():
    stream = build_stream("hand_cnn", 3).train()
    before = {k: v.clone() for k, v in stream.state_dict().items()}
    gradient_activation(stream, torch.randn(1, 3, 8, 32, 32), 0)
    assert stream.training and all(torch.equal(v, before[k]) for k, v in stream.state_dict().items())
    with torch.no_grad(): gradient_activation(stream.eval(), torch.randn(1, 3, 8, 32, 32), 0)
    for p in stream.parameters(): p.requires_grad_(False)
    assert not stream.training and gradient_activation(stream, torch.randn(1, 3, 8, 32, 32), 0)[0].sum() > 0


def test_looking_leaves_every_part_in_its_mode():
    plain = build_stream("hand_transformer", 3).train()
    norms = [m for m in plain.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    norms[0].eval()                                              # frozen, in a stream that trains
    before, modes = {k: v.clone() for k, v in plain.state_dict().items()}, [m.training for m in plain.modules()]
    clip = torch.randn(1, 3, 8, 28, 28)
    attention_rollout(plain, clip); gradient_activation(plain, clip, 0)
    assert [m.training for m in plain.modules()] == modes and all(torch.equal(v, before[k]) for k, v in plain.state_dict().items())


def test_evidence_on_the_frames(folder):
    model, path = make(), folder / "film.mp4"
    seen = explain(path, model, 33, "b", shown=5)
    frames = video.read_video(path)[[33, 35, 38, 41, 43]]
    side = seen.frames.shape[1]
    assert seen.target == "b" and np.array_equal(seen.frames, frames[:, (32 - side) // 2:(32 + side) // 2, (40 - side) // 2:(40 + side) // 2]) and side == 28
    np.testing.assert_allclose(seen.times, np.array([33, 35, 38, 41, 43]) / 25)
    assert seen.local.shape == seen.global_.shape == (5, 28, 28) and 0 <= seen.local.min() <= seen.local.max() <= 1 and seen.stages == ("stage1", "block1")
    found = predict(path, model)
    assert explain(path, model, found.begin[2]).target == CLASSES[found.windows["fused"][2].argmax()]
    with pytest.raises(ValueError, match="no class 'd'"): explain(path, model, target="d")


@pytest.mark.parametrize("name, stage, cell", [("hand_cnn", "stage3", 3), ("hand_cnn", "stage1", 9), ("long_cnn", "stage3", 3), ("window_transformer", "block2", 3), pytest.param("r2plus1d_18", "layer2", 7, marks=pytest.mark.slow)])
def test_a_map_lies_where_its_cells_look(name, stage, cell):
    torch.manual_seed(0)
    stream, clip = build_stream(name, 3).eval(), torch.randn(1, 3, 8, 56, 56)
    first, step = prediction._middles(stream, clip, stage)
    seen = gradient_field(stream, clip[0], stage, (1, cell, cell)).sum((0, 1)).nonzero()
    assert first == 0 and first + cell*step == (seen.min() + seen.max())/2 != (cell + .5)*step - .5      # equal parts would be off
    spot = np.zeros((2, 56//step, 56//step)); spot[:, cell, 1] = 1
    for side in (56, 112):
        drawn = prediction._on_pixels(spot, first, step, 56, side)
        assert drawn.shape == (2, side, side) and drawn.max() > .7
        np.testing.assert_allclose(((drawn[0]*np.arange(side)).sum()/drawn[0].sum() + .5)*56/side - .5, step, atol=.01)
        np.testing.assert_allclose(((drawn[0].T*np.arange(side)).sum()/drawn[0].sum() + .5)*56/side - .5, cell*step, atol=.01)


def test_tokens_share_a_frame_in_equal_parts():
    assert prediction._middles(build_stream("hand_transformer", 3).eval(), torch.randn(1, 3, 8, 28, 28), "block2") == (pytest.approx(25/6), pytest.approx(28/3))
    whole = prediction._on_pixels(np.arange(4.).reshape(1, 1, 4), 1.5, 4, 16, 16)[0]
    assert (whole == whole[0]).all() and whole[0, [0, 1, -2, -1]].tolist() == [0, 0, 3, 3] and np.allclose(whole[0, ::-1], 3 - whole[0])


def test_attention_rollout_is_a_distribution_and_only_for_plain_transformers():
    torch.manual_seed(0)
    stream, clip = build_stream("hand_transformer", 3), torch.randn(2, 3, 8, 28, 28)
    r = attention_rollout(stream, clip)
    assert r.shape == (2, 8, 3, 3) and torch.allclose(r.sum((1, 2, 3)), torch.ones(2), atol=1e-5) and (r > 0).all() and not stream.blocks[0]._forward_pre_hooks
    for block in stream.blocks: torch.nn.init.zeros_(block.qkv.weight); torch.nn.init.zeros_(block.qkv.bias)      # everybody reads everybody alike
    assert torch.allclose(attention_rollout(stream, clip), torch.full((2, 8, 3, 3), 1 / 72), atol=1e-6)
    for name in ("hand_cnn", "window_transformer"):
        with pytest.raises(ValueError, match=f"{name} is none. Use gradient_activation"): attention_rollout(build_stream(name, 3), clip)


# ---- models

def test_kinetics_classes_are_those_of_all_of_torchvisions_weights():
    models = pytest.importorskip("torchvision").models.video
    names = prediction.kinetics_classes()
    assert len(set(names)) == 400
    for entry in (models.R3D_18_Weights, models.S3D_Weights, models.MViT_V2_S_Weights, models.Swin3D_T_Weights, models.Swin3D_B_Weights): assert list(entry.KINETICS400_V1.meta["categories"]) == names


@pytest.fixture
def small_pair(monkeypatch, tmp_path):
    "The default pair with two small networks in the place of torchvision's, under weights of 400 classes."
    from mbd import local_stream, pairs
    for name, build, kind in (("r2plus1d_18", "hand_cnn", "local"), ("swin3d_t", "hand_transformer", "global")):
        entry = BACKBONES[name]
        monkeypatch.setitem(BACKBONES, name, replace(entry, build=BACKBONES[build].build, head="head.", weights={"kinetics400": replace(entry.weights["kinetics400"], view=local_stream.stream_view(build))}))
        torch.manual_seed(7)
        torch.save(BACKBONES[build].build(400).state_dict(), tmp_path / f"{kind}.pth"); torch.save(BACKBONES[build].build(101).state_dict(), tmp_path / f"{kind}-101.pth")
    return {kind: tmp_path / f"{kind}.pth" for kind in ("local", "global")}


def test_a_pretrained_pair_from_files(small_pair, tmp_path, folder):
    model = prediction.pretrained_model(files=small_pair)
    assert model.classes[0] == "abseiling" and model.map is None and model.local.seen == {"kinetics400/train"} and not model.training
    assert torch.equal(model.local.head.weight, torch.load(small_pair["local"], weights_only=True)["head.weight"])
    found = predict(folder / "film.mp4", model)
    assert len(found.top()) == 5 and found.share is None and "not calibrated" in str(found)
    again = MBD.load(model.save(tmp_path / "kept"))      # and it can be kept as a model of one's own
    np.testing.assert_array_equal(predict(folder / "film.mp4", again).whole["fused"], found.whole["fused"])
    with pytest.raises(ValueError, match="weights of the global stream have no last layer for 400 classes"): prediction.pretrained_model(files={**small_pair, "global": tmp_path / "global-101.pth"})
    with pytest.raises(FileNotFoundError, match="nowhere.pth"): prediction.pretrained_model(files={"local": tmp_path / "nowhere.pth"})
    with pytest.raises(ValueError, match="pair 'hand': hand_cnn has no weights"): prediction.pretrained_model("hand")
    with pytest.raises(ValueError, match="did you mean 'pretrained'"): prediction.pretrained_model("pretraned")


def test_where_weights_cannot_be_fetched_the_remedy_is_named(small_pair, monkeypatch):
    def offline(*given, **more): raise OSError("no network")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(OSError, match="cannot be fetched.*no network.*download them by other means"): prediction.pretrained_model()


def test_finding_a_model(tmp_path):
    from mbd.experiment import write_json
    model = make()
    assert find_model(tmp_path / "x") == tmp_path / "x"      # what is wrong with it, MBD.load says
    with pytest.raises(FileNotFoundError, match=r"no complete run with a model in .*mbd run ucf101.*--pair pretrained"): find_model(reports=tmp_path)
    for name, status, ended in (("old", "complete", "2026-01-01T00:00:00"), ("new", "complete", "2026-02-01T00:00:00"), ("failed", "failed", "2026-03-01T00:00:00"), ("without", "complete", "2026-04-01T00:00:00")):
        run = tmp_path / "ucf101-generated" / name; run.mkdir(parents=True)
        (run / "result.json").write_text(json.dumps({"schema": 1, "status": status, "ended": ended}))
        if name != "without": model.save(run / "checkpoints/model")
    assert find_model(reports=tmp_path) == tmp_path / "ucf101-generated/new/checkpoints/model"
    for name, experiment, ended in (("stores", "features", "2026-05-01T00:00:00"), ("east", "ucf101", "2026-02-01T01:00:00+02:00")):      # its streams see no videos; earlier than new, though its clock shows more
        run = tmp_path / "others" / name; model.save(run / "checkpoints/model")
        (run / "result.json").write_text(json.dumps({"schema": 1, "status": "complete", "ended": ended, "experiment": experiment}))
    (tmp_path / "ucf101-generated/new/result.json").write_text(json.dumps({"schema": 1, "status": "complete", "ended": "2026-02-01T00:00:00+00:00"}))
    assert find_model(reports=tmp_path) == tmp_path / "ucf101-generated/new/checkpoints/model"
    assert find_model(tmp_path / "ucf101-generated/old") == tmp_path / "ucf101-generated/old/checkpoints/model" and MBD.load(find_model(tmp_path / "ucf101-generated/old")).classes == CLASSES


@pytest.mark.slow
def test_the_demo_model_is_good_at_what_it_was_made_for_and_is_made_once(tmp_path):
    "Trained on the generated set, asked about files of scenes it has not seen."
    from mbd import miniactions
    folder = prediction.demo_model(tmp_path)
    assert sum(p.stat().st_size for p in folder.iterdir()) < 5e6
    before = (folder / "config.json").stat().st_mtime_ns
    assert prediction.demo_model(tmp_path) == folder and (folder / "config.json").stat().st_mtime_ns == before
    model, spec = MBD.load(folder), miniactions.Spec(classes=prediction.DEMO_CLASSES, seed=99, difficulty=prediction.DEMO_DIFFICULTY)
    answers = []
    for n in range(40):
        name = prediction.DEMO_CLASSES[n % 4]
        found = predict(write_video(tmp_path / "v.mp4", miniactions.render(spec, name, group=1 + n // 4, clip=1)), model)
        answers.append(found.top(1)[0][0] == name)
    assert np.mean(answers) >= .85 and {"local", "global"} <= set(model.map.group)


# ---- real clips

REAL = ROOT / os.environ.get("MBD_REALDATA", "absent")


@pytest.mark.skipif(not (REAL / "clips").is_dir(), reason="MBD_REALDATA names no folder of real clips")
def test_real_clips_go_through_and_broken_files_fail_with_a_reason():
    model, through, refused = make(), 0, {}
    for path in sorted(p for p in [*(REAL / "clips").rglob("*"), *(REAL / "odd").iterdir()] if p.is_file()):
        try: found = predict(path, model); assert np.isfinite(found.windows["fused"]).all(); through += 1
        except (VideoError, ValueError) as error: refused[path.name] = str(error)
    assert through >= 28 and {"empty.mp4", "text.avi", "truncated_half.mp4"} <= set(refused) and all(str(REAL) in text for text in refused.values())
    assert not [name for name in refused if any(p.name == name for p in (REAL / "clips").rglob("*"))]
