import logging, multiprocessing, os, pickle, subprocess, sys, time
from dataclasses import replace
from pathlib import Path
import numpy as np, pytest, torch
from mbd import clips, video
from mbd.clips import GLOBAL_VIEW, LOCAL_VIEW, Augmentation, ClipDataset, Cut, FrameCache, View, batches, cut, draw, frame_rate, load_frames, protocol, sample
from mbd.datasets import Record
from mbd.video import VideoError, write_video


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

@pytest.mark.parametrize("change, words", [(dict(frames=0), "frames must be"), (dict(stride=0), "stride must be"), (dict(size=2.5), "size must be"), (dict(frames=True), "frames must be"), (dict(std=0), "std must be above 0"),
                                           (dict(sampling="segment"), "did you mean 'segments'"), (dict(resize="bilinea"), "did you mean 'bilinear'"), (dict(seconds=-.1), "seconds must be above 0"), (dict(seconds=float("nan")), "seconds must be above 0")])
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
    still = draw((40, 64, 64), [LOCAL_VIEW], np.random.default_rng(0), Augmentation(brightness=0))
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


# ---- other ways of sampling

def test_a_distance_in_seconds_follows_the_frame_rate():
    view = View(8, size=16, seconds=.1)
    for rate, expected in ((10, [0, 1, 2, 3, 4, 5, 6, 7]), (25, [0, 3, 5, 8, 10, 13, 15, 18]), (50, [0, 5, 10, 15, 20, 25, 30, 35]), (5, [0, 1, 1, 2, 2, 3, 3, 4])):
        index, t0, t1 = sample(100, view, Cut(0, 0, (0, 0, 8, 8), False), rate=rate)
        assert index.tolist() == expected and (t0, t1) == (0, .7 * rate)
        where = draw((100, 64, 64), [view], rate=rate)
        assert where.t1 - where.t0 == expected[-1] and abs(where.t0 + where.t1 - 99) <= 1
    assert sample(100, View(8, 5, seconds=.2), Cut(0, 0, (0, 0, 8, 8), False), rate=25)[0].tolist() == list(range(0, 40, 5))
    with pytest.raises(ValueError, match="seconds = 0.1 needs the video's frames per second: give rate"): draw((100, 64, 64), [view])


def test_segments_cover_the_video_and_shared_ones_the_other_stream_s_stretch():
    segments, shared, rng = View(8, size=16, sampling="segments"), View(4, size=16, sampling="shared"), np.random.default_rng
    for seed in range(20):
        where = draw((100, 64, 64), [LOCAL_VIEW, segments], rng(seed))
        assert where.t1 - where.t0 == 30
        index = sample(100, segments, where, rng(seed))[0]
        assert all(int(12.5 * k) <= i < 12.5 * (k + 1) for k, i in enumerate(index))
        index, t0, t1 = sample(100, shared, where, rng(seed))
        assert all(int(7.75 * k) <= i - where.t0 < 7.75 * (k + 1) for k, i in enumerate(index)) and (t0, t1) == (index[0], index[-1])
    assert sample(100, segments, draw((100, 64, 64), [LOCAL_VIEW, segments]))[0].tolist() == video.uniform_segments(100, 8).tolist()
    spread = [sample(100, segments, draw((100, 64, 64), [segments], part=(i, 3)))[0].tolist() for i in range(3)]
    assert sorted(sum(spread, [])) == sorted(set(sum(spread, []))) and all(a < b < c for a, b, c in zip(*spread))
    assert sample(3, segments, draw((3, 64, 64), [segments]))[0].tolist() == [0, 0, 0, 1, 1, 2, 2, 2]


def test_a_shared_view_needs_something_to_share(few):
    shared = View(4, size=16, sampling="shared")
    with pytest.raises(ValueError, match="one of the views must be 'dense' or 'segments'"): draw((40, 64, 64), [shared, shared])
    with pytest.raises(ValueError, match="both 'shared'"): ClipDataset(*few, shared, shared)


@pytest.mark.parametrize("pair", [(View(8, 2, 24), View(4, 4, 12)), (View(8, 2, 24), View(5, size=12, sampling="segments")), (View(8, seconds=.1, size=24), View(4, size=12, sampling="shared"))])
@pytest.mark.parametrize("train", [True, False])
def test_an_item_says_where_each_stream_looked(pair, train):
    frames = {f"v{i}": ruler(60, 48, 64) for i in range(12)}
    data = ClipDataset([record(n) for n in frames], frames, *pair, train=train, flip=True, clips=3, crops=3, rate=20, augment=Augmentation(scale=(.3, .9), brightness=0))
    batch = next(iter(batches(data, len(data))))
    seen = set()
    for name, key, view in (("local", "local", pair[0]), ("global", "global_", pair[1])):
        t0, t1, box, flip = (batch[f"{name}_{n}"] for n in ("t0", "t1", "box", "flip"))
        assert t0.shape == t1.shape == flip.shape == (len(data),) and box.shape == (len(data), 4) and flip.dtype == torch.bool
        for i, clip in enumerate(batch[key]):
            back, (top, left, height, width) = grey(clip, view), box[i].tolist()
            times = back[0].mean((1, 2))
            if view.sampling == "dense": assert torch.allclose(times, torch.linspace(t0[i], t1[i], view.frames).add(.5).floor().clamp(max=59), atol=.01)
            else: assert abs(times[0] - t0[i]) < .01 and abs(times[-1] - t1[i]) < .01
            columns, rows = back[1].mean((0, 1)), back[2].mean((0, 2))
            assert torch.allclose(columns.flip(0) if flip[i] else columns, left + (torch.arange(view.size) + .5) * width / view.size - .5, atol=1.5)
            assert torch.allclose(rows, top + (torch.arange(view.size) + .5) * height / view.size - .5, atol=1.5)
            seen.add((bool(flip[i]), top, left))
    assert torch.equal(batch["local_box"], batch["global_box"]) and torch.equal(batch["local_flip"], batch["global_flip"])
    assert {f for f, *_ in seen} == ({True, False} if train else {False}) and len(seen) >= (6 if train else 3)


