from dataclasses import replace
from pathlib import Path
import numpy as np, pytest, torch
from mbd import clips
from mbd.clips import GLOBAL_VIEW, LOCAL_VIEW, ClipDataset, View, batches, cut, draw, load_frames
from mbd.datasets import Record
from mbd.video import write_video


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path): monkeypatch.setenv("MBD_CACHE", str(tmp_path / "cache"))


def record(name, label=0, path=None): return Record(name, Path(path or f"{name}.mp4"), label, f"{name[0]}_g01")


def ruler(frames=48, height=64, width=64):
    "Red tells the frame, green the column, blue the row."
    out = np.empty((frames, height, width, 3), np.uint8)
    out[..., 0], out[..., 1], out[..., 2] = np.arange(frames)[:, None, None], np.arange(width)[None, None], np.arange(height)[None, :, None]
    return out


def grey(clip, view, where=None):
    "Back to grey values (C, T, H, W) of the video, brightness undone."
    return ((clip * view.std + view.mean) - (where.offset if where else 0)) / (where.gain if where else 1) * 255


def moments(clip, view, where=None): return grey(clip, view, where)[0].mean((1, 2))


def noise(frames=40, seed=0, size=64): return np.random.default_rng(seed).integers(0, 256, (frames, size, size, 3)).astype(np.uint8)


@pytest.fixture
def few(): return [record(f"v{i}", i % 3) for i in range(6)], {f"v{i}": noise(seed=i, size=24) for i in range(6)}


VIEWS = View(8, 2, 16), View(4, 4, 8)


# ---- views and cuts

@pytest.mark.parametrize("change, words", [(dict(frames=0), "frames must be"), (dict(stride=0), "stride must be"), (dict(size=2.5), "size must be"), (dict(frames=True), "frames must be"), (dict(std=0), "std must be above 0")])
def test_impossible_views(change, words):
    with pytest.raises(ValueError, match=words): View(**change)


def test_default_views_look_often_and_sharply_or_rarely_and_coarsely():
    assert LOCAL_VIEW.stride < GLOBAL_VIEW.stride and LOCAL_VIEW.size > GLOBAL_VIEW.size
    span = lambda v: (v.frames - 1) * v.stride
    assert abs(span(LOCAL_VIEW) - span(GLOBAL_VIEW)) <= GLOBAL_VIEW.stride


def test_a_fixed_clip_is_the_middle_of_the_video_normalised():
    view, frames = View(16, 2, 56), ruler()
    where = draw(frames.shape[:3], [view])
    clip = cut(frames, view, where)
    assert clip.shape == (3, 16, 56, 56) and clip.dtype == torch.float32 and clip.is_contiguous()
    assert (where.box, where.flip, where.gain, where.offset) == ((4, 4, 56, 56), False, 1, 0)
    back = grey(clip, view)
    assert torch.allclose(back[0, :, 0, 0], torch.arange(8., 40, 2), atol=1e-3) and torch.allclose(back[1, 0, 0], torch.arange(4., 60), atol=1e-3) and torch.allclose(back[2, 0, :, 0], torch.arange(4., 60), atol=1e-3)


@pytest.mark.parametrize("seed", range(6))
def test_both_streams_see_the_same_moment_crop_mirror_and_brightness(seed):
    frames = ruler(60)
    where = draw(frames.shape[:3], [LOCAL_VIEW, GLOBAL_VIEW], rng := np.random.default_rng(seed), flip=True)
    local, global_ = cut(frames, LOCAL_VIEW, where, rng), cut(frames, GLOBAL_VIEW, where, rng)
    times = [moments(c, v, where) for c, v in ((local, LOCAL_VIEW), (global_, GLOBAL_VIEW))]
    for t, v in zip(times, (LOCAL_VIEW, GLOBAL_VIEW)):
        assert torch.allclose(t.diff(), torch.full_like(t[1:], v.stride), atol=1e-2) and where.t0 - .01 <= t[0] and t[-1] <= where.t1 + .01
    places = [grey(c, v, where)[1:, 0] for c, v in ((local, LOCAL_VIEW), (global_, GLOBAL_VIEW))]
    assert torch.allclose(torch.nn.functional.avg_pool2d(places[0], 2), places[1], atol=1e-2)
    top, left, side, _ = where.box
    assert abs(places[0][1, 0, 0] - top) < .01 and abs(places[0][0, 0, -1 if where.flip else 0] - left) < .01 and side == 56