# ---- augmentations

@pytest.mark.parametrize("change, words", [(dict(hue=.6), "hue must lie"), (dict(contrast=-1), "contrast must lie"), (dict(scale=0), "scale must lie"), (dict(scale=(.9, .5)), "scale must lie"), (dict(scale=(.5,)), "scale must lie"), (dict(ratio=(0, 1)), "ratio must be"), (dict(ratio=1.), "ratio must be two numbers.*not 1.0"), (dict(magnitude=31), "magnitude must lie"), (dict(magnitude=9.5), "magnitude must be a whole number, not 9.5"), (dict(randaugment=1.5), "randaugment must be a whole number")])
def test_impossible_augmentations(change, words):
    with pytest.raises(ValueError, match=words): Augmentation(**change)


def test_parts_and_crops_that_do_not_exist_and_boxes_outside_the_frames_are_refused():
    for wrong, words in [(dict(part=(5, 3)), r"part = \(5, 3\)"), (dict(part=(0, 0)), "part = "), (dict(crop=(3, 3)), "crop = .*n = 1 or 3"), (dict(crop=(0, 2)), "crop = "), (dict(crop=(-1, 3)), "crop = ")]:
        with pytest.raises(ValueError, match=words): draw((100, 64, 64), [LOCAL_VIEW], **wrong)
    for box in [(0, 0, 128, 128), (70, 70, 10, 10), (-1, 0, 8, 8), (0, 0, 0, 8), (0, 60, 8, 8)]:
        with pytest.raises(ValueError, match="does not lie in frames of 64 x 64 pixels"): cut(ruler(), LOCAL_VIEW, Cut(0, 30, box, False))
    assert cut(ruler(), LOCAL_VIEW, Cut(0, 30, (0, 0, 64, 64), False)).shape == (3, 16, 56, 56)


def test_random_crops_have_the_areas_and_shapes_asked_for():
    boxes = [draw((40, 90, 120), [LOCAL_VIEW], np.random.default_rng(i), Augmentation(scale=(.2, .6))).box for i in range(300)]
    areas, ratios = ([f(h, w) for _, _, h, w in boxes] for f in (lambda h, w: h * w / 90 / 120, lambda h, w: w / h))
    assert .19 < min(areas) < .23 and .57 < max(areas) < .62 and .72 < min(ratios) < .8 and 1.25 < max(ratios) < 1.36
    assert all(t >= 0 and l >= 0 and t + h <= 90 and l + w <= 120 for t, l, h, w in boxes) and len({b[:2] for b in boxes}) > 200
    top, left, height, width = draw((40, 20, 300), [LOCAL_VIEW], np.random.default_rng(0), Augmentation(scale=(1, 1))).box      # no such box fits: the largest in the middle
    assert (top, height) == (0, 20) and abs(left + width / 2 - 150) <= 1 and width == 27


@pytest.mark.parametrize("augment", [Augmentation(contrast=.5), Augmentation(saturation=.9), Augmentation(hue=.4), Augmentation(randaugment=2, magnitude=15)])
@pytest.mark.parametrize("resize", ["area", "bilinear"])
def test_colours_change_and_both_streams_change_alike(augment, resize):
    pytest.importorskip("torchvision")
    y, x = np.mgrid[:64, :64] * 4
    frames = np.stack([np.stack([x, y, (x + y) // 2], -1)] * 20).astype(np.uint8)
    views, changed, near = (View(4, 2, 56, resize=resize), View(2, 4, 28, resize=resize)), 0, []
    for seed in range(8):
        plain, where = (draw(frames.shape[:3], views, np.random.default_rng(seed), a) for a in (Augmentation(), augment))
        where = replace(where, gain=1., offset=0.)
        local, global_ = (grey(cut(frames, v, where), v) for v in views)
        near.append((torch.nn.functional.avg_pool2d(local[:, 0], 2) - global_[:, 0]).abs().median())
        assert local.min() > -.01 and local.max() < 255.01
        changed += (local - grey(cut(frames, views[0], replace(plain, gain=1., offset=0., box=where.box)), views[0])).abs().mean() > 2
    assert changed >= 5 and sum(n < 6 for n in near) >= 7      # equalising looks at each stream's own pixels, and one seed has it before posterising


def test_bytes_and_floats_are_resized_to_nearly_the_same():
    pytest.importorskip("torchvision")
    frames, where = noise(20), Cut(0, 19, (3, 5, 56, 48), True)
    a, b = (grey(cut(frames, View(4, 2, 14, resize=r), where), View()) for r in ("area", "bilinear"))
    assert (a - b).abs().mean() < 12 and abs(a.mean() - b.mean()) < 1 and not torch.equal(a, b)


def test_randaugment_leaves_the_global_random_state_alone_and_depends_on_the_draw_alone():
    pytest.importorskip("torchvision")
    frames, view = noise(20), View(4, 2, 56)
    torch.manual_seed(3)
    where, state = draw(frames.shape[:3], [view], np.random.default_rng(1), Augmentation(randaugment=2)), torch.random.get_rng_state()
    first = cut(frames, view, where)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(4)
    assert torch.equal(cut(frames, view, where), first)
    assert not torch.equal(cut(frames, view, replace(where, randaugment=(2, 9, 5))), first)


def test_classes_that_name_a_direction_are_never_mirrored(few):
    def mirrored(flip):
        data = ClipDataset(*few, *VIEWS, train=True, flip=flip)
        return {int(item["label"]) for data.epoch in range(8) for item in data if item["local_flip"]}
    assert mirrored(frozenset({1})) == {0, 2} and mirrored(frozenset()) == mirrored(True) == {0, 1, 2} and mirrored(False) == set()
    assert not any(item["local_flip"] for item in ClipDataset(*few, *VIEWS, flip=True))      # and nothing is in testing


# ---- protocols

@pytest.mark.parametrize("name", ["10x3", "5x3", "4x3", "2x3", "1x3", "1x1"])
def test_protocols_by_name(few, name):
    clips_, crops = protocol(name)
    data = ClipDataset(*few, *VIEWS, clips=clips_, crops=crops)
    assert name == f"{clips_}x{crops}" and data.views == clips_ * crops and len(data) == 6 * data.views and data.clips == clips_
    seen = [(int(i), int(v)) for b in batches(data, 7) for i, v in zip(b["index"], b["view"])]
    assert seen == [(i, v) for i in range(6) for v in range(data.views)]


def test_an_unknown_protocol_names_the_nearest():
    with pytest.raises(ValueError, match="protocol '3x10' is unknown.*valid: 10x3, 5x3"): protocol("3x10")
    with pytest.raises(ValueError, match="did you mean '10x3'"): protocol("10X3")
    with pytest.raises(ValueError, match="crops must be 1 or 3, not 5"): ClipDataset([record("v")], {"v": noise()}, crops=5)
    with pytest.raises(ValueError, match="clips must be"): ClipDataset([record("v")], {"v": noise()}, clips=0)


@pytest.mark.parametrize("height, width, boxes", [(40, 90, [(0, 0), (0, 25), (0, 50)]), (90, 40, [(0, 0), (25, 0), (50, 0)]), (40, 40, [(0, 0)] * 3)])
def test_three_crops_lie_along_the_longer_side(height, width, boxes):
    data = ClipDataset([record("v")], {"v": ruler(63, height, width)}, View(16, 2, 40), View(8, 4, 20), clips=2, crops=3)
    assert [tuple(item["local_box"].tolist()) for item in data] == [(*b, 40, 40) for b in boxes] * 2
    assert [item["local_t0"] for item in data] == [0, 0, 0, 32, 32, 32]
    for item, (top, left) in zip(data, boxes * 2): assert torch.allclose(grey(item["local"], View())[1:, 0, 0, 0], torch.tensor([float(left), float(top)]), atol=.01)
    assert len(ClipDataset([record("v")], {"v": noise()}, clips=2, crops=3, train=True)) == 1


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


AUGMENT = Augmentation(scale=(.5, 1), contrast=.3, randaugment=1)


def epochs(data, workers, count=2, batch_size=4):
    loader = batches(data, batch_size, shuffle=True, workers=workers)
    return [list(loader) for data.epoch in range(count)]


def test_any_number_of_workers_gives_equal_batches_and_they_live_through_the_epochs(few):
    pytest.importorskip("torchvision")
    made = [epochs(ClipDataset(*few, *VIEWS, train=True, flip=True, seed=3, augment=AUGMENT), workers) for workers in (0, 1, 2)]
    alone = [list(batches(data, 4, shuffle=True)) for data in [ClipDataset(*few, *VIEWS, train=True, flip=True, seed=3, augment=AUGMENT)] for data.epoch in range(2)]
    for other in (*made[1:], alone):
        for a, b in zip(made[0], other, strict=True):
            for x, y in zip(a, b, strict=True): assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
    assert not torch.equal(made[0][0][0]["local"], made[0][1][0]["local"])


def test_the_order_is_the_one_of_earlier_runs(few):
    data = ClipDataset(*few, *VIEWS, train=True, seed=5)
    for data.epoch in range(3):
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence([5, data.epoch, 1]).generate_state(1)[0]))
        plain = torch.utils.data.DataLoader(torch.arange(6), 4, shuffle=True, drop_last=True, generator=generator)
        assert [b["index"].tolist() for b in batches(data, 4, shuffle=True)] == [b.tolist() for b in plain]


def test_reading_batches_leaves_the_global_random_state_alone(few):
    state = torch.random.get_rng_state()
    list(batches(ClipDataset(*few, *VIEWS, train=True), 2, shuffle=True))
    assert torch.equal(state, torch.random.get_rng_state())


def test_an_abandoned_epoch_does_not_disturb_the_next(few):
    data = ClipDataset(*few, *VIEWS, train=True, seed=3)
    loader = batches(data, 2, shuffle=True, workers=1)
    next(iter(loader))
    data.epoch = 1
    later = list(loader)
    for a, b in zip(later, list(batches(data, 2, shuffle=True)), strict=True): assert all(torch.equal(a[k], b[k]) for k in a)


SPAWN = """
import sys, torch, numpy as np
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from mbd import clips, datasets
def main():
    torch.multiprocessing.set_start_method("spawn")
    rng = np.random.default_rng(0)
    records = [datasets.Record(f"v{i}", Path("none"), 0, "s") for i in range(4)]
    frames = {r.id: rng.integers(0, 256, (20, 24, 24, 3)).astype(np.uint8) for r in records}
    data = clips.ClipDataset(records, frames, clips.View(4, 2, 8), clips.View(2, 4, 8), train=True)
    made = [list(clips.batches(data, 2, shuffle=True, workers=w)) for w in (0, 1)]
    assert all(torch.equal(a[k], b[k]) for a, b in zip(*made, strict=True) for k in a)
    print("equal")
if __name__ == "__main__": main()
"""


@pytest.mark.slow
def test_loader_processes_may_be_spawned(tmp_path):
    (tmp_path / "main.py").write_text(SPAWN)
    ended = subprocess.run([sys.executable, str(tmp_path / "main.py"), str(Path(clips.__file__).parents[1])], capture_output=True, text=True, timeout=300)
    assert ended.stdout == "equal\n", ended.stderr[-2000:]


def test_what_a_spawned_process_needs_can_be_sent_to_it(few):
    data = ClipDataset(*few, *VIEWS, train=True, augment=Augmentation(brightness=.1))
    loader = batches(data, 2, shuffle=True).loader
    reader = pickle.loads(pickle.dumps(loader.dataset))
    assert pickle.loads(pickle.dumps(loader.collate_fn)) is loader.collate_fn and torch.equal(reader[3, 0, 0]["local"], data[3]["local"])


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


@pytest.mark.parametrize("shape", [(37, 70, 96, 3), (33, 48, 100, 3), (1, 64, 48, 3), (16, 40, 40, 3)])
@pytest.mark.parametrize("size, max_frames", [(24, None), (None, None), (24, 20), (32, 1), (400, None)])
def test_shrinking_a_few_frames_at_a_time_changes_nothing(tmp_path, monkeypatch, shape, size, max_frames):
    frames, seen, real = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8), [], clips._shrink
    monkeypatch.setattr(video, "_pictures", lambda path: iter(frames))
    monkeypatch.setattr(video, "num_frames", lambda path: len(frames))
    monkeypatch.setattr(video, "read_frames", lambda path, index: frames[index])
    kept = frames if max_frames is None else frames[np.linspace(0, len(frames) - 1, min(len(frames), max_frames)).round().astype(int)]
    monkeypatch.setattr(clips, "_shrink", lambda group, size: seen.append(len(group)) or real(group, size))
    assert np.array_equal(clips._decoded("a.mp4", size, max_frames), real(kept, size)) and max(seen) <= 16 and sum(seen) == len(kept)


@pytest.mark.parametrize("keep", [lambda r, folder: load_frames(r, limit_gib=.01), lambda r, folder: FrameCache(r, folder, limit_gib=.01)], ids=["memory", "disk"])
def test_a_slow_first_video_does_not_let_the_others_fill_the_memory(tmp_path, monkeypatch, keep):
    records, made = [record(f"v{i}", path=tmp_path / f"v{i}.mp4") for i in range(200)], []
    for r in records: r.path.touch()
    monkeypatch.setattr(os, "getpid", lambda: 0)       # the cache begins with the first record
    def decoded(path, size, max_frames):
        if path == records[0].path: time.sleep(.3)
        made.append(path)
        return np.zeros((10, 200, 200, 3), np.uint8)    # 1.2 MB: nine of them pass the limit
    monkeypatch.setattr(clips, "_decoded", decoded)
    with pytest.raises((MemoryError, OSError), match="raise limit_gib"): keep(records, tmp_path / "c")
    assert len(made) < 20


# ---- what is refused where it is given

@pytest.mark.parametrize("bad, words", [(dict(max_frames=0), "max_frames must be at least 1, not 0"), (dict(max_frames=2.5), "max_frames must be a whole number"), (dict(size=0), "size must be at least 1, not 0"),
                                        (dict(size=-5), "size must be at least 1"), (dict(workers=0), "workers must be at least 1")])
def test_impossible_sizes_and_numbers_of_kept_frames(tmp_path, bad, words):
    for keep in (load_frames, lambda r, **k: FrameCache(r, tmp_path / "c", **k)):
        with pytest.raises((ValueError, TypeError), match=words): keep([record("a")], **bad)


@pytest.mark.parametrize("bad, words", [(dict(rate=0), "rate must be a number of frames per second above 0, not 0"), (dict(rate=-25), "rate must be"), (dict(rate=float("nan")), "rate must be"), (dict(rate={}), "rate lacks 6 of 6 records, 'v0' first"),
                                        (dict(rate={f"v{i}": i for i in range(6)}), "rate of 'v0' must be"), (dict(seed=-1), "seed must be at least 0, not -1"), (dict(seed=1.5), "seed must be a whole number"),
                                        (dict(flip=1), "flip must be True, False or a set of labels, not 1"), (dict(flip="no"), "flip must be")])
def test_impossible_values_of_a_data_set(few, bad, words):
    with pytest.raises((ValueError, TypeError), match=words): ClipDataset(*few, *VIEWS, **bad)


@pytest.mark.parametrize("size", [0, -1, 2.5, None])
def test_impossible_sizes_of_batches(few, size):
    with pytest.raises((ValueError, TypeError), match="batch_size must be"): batches(ClipDataset(*few, *VIEWS), size)


def test_a_rate_that_is_none_is_refused_wherever_it_is_used():
    for rate in (0, -1, float("nan"), "25"):
        with pytest.raises(ValueError, match="rate must be a number"): draw((40, 8, 8), [View(4, seconds=.1)], rate=rate)


def test_a_record_without_a_file_is_named(few, tmp_path):
    records = [replace(r, path=None) if r.id == "v2" else r for r in few[0]]
    for use in (lambda: load_frames(records), lambda: FrameCache(records, tmp_path / "c")):
        with pytest.raises(ValueError, match="1 of 6 records have no file .*'v2' first: load the lists with the folder"): use()
    data = ClipDataset(records, None, *VIEWS)      # a list may hold videos that are never asked for
    with pytest.raises(ValueError, match="1 of 1 records have no file .*'v2' first"): data[[r.id for r in records].index("v2")]
    assert len(ClipDataset(records, few[1], *VIEWS)) == 6      # whose frames are at hand needs none


@pytest.mark.parametrize("change", [lambda f: f.astype(np.float32) / 255, lambda f: f[..., :1], lambda f: f[0], lambda f: f[:0]], ids=["float", "grey", "picture", "none"])
def test_frames_of_another_kind_are_refused(change):
    bad = change(noise())
    with pytest.raises(ValueError, match=r"video 'v': frames must be uint8 \(T, H, W, 3\) with T >= 1, not "): ClipDataset([record("v")], {"v": bad}, *VIEWS)[0]
    with pytest.raises(ValueError, match="frames must be uint8"): cut(bad, LOCAL_VIEW, Cut(0, 30, (0, 0, 56, 56), False))


# ---- from files, without keeping them

def sources(files): return files[:2], load_frames(files[:2])[0]


def test_clips_from_files_are_those_from_memory(files):
    records, frames = sources(files)
    for more in (dict(train=True, flip=True), dict(clips=3, crops=3), dict(train=True, index={r.id: video.scan(r.path) for r in records})):
        kept, read = (ClipDataset(records, f, *VIEWS, **more) for f in (frames, None))
        assert len(kept) == len(read)
        for a, b in zip(kept, read, strict=True): assert a.keys() == b.keys() and all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in a)