def test_random_cuts_use_all_the_room_there_is():
    cuts = [draw((40, 64, 64), [LOCAL_VIEW], np.random.default_rng(i), flip=True) for i in range(300)]
    assert {c.t0 for c in cuts} == set(range(10)) and {c.box[0] for c in cuts} == {c.box[1] for c in cuts} == set(range(9))
    assert .35 < np.mean([c.flip for c in cuts]) < .65 and {c.flip for c in (draw((40, 64, 64), [LOCAL_VIEW], np.random.default_rng(i)) for i in range(50))} == {False}
    assert .8 <= min(c.gain for c in cuts) < .85 and 1.15 < max(c.gain for c in cuts) <= 1.2
    still = draw((40, 64, 64), [LOCAL_VIEW], np.random.default_rng(0), jitter=0)
    assert (still.gain, still.offset) == (1, 0)


@pytest.mark.parametrize("length", [1, 5, 16])
def test_short_videos_hold_their_last_frame(length):
    frames = ruler(length)
    for rng in (None, np.random.default_rng(0)):
        where = draw(frames.shape[:3], [LOCAL_VIEW, GLOBAL_VIEW], rng)
        for view in (LOCAL_VIEW, GLOBAL_VIEW):
            expected = torch.arange(0., view.frames * view.stride, view.stride).clamp(max=length - 1)
            assert torch.allclose(moments(cut(frames, view, where, rng), view, where), expected, atol=1e-2)