def test_each_video_of_a_batch_is_read_once(files, monkeypatch):
    asked, real = [], video.read_frames
    monkeypatch.setattr(video, "read_frames", lambda path, wanted, **more: asked.append((Path(path).stem, wanted)) or real(path, wanted, **more))
    list(batches(ClipDataset(files[:2], None, *VIEWS, clips=2, crops=3), 6))
    assert [n for n, _ in asked] == ["a", "b"] and all(w == sorted(set(w)) for _, w in asked)
    asked.clear()
    ClipDataset(files[:2], None, *VIEWS)[0]
    assert len(asked) == 1 and len(asked[0][1]) < 8 + 4 + 1


def test_with_an_index_nothing_is_scanned(files, monkeypatch):
    records, index = files[:2], {r.id: video.scan(r.path) for r in files[:2]}
    before = [item["local"] for item in ClipDataset(records, None, *VIEWS)]
    monkeypatch.setattr(video, "scan", None)
    assert all(torch.equal(a, item["local"]) for a, item in zip(before, ClipDataset(records, None, *VIEWS, index=index)))


def test_frame_rates_come_from_the_container_or_as_given(tmp_path):
    pytest.importorskip("av")
    for name, fps in (("slow", 10), ("fast", 40)): write_video(tmp_path / f"{name}.mp4", ruler(60, 32, 32), fps=fps)
    assert (frame_rate(tmp_path / "slow.mp4"), frame_rate(tmp_path / "fast.mp4")) == (10, 40)
    with pytest.raises(VideoError, match="no such file"): frame_rate(tmp_path / "none.mp4")
    records, views = [record(n, path=tmp_path / f"{n}.mp4") for n in ("slow", "fast")], (View(4, size=16, seconds=.1), View(2, size=8, seconds=.2))
    span = lambda item: round(item["local_t1"] - item["local_t0"], 3)
    for frames in (None, load_frames(records)[0]): assert [span(item) for item in ClipDataset(records, frames, *views)] == [3, 12]
    assert [span(item) for item in ClipDataset(records, None, *views, rate=20)] == [6, 6]
    assert [span(item) for item in ClipDataset(records, None, *views, rate={"slow": 20, "fast": 10})] == [6, 3]


def timed(path, moments, codec="libvpx", rate=1000):
    "A video whose frames stand at these milliseconds."
    av = pytest.importorskip("av")
    from fractions import Fraction
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.codec_context.time_base = 32, 32, "yuv420p", Fraction(1, 1000)
        for i, moment in enumerate(moments):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 5 * i, np.uint8), format="rgb24")
            frame.pts, frame.time_base = moment, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


VARYING = np.cumsum([0] + [33, 33, 150] * 13).tolist()


@pytest.mark.parametrize("name, codec", [("a.webm", "libvpx"), ("a.mkv", "libx264"), ("a.flv", "libx264")])
@pytest.mark.parametrize("rate", [1000, 30])
def test_a_varying_rate_is_the_mean_of_the_time_stamps(tmp_path, name, codec, rate):
    path, true = timed(tmp_path / name, VARYING, codec, rate), 39e3 / VARYING[-1]
    assert frame_rate(path) == pytest.approx(true, rel=1e-3)
    assert frame_rate(path, video.scan(path)) == pytest.approx(true, rel=1e-3)
    item = ClipDataset([record("a", path=path)], None, View(4, size=16, seconds=.2), View(2, size=8, seconds=.2))[0]
    assert item["local_t1"] - item["local_t0"] == pytest.approx(.6 * true, abs=.01)