@pytest.mark.parametrize("height, width", [(40, 90), (90, 40), (20, 20)])
def test_any_shape_of_video_gives_square_clips(height, width):
    frames = ruler(40, height, width)
    where = draw(frames.shape[:3], [LOCAL_VIEW, GLOBAL_VIEW])
    side = round(.875 * min(height, width))
    assert where.box == ((height - side) // 2, (width - side) // 2, side, side)
    for view in (LOCAL_VIEW, GLOBAL_VIEW):
        clip = cut(frames, view, where)
        assert clip.shape[-2:] == (view.size, view.size) and abs(grey(clip, view)[1, 0].mean() - (width - 1) / 2) < .6


def test_the_clips_of_a_video_are_spread_from_its_start_to_its_end():
    frames, records = {"v": ruler(63)}, [record("v")]
    data = ClipDataset(records, frames, LOCAL_VIEW, GLOBAL_VIEW, clips=3)
    first = [round(float(moments(data[i]["local"], LOCAL_VIEW)[0])) for i in range(3)]
    assert len(data) == 3 and first == [0, 16, 32]
    assert [round(float(moments(data[i]["global_"], GLOBAL_VIEW)[0])) for i in range(3)] == [1, 17, 33]      # the middle of the same stretch
    assert ClipDataset(records, frames, LOCAL_VIEW, GLOBAL_VIEW)[0]["local"].equal(data[1]["local"])


# ---- data sets and loaders

def test_an_item(few):
    item = ClipDataset(*few, *VIEWS)[4]
    assert item["local"].shape == (3, 8, 16, 16) and item["global_"].shape == (3, 4, 8, 8) and (int(item["label"]), item["index"]) == (1, 4)


def test_a_training_clip_depends_on_seed_epoch_and_video_alone(few):
    records, frames = few
    data = ClipDataset(records, {r.id: frames["v0"] for r in records}, *VIEWS, train=True, flip=True)
    first = [data[i]["local"] for i in (3, 1)]
    assert all(a.equal(b) for a, b in zip(first, [ClipDataset(records, data.frames, *VIEWS, train=True, flip=True)[i]["local"] for i in (3, 1)]))
    assert not first[0].equal(first[1])      # same frames, other video
    data.epoch = 1
    later = data[3]["local"]
    data.epoch, data.seed = 0, 1
    assert not later.equal(first[0]) and not data[3]["local"].equal(first[0])
    fixed = ClipDataset(records, frames, *VIEWS)
    before = fixed[3]["local"]
    fixed.epoch = fixed.seed = 7
    assert fixed[3]["local"].equal(before)


def test_workers_change_nothing(few):
    made = []
    for workers in (0, 2):
        data = ClipDataset(*few, *VIEWS, train=True, flip=True, seed=3)
        data.epoch = 2
        made.append(list(batches(data, 2, shuffle=True, workers=workers)))
    for a, b in zip(*made, strict=True): assert all(torch.equal(a[k], b[k]) for k in a)


def test_orders(few):
    data = ClipDataset(*few, *VIEWS, train=True)
    order = lambda **k: [i for b in batches(data, 2, **k) for i in b["index"].tolist()]
    assert order() == list(range(6))
    orders = set()
    for data.epoch in range(6): orders.add(tuple(order(shuffle=True))); assert sorted(order(shuffle=True)) == list(range(6)) and order(shuffle=True) == order(shuffle=True)
    assert len(orders) > 3


def test_a_small_last_batch_is_dropped_in_training_only(few):
    data = ClipDataset(*few, *VIEWS, train=True)
    sizes = lambda n, shuffle: [len(b["label"]) for b in batches(data, n, shuffle=shuffle)]
    assert sizes(4, True) == [4] and sizes(4, False) == [4, 2] and sizes(6, True) == [6] and sizes(50, True) == [6]


def test_videos_without_frames_are_left_out(few):
    records, frames = few
    del frames["v2"]
    data = ClipDataset(records, frames, *VIEWS)
    assert [r.id for r in data.records] == ["v0", "v1", "v3", "v4", "v5"] and data.labels.tolist() == [0, 1, 0, 1, 2] and data.sources == ["v_g01"] * 5
    with pytest.raises(ValueError, match="none of the 6 records"): ClipDataset(records, {}, *VIEWS)


# ---- reading

@pytest.fixture
def files(tmp_path):
    pytest.importorskip("av")
    kept = {"a": noise(20, 1, 48) // 8 + 100, "b": ruler(7, 32, 48)}
    for name, frames in kept.items(): write_video(tmp_path / f"{name}.mp4", frames, crf=1)
    (tmp_path / "c.mp4").write_bytes(b"no video")
    (tmp_path / "d.mp4").write_bytes(b"")
    return [record(n, path=tmp_path / f"{n}.mp4") for n in "abcde"]


@pytest.mark.parametrize("workers", [1, 3])
def test_decoded_videos_and_the_reasons_of_the_others(files, workers):
    seen = []
    frames, unreadable = load_frames(files, workers=workers, progress=lambda *x: seen.append(x))
    assert {n: f.shape for n, f in frames.items()} == {"a": (20, 48, 48, 3), "b": (7, 32, 48, 3)} and all(f.dtype == np.uint8 for f in frames.values())
    assert set(unreadable) == {"c", "d", "e"} and "no video that FFmpeg knows" in unreadable["c"] and "empty" in unreadable["d"] and "such file" in unreadable["e"]
    assert seen == [(i, 5) for i in range(1, 6)]
    assert np.abs(frames["b"][:, 16, 20, 0].astype(int) - np.arange(7)).max() <= 6


def test_smaller_and_fewer_frames(files):
    frames, _ = load_frames(files[:2], size=24, max_frames=5)
    whole, _ = load_frames(files[:2])
    assert {n: f.shape for n, f in frames.items()} == {"a": (5, 24, 24, 3), "b": (5, 24, 36, 3)}
    mean = whole["a"][[0, 5, 10, 14, 19]].reshape(5, 24, 2, 24, 2, 3).mean((2, 4))      # spread evenly from the first to the last
    assert np.abs(frames["a"] - mean).max() <= 1
    assert load_frames(files[:2], size=100)[0]["a"].shape == (20, 48, 48, 3)      # never enlarged


def test_too_much_for_the_memory_is_refused_with_what_would_do(files):
    one = 20 * 48 * 48 * 3 / 2**30
    with pytest.raises(MemoryError, match="first 1 of 5 videos fill.*lower size or max_frames.*limit_gib") as caught: load_frames(files, limit_gib=one / 2)
    assert load_frames(files, limit_gib=1.5 * one)[0].keys() == {"a", "b"} and "0.0" in str(caught.value)