def test_a_constant_rate_is_believed_without_decoding(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "scan", None)
    for fps in (10, 25, 29.97, 23.976):
        for ending in ("webm", "mp4", "avi"): assert frame_rate(write_video(tmp_path / f"a.{ending}", ruler(20, 32, 32), fps=fps)) == pytest.approx(fps)
    assert frame_rate(write_video(tmp_path / "one.webm", ruler(1, 32, 32))) == 25


def test_a_known_index_is_asked_before_the_file_is_read(tmp_path, monkeypatch):
    path = timed(tmp_path / "a.webm", VARYING)
    index = video.scan(path)
    monkeypatch.setattr(video, "scan", None)
    assert frame_rate(path, index) == pytest.approx(39e3 / VARYING[-1], rel=1e-3)


def test_a_file_without_times_asks_for_the_rate(tmp_path):
    with pytest.raises(VideoError, match="a.h264: does not tell its frames per second; give rate"): frame_rate(timed(tmp_path / "a.h264", range(0, 400, 40), "libx264", 25))


# ---- videos that cannot be read

@pytest.fixture
def some(tmp_path):
    "Ten videos of which the fourth cannot be read."
    pytest.importorskip("av")
    for i in range(10): write_video(tmp_path / f"v{i}.mp4", noise(12, i, 32))
    (tmp_path / "v3.mp4").write_bytes(b"no video")
    return [record(f"v{i}", i % 3, tmp_path / f"v{i}.mp4") for i in range(10)]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_video_is_left_out_of_its_batch_counted_and_logged_once(some, workers, caplog):
    data, whole = (ClipDataset(r, None, *VIEWS, train=True, max_failures=.1, seed=3) for r in (some, [replace(r, path=some[0].path) if r.id == "v3" else r for r in some]))
    with caplog.at_level(logging.WARNING): made, expected = epochs(data, workers, batch_size=5), epochs(whole, 0, batch_size=5)
    assert data.failures == {"v3": "is no video that FFmpeg knows, or was cut off before its index"} and whole.failures == {}
    for a, b in zip(sum(made, []), sum(expected, []), strict=True):
        stays = b["index"] != 3
        assert all(torch.equal(a[k], b[k][stays]) for k in a)      # the others are what they were, nothing took its place
    assert sorted(len(b["label"]) for b in made[0]) == [4, 5]
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) == 1 and str(some[3].path) in lines[0] and "left out" in lines[0]


def test_a_file_that_failed_is_not_tried_again_in_the_next_epoch(some, monkeypatch):
    data = ClipDataset(some, None, *VIEWS, train=True, max_failures=.1)
    list(batches(data, 5, shuffle=True))
    asked, real = [], video.read_frames
    monkeypatch.setattr(video, "read_frames", lambda path, *a, **k: asked.append(Path(path).stem) or real(path, *a, **k))
    some[3].path.write_bytes(some[0].path.read_bytes())
    assert sorted(i for b in batches(data, 5, shuffle=True) for i in b["index"].tolist()) == [0, 1, 2, 4, 5, 6, 7, 8, 9] and "v3" not in asked


def test_a_file_that_vanishes_while_training_is_counted_too(some):
    data = ClipDataset(some, None, *VIEWS, train=True, max_failures=.2)
    assert len(list(batches(data, 5, shuffle=True))) == 2
    some[7].path.unlink()
    data.epoch = 1
    list(batches(data, 5, shuffle=True))
    assert data.failures.keys() == {"v3", "v7"} and "such file" in data.failures["v7"].lower()


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_failures_end_it_with_the_count_the_paths_and_the_remedy(some, workers):
    for i in range(10): some[i].path.write_bytes(b"no video")
    data = ClipDataset(some, None, *VIEWS, train=True, max_failures=.2)
    with pytest.raises(RuntimeError, match=r"(?s)^\d of 10 videos could not be read, and max_failures = 0.2 allows 2: .*v\d.mp4: is no video.*mbd data check.*raise max_failures") as caught: list(batches(data, 4, workers=workers))
    assert str(caught.value).count(".mp4") == 3 and len(data.failures) == 3
    with pytest.raises(RuntimeError, match="3 of 10 videos could not be read"): next(iter(batches(data, 4)))      # who goes on all the same is told again
    with pytest.raises(ValueError, match="max_failures is a fraction"): ClipDataset(some, None, *VIEWS, max_failures=5)


def test_parts_that_count_together_share_one_limit(some):
    one = lambda together: [ClipDataset(part, None, *VIEWS, max_failures=.1, together=together) for part in (some[:3] + some[:1], some[3:5], some[5:])]
    with pytest.raises(RuntimeError, match="1 of 2 videos could not be read, and max_failures = 0.1 allows 0"): list(batches(one(None)[1], 2))
    parts = one([])
    assert [sum(len(b["label"]) for b in batches(part, 2)) for part in parts] == [4, 1, 5] and [set(part.failures) for part in parts] == [set(), {"v3"}, set()]
    some[7].path.write_bytes(b"no video")
    with pytest.raises(RuntimeError, match=r"2 of 10 videos could not be read, and max_failures = 0.1 allows 1: .*v3.mp4: .*v7.mp4: "): list(batches(parts[2], 2))
    with pytest.raises(RuntimeError, match="2 of 10"): next(iter(batches(parts[0], 2)))


def test_batches_are_never_empty_and_never_too_small_to_normalise(some):
    some[4].path.write_bytes(b"")
    data = ClipDataset(some, None, *VIEWS, max_failures=.5)
    assert [b["index"].tolist() for b in batches(data, 1)] == [[i] for i in range(10) if i not in (3, 4)]
    data = ClipDataset(some, None, *VIEWS, train=True, max_failures=.5)
    sizes = [len(b["label"]) for data.epoch in range(12) for b in batches(data, 2, shuffle=True)]
    assert set(sizes) == {2}
    assert {len(b["label"]) for data.epoch in range(12) for b in batches(data, 3, shuffle=True)} == {2, 3}


def test_in_testing_all_views_of_a_failed_video_are_missing_and_it_is_named(some):
    data = ClipDataset(some, None, *VIEWS, clips=2, crops=3, max_failures=.1)
    seen = [(int(i), int(v)) for b in batches(data, 7) for i, v in zip(b["index"], b["view"])]
    assert seen == [(i, v) for i in range(10) if i != 3 for v in range(6)] and set(data.failures) == {"v3"}


def test_asking_for_one_item_raises(some):
    with pytest.raises(VideoError, match="v3.mp4: is no video"): ClipDataset(some, None, *VIEWS)[3]
    with pytest.raises(IndexError): ClipDataset(some, None, *VIEWS)[10]


# ---- the cache

def entries(folder): return sorted(p for p in Path(folder).glob("*/*"))


def test_a_cache_stands_in_the_place_of_the_frames(files, tmp_path):
    seen = []
    frames, unreadable = load_frames(files)
    cached = FrameCache(files, tmp_path / "c", progress=lambda *x: seen.append(x))
    assert list(cached) == ["a", "b"] and len(cached) == 2 and "c" not in cached and cached.unreadable == {**unreadable, "e": cached.unreadable["e"]} and seen[-1] == (5, 5)
    for name in frames: assert np.array_equal(cached[name], frames[name]) and not cached[name].flags.writeable
    for a, b in zip(*(ClipDataset(files, f, *VIEWS, train=True, flip=True) for f in (frames, cached)), strict=True): assert torch.equal(a["local"], b["local"])
    assert all(p.suffix == ".npy" for p in entries(tmp_path / "c")) and len(entries(tmp_path / "c")) == 2
    again = pickle.loads(pickle.dumps(cached))
    assert len(pickle.dumps(cached)) < 5000 and np.array_equal(again["a"], frames["a"])


def test_the_second_run_decodes_nothing(files, tmp_path, monkeypatch):
    first = FrameCache(files[:2], tmp_path / "c", size=24, max_frames=5)
    expected, _ = load_frames(files[:2], size=24, max_frames=5)
    monkeypatch.setattr(clips, "_decoded", None)
    second = FrameCache(files[:2], tmp_path / "c", size=24, max_frames=5)
    assert all(np.array_equal(second[n], expected[n]) and np.array_equal(first[n], expected[n]) for n in "ab")


def test_a_changed_video_or_another_size_is_another_entry(files, tmp_path):
    FrameCache(files[:1], tmp_path / "c")
    FrameCache(files[:1], tmp_path / "c", size=24)
    write_video(files[0].path, ruler(9, 48, 48))
    changed = FrameCache(files[:1], tmp_path / "c")
    assert len(entries(tmp_path / "c")) == 3 and len(changed["a"]) == 9


@pytest.mark.parametrize("damage", [lambda p: p.write_bytes(p.read_bytes()[:-1]), lambda p: p.write_bytes(b""), lambda p: p.write_bytes(b"rubbish" * 100), lambda p: np.save(p, np.array([{"a": 1}]), allow_pickle=True), lambda p: np.save(p, np.zeros((2, 3)))], ids=["short", "empty", "rubbish", "pickled", "numbers"])
def test_a_damaged_entry_is_made_again_and_never_used(files, tmp_path, damage):
    cached = FrameCache(files[:1], tmp_path / "c")
    frames, [entry] = np.array(cached["a"]), entries(tmp_path / "c")
    damage(entry)
    with pytest.raises(VideoError, match="cached frames of a are gone or damaged"): cached["a"]
    assert np.array_equal(FrameCache(files[:1], tmp_path / "c")["a"], frames)


def test_the_limit_is_kept_and_named(files, tmp_path):
    one, index = 20 * 48 * 48 * 3 / 2**30, {r.id: video.scan(r.path) for r in files[:2]}
    with pytest.raises(OSError, match="may hold limit_gib = .*needs about .* GiB: raise limit_gib, lower size or max_frames"): FrameCache(files[:2], tmp_path / "c", limit_gib=one)
    assert sum(p.stat().st_size for p in entries(tmp_path / "c")) <= one * 2**30 + 128
    with pytest.raises(OSError, match="raise limit_gib"): FrameCache(files[:2], tmp_path / "d", limit_gib=one, index=index)
    assert not entries(tmp_path / "d")      # refused before anything was decoded
    assert len(FrameCache(files[:2], tmp_path / "d", limit_gib=one, index=index, size=24)) == 2
    FrameCache(files[:2], tmp_path / "e", limit_gib=3 * one)
    with pytest.raises(OSError, match="raise limit_gib"): FrameCache(files[:1], tmp_path / "e", size=40, limit_gib=1.2 * one)      # what other sets left counts


def test_a_full_disk_leaves_no_entry_and_is_explained(files, tmp_path, monkeypatch):
    def full(file, frames, **more): file.write(b"half"); raise OSError(28, "No space left on device")
    monkeypatch.setattr(clips.np, "save", full)
    with pytest.raises(OSError, match="disk of the cache .* is full: lower size"): FrameCache(files[:1], tmp_path / "c")
    assert not entries(tmp_path / "c")


def killed(records, folder):
    def half(file, frames, **more): file.write(b"half"); file.flush(); os._exit(9)
    np.save = half
    FrameCache(records, folder, workers=1)


def fill(records, folder): FrameCache(records, folder, workers=2)


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_a_killed_process_leaves_nothing_that_looks_whole(files, tmp_path):
    process = multiprocessing.get_context("fork").Process(target=killed, args=(files[:2], tmp_path / "c"))
    process.start(); process.join(60)
    assert process.exitcode == 9
    [part] = entries(tmp_path / "c")
    assert part.suffix == ".part"
    cached = FrameCache(files[:2], tmp_path / "c")
    assert len(cached) == 2 and np.array_equal(cached["a"], load_frames(files[:1])[0]["a"]) and part.exists()
    download = tmp_path / "c/downloads/UCF101.rar.part"
    download.parent.mkdir(); download.write_bytes(b"half of it")
    for file in (part, download): os.utime(file, (time.time() - 90_000,) * 2)
    FrameCache(files[:2], tmp_path / "c")
    assert not part.exists() and download.exists()      # the name of the other says that it is none of the cache's


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_several_processes_may_fill_it_at_once(some, tmp_path):
    started = [multiprocessing.get_context("fork").Process(target=fill, args=(some, tmp_path / "c")) for _ in range(3)]
    for process in started: process.start()
    for process in started: process.join(60)
    frames, _ = load_frames(some)
    assert [p.exitcode for p in started] == [0, 0, 0] and len(entries(tmp_path / "c")) == 9
    cached = FrameCache(some, tmp_path / "c")
    assert len(cached) == 9 and all(np.array_equal(cached[n], frames[n]) for n in frames)


# ---- real videos

def test_real_clips_are_read_alike_from_memory_cache_and_file(tmp_path):
    folder = os.environ.get("MBD_REALDATA")
    paths = sorted((p for p in Path(folder, "clips").rglob("*.*") if p.suffix in (".avi", ".mp4", ".webm") and p.stat().st_size > 1e5), key=lambda p: p.stat().st_size)[:4] if folder else []
    if not paths: pytest.skip("MBD_REALDATA names no folder with clips")
    pytest.importorskip("av")
    records = [Record(f"{i}-{p.stem}", p, 0, "s") for i, p in enumerate(paths)]
    frames, unreadable = load_frames(records, limit_gib=4)
    views = View(8, 2, 112, resize="bilinear"), View(4, size=56, sampling="segments", resize="bilinear")
    datasets = [ClipDataset(records, f, *views, train=True, max_failures=1, augment=Augmentation(scale=(.4, 1))) for f in (frames, FrameCache(records, tmp_path / "c"), None)]
    made = [{datasets[k].records[i].id: (a, b) for batch in batches(datasets[k], 2) for i, a, b in zip(batch["index"], batch["local"], batch["global_"])} for k in range(3)]
    assert made[0].keys() == made[1].keys() and len(made[0]) == len(frames) >= 3
    for name in made[0]:
        for other in made[1:]:
            if name in other: assert all(torch.equal(a, b) for a, b in zip(made[0][name], other[name]))
    assert made[0].keys() >= made[2].keys() and len(made[2]) >= 3


def test_decoding_ahead_stops_where_too_many_videos_fail(tmp_path):
    records = [Record(f"v{i}", tmp_path / f"v{i}.mp4", 0, f"s{i}") for i in range(10)]
    for i, record in enumerate(records): video.write_video(record.path, np.full((4, 16, 16, 3), 9 * i, np.uint8))
    records[3].path.write_bytes(b"no video"); records[7].path.unlink()
    frames, unreadable = load_frames(records, max_failures=.2)
    assert len(frames) == 8 and set(unreadable) == {"v3", "v7"}
    with pytest.raises(RuntimeError, match=r"2 of the first 8 of 10 .* allows 1; .*v7\.mp4.*mbd data check"): load_frames(records, max_failures=.1)


class Hanging(ClipDataset):
    "A decoder that never comes back."
    def read(self, *_): time.sleep(60)


def test_a_decoder_that_hangs_in_a_worker_ends_the_run_with_the_remedy(monkeypatch):
    monkeypatch.setattr(clips, "_PATIENCE", 1)
    data = Hanging([record(f"v{i}") for i in range(4)])
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match="mbd data check"): list(batches(data, 2, workers=1))
    assert time.monotonic() - begun < 30


def test_each_colour_has_its_own_mean_and_deviation():
    frames = np.zeros((4, 8, 8, 3), np.uint8) + np.array([0, 51, 255], np.uint8)
    view = View(2, 1, 8, mean=[.1, .2, .5], std=(.5, 1., 2.))
    got = cut(frames, view, draw(frames.shape[:3], [view], augment=Augmentation(1.)))
    assert torch.allclose(got.mean((1, 2, 3)), torch.tensor([-.2, 0., .25]), atol=1e-6)
    one, three = (cut(frames, View(2, 1, 8, mean=m), draw(frames.shape[:3], [view])) for m in (.45, (.45,) * 3))
    assert torch.equal(one, three)


@pytest.mark.parametrize("bad", [dict(mean=(1, 2)), dict(std=(.1, 0., .2)), dict(mean="grey"), dict(std=float("nan")), dict(mean=(.1, float("inf"), .1))])
def test_a_mean_or_deviation_that_is_no_colour_is_refused(bad):
    with pytest.raises(ValueError, match=f"view: {next(iter(bad))}"): View(**bad)
