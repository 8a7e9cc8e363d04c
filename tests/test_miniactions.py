import dataclasses, hashlib, json, os, shlex, shutil, signal, subprocess, sys, time
from pathlib import Path
import numpy as np, pytest
from mbd import datasets, miniactions as mini
from mbd.miniactions import CLASSES, KIND, PAIRS, TWIN, Spec, check, generate, generator_id, probe, render, required_range, sized

HERE = Path(__file__).resolve().parent
REFERENCE = HERE / "miniactions_reference.json"
SMALL = dict(classes=("SameHand", "TwirlForward"), train_groups=3, test_groups=1, clips=1, size=32)
needs_groups = pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory): monkeypatch.setenv("MBD_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def needs_coding(): pytest.importorskip("av")


def hashes(folder): return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def videos(folder): return sorted(p for p in Path(folder).rglob("*") if p.suffix in (".mp4", ".avi", ".webm"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    pytest.importorskip("av")
    return generate(tmp_path_factory.mktemp("small") / "set", workers=2, **SMALL)


# ---- what the frames are

def test_same_seed_same_frames_and_every_key_counts():
    spec = Spec(size=32)
    first = render(spec, "SameHand", 3, 2)
    assert first.dtype == np.uint8 and first.shape == (32, 32, 32, 3)
    assert np.array_equal(first, render(Spec(size=32), "SameHand", 3, 2))
    for other in [(dataclasses.replace(spec, seed=1), "SameHand", 3, 2), (spec, "OtherHand", 3, 2), (spec, "SameHand", 4, 2), (spec, "SameHand", 3, 1)]:
        assert not np.array_equal(first, render(*other))


def test_frames_do_not_depend_on_which_classes_are_chosen_nor_on_the_number_of_videos():
    a, b = Spec(size=32), Spec(size=32, classes=("OtherHand", "SameHand"), train_groups=2, test_groups=1, clips=9)
    assert np.array_equal(render(a, "SameHand", 2, 1), render(b, "SameHand", 2, 1))


def test_clips_of_a_group_share_performer_and_scene():
    spec = Spec(size=32, difficulty=0)
    corner = lambda group, clip: render(spec, "PushUpsSlow", group, clip)[0, :4].astype(int)
    assert np.abs(corner(1, 1) - corner(1, 2)).max() <= 1 < np.abs(corner(1, 1) - corner(2, 1)).max()


@pytest.mark.parametrize("knob, value", [("frames", 40), ("size", 48), ("gap", 5), ("difficulty", 0.0), ("seed", 7)])
def test_each_knob_of_the_frames_has_an_effect(knob, value):
    a, b = (render(spec, "SameHand", 1, 1) for spec in (Spec(), Spec(**{knob: value})))
    assert a.shape != b.shape or np.abs(a.astype(int) - b).mean() > .5
    if knob == "frames": assert len(b) == 40
    if knob == "size": assert b.shape[1:3] == (48, 48)


def test_difficulty_0_is_clean_and_more_is_noisier():
    flicker = [np.abs(np.diff(render(Spec(difficulty=d), "PushUpsSlow", 1, 1)[:, :8].astype(float), axis=0)).mean() for d in (0, 1, 2)]
    assert flicker[0] == 0 and 0 < flicker[1] < .75 * flicker[2]


def coarse(frames):
    "What the reference file keeps of a video: means of 8 x 8 blocks and the mean distance of pixels to them, of frames 0, 15 and 31."
    kept = frames[[0, 15, 31]].astype(float)
    blocks = kept.reshape(3, 8, 8, 8, 8, 3).mean((2, 4))
    rest = np.abs(kept - blocks.repeat(8, 1).repeat(8, 2)).mean((1, 2, 3))
    return {"blocks": blocks.round().astype(int).ravel().tolist(), "rest": rest.round(2).tolist()}


def test_frames_are_frozen_until_VERSION_is_raised():
    known = json.loads(REFERENCE.read_text())
    assert str(mini.VERSION) in known, f"no reference frames for VERSION {mini.VERSION}: record them with 'python {HERE.name}/{Path(__file__).name}' and commit {REFERENCE.name}"
    for name in CLASSES:
        now, then = coarse(render(Spec(), name, 1, 1)), known[str(mini.VERSION)][name]
        moved = np.abs(np.subtract(now["blocks"], then["blocks"])).max(), np.abs(np.subtract(now["rest"], then["rest"])).max()
        assert moved[0] <= 2 and moved[1] <= .25, f"the frames of {name} changed (blocks by {moved[0]}, texture by {moved[1]:.2f} grey levels) under VERSION {mini.VERSION}: raise VERSION in mbd.miniactions, then record the new frames with 'python {HERE.name}/{Path(__file__).name}'"


# ---- what windows can and cannot see

def captured(monkeypatch, name, function, clips=48, **knobs):
    "What the inner `function` returned for many videos of class `name`."
    kept, inner = [], getattr(mini, function)
    def spy(*given): kept.append(inner(*given)); return kept[-1]
    with monkeypatch.context() as m:
        m.setattr(mini, function, spy)
        for clip in range(1, clips + 1): render(Spec(size=16, **knobs), name, 1, clip)
    assert len(kept) == clips
    return np.stack(kept).reshape(clips, -1, kept[0].shape[-1]) + 0.      # no negative zeros


@pytest.mark.parametrize("pair, function, more", [(("SameHand", "OtherHand"), "_raises", 0), (("ComesBack", "PassesThrough"), "_crossing", 3)])
@pytest.mark.parametrize("gap, phase", [(4, 8), (9, 8), (4, 20)])
def test_windows_up_to_the_gap_are_the_same_in_both_classes_and_longer_ones_are_not(monkeypatch, pair, function, more, gap, phase):
    quiet = 2 * phase + more + 1 + gap
    paths = {name: captured(monkeypatch, name, function, frames=quiet, gap=gap, phase=phase) for name in pair}
    assert all(p.shape[-1] == quiet for p in paths.values())
    def seen(name, length): return {(start, p[:, start:start + length].tobytes()) for p in paths[name] for start in range(quiet - length + 1)}
    for length in (1, 2, gap, gap + more + 1): assert seen(pair[0], length) == seen(pair[1], length)
    needed = required_range(pair[0], Spec(gap=gap, frames=64))[0]
    assert length < needed and seen(pair[0], needed) != seen(pair[1], needed)
    assert not seen(pair[0], quiet) & seen(pair[1], quiet)      # the whole video always tells


def test_both_phases_are_drawn_independently(monkeypatch):
    for name in ("SameHand", "OtherHand"):
        up = captured(monkeypatch, name, "_raises", clips=200)
        arms = [[int(a) for a, _ in sorted(((a, t) for a in (0, 1) for t in range(32) if p[a, t] == 1), key=lambda x: x[1])] for p in up]
        first, second = np.array([a[0] for a in arms]), np.array([a[-1] for a in arms])
        assert .38 < first.mean() < .62 and .38 < second.mean() < .62      # neither event alone says anything
        assert ((first == second) == (name == "SameHand")).all()
        quiet = (up == 0).all(1)
        runs = [max(len(r) for r in "".join("q" if q else "." for q in line[f:l]).split(".")) for line, f, l in zip(quiet, (~quiet).argmax(1), 32 - (~quiet[:, ::-1]).argmax(1))]
        assert set(runs) == {13}      # neutral frames between the phases: the gap


def twins(monkeypatch, pair, clip=1, **knobs):
    "Both classes of a pair rendered with the same scene and the same random numbers."
    class Same(tuple):
        def index(self, name): return 0
    with monkeypatch.context() as m:
        m.setattr(mini, "CLASSES", Same(CLASSES))
        return [render(Spec(difficulty=0, **knobs), name, 1, clip).astype(int) for name in pair]


def test_directions_of_the_rope_share_every_fourth_pose_and_no_other(monkeypatch):
    forward, backward = twins(monkeypatch, ("TwirlForward", "TwirlBackward"))
    change = np.abs(forward - backward).max((1, 2, 3))
    assert (change[::4] <= 1).all() and (np.delete(change, np.s_[::4]) > 40).all()


def test_rhythms_share_their_poses_at_every_fourth_frame(monkeypatch):
    def lifts(name):
        kept = []
        with monkeypatch.context() as m:
            m.setattr(mini, "_draw_push_up", lambda *given: kept.append(given[-1]))
            for clip in range(1, 9): render(Spec(size=16), name, 1, clip)
        return np.stack(kept)
    t = np.arange(32)
    for lift in lifts("PushUpsFast"):
        up, along = 2 * lift[0] - 1, (2 * lift[1] - 1 - (2 * lift[0] - 1) * np.cos(np.pi / 3)) / np.sin(np.pi / 3)
        phase = np.arctan2(up, along)
        slow = .5 + .5 * np.sin(2 * np.pi * t / 12 + np.pi - phase)      # a slow one that starts elsewhere
        assert np.allclose(lift[::4], slow[::4]) and not np.allclose(lift[::2], slow[::2], atol=.2)
    for lift in lifts("PushUpsSlow"): assert np.allclose(lift[12:], lift[:-12]) and not np.allclose(lift[6:], lift[:-6], atol=.2)


def test_twins_of_a_global_pair_are_the_same_video_up_to_the_second_phase(monkeypatch):
    for pair in (("SameHand", "OtherHand"), ("ComesBack", "PassesThrough")):
        same, other = twins(monkeypatch, pair)
        differs = np.flatnonzero(np.abs(same - other).max((1, 2, 3)) > 1)
        assert differs[-1] - differs[0] < Spec.phase and len(differs) >= Spec.phase - 2 and differs[0] >= Spec.phase + 13


def test_the_longest_neutral_stretch_grows_with_the_gap():
    ranges = {name: required_range(name) for name in CLASSES}
    assert all(ranges[name] == ranges[TWIN[name]] for name in CLASSES)
    assert max(ranges[n][0] for n in CLASSES if KIND[n] == "local") < min(ranges[n][0] for n in CLASSES if KIND[n] == "balanced")
    assert max(ranges[n][0] for n in CLASSES if KIND[n] == "balanced") < min(ranges[n][0] for n in CLASSES if KIND[n] == "global")
    for name in CLASSES:
        long, large = required_range(name, Spec(gap=20, frames=64)), required_range(name, Spec(size=128))
        assert long[0] - ranges[name][0] == (7 if KIND[name] == "global" else 0) and large == (ranges[name][0], 2 * ranges[name][1])


def test_probe_finds_nothing_in_windows_and_a_leak_when_there_is_one():
    def accuracy(gap, *views, pair=("SameHand", "OtherHand")):
        keys = [(name, group, clip) for name in pair for group in range(1, 25) for clip in (1, 2)]
        frames = np.stack([render(Spec(size=32, gap=gap), *key) for key in keys])
        labels, groups = np.array([k[0] == pair[0] for k in keys]), np.array([k[1] + 1000 * (k[0] == pair[0]) for k in keys])
        return {view: probe(frames, labels, groups, view) for view in views}
    built, leaky = accuracy(13, "single window", "bag of windows", "full clip, coarse"), accuracy(0, "bag of windows")
    for view in ("single window", "bag of windows"):      # far below one half is a leak too, turned round
        found, low, high = built[view]
        assert abs(found - .5) < .15 and abs(found - .5) <= 3 / 1.96 * (high - low) / 2, f"the pair leaks into a {view}: {built[view]}"
    assert built["full clip, coarse"][0] > .85
    assert leaky["bag of windows"][1] > .6


# ---- layout and knobs

def test_layout_lists_and_records(small):
    lists = {p.name: p.read_text().splitlines() for p in (small / "ucfTrainTestlist").iterdir()}
    assert lists["classInd.txt"] == ["1 SameHand", "2 TwirlForward"]
    assert lists["testlist01.txt"] == ["SameHand/v_SameHand_g01_c01.mp4", "TwirlForward/v_TwirlForward_g01_c01.mp4"]
    assert lists["trainlist01.txt"][0] == "SameHand/v_SameHand_g02_c01.mp4 1" and len(lists["trainlist01.txt"]) == 6
    train, test = (datasets.load("ucf101", small, subset=s) for s in ("train", "test"))
    assert (train.expected, train.found, test.expected, test.found) == (6, 6, 2, 2) and train.classes == ["SameHand", "TwirlForward"]
    assert not {r.source for r in train.records} & {r.source for r in test.records}
    parts = datasets.cut_parts(train)
    assert {len(p) for p in parts.values()} == {2}


def test_files_hold_the_rendered_frames(small):
    from mbd.video import read_frames
    stored = read_frames(small / "UCF-101/SameHand/v_SameHand_g02_c01.mp4", range(32))
    drawn = render(Spec(**SMALL), "SameHand", 2, 1)
    assert stored.shape == drawn.shape and np.abs(stored.astype(int) - drawn).mean() < 12


def test_the_description_says_what_is_known_by_construction(small):
    about = json.loads((small / "miniactions.json").read_text())
    assert about["status"] == "complete" and about["generator"] == generator_id(Spec(**SMALL))
    assert about["classes"]["SameHand"] == {"kind": "global", "twin": "OtherHand", "required_range": [15, 15]}


def test_equal_knobs_give_equal_bytes_and_other_seeds_other_ones(small, tmp_path):
    again, other = generate(tmp_path / "a", workers=1, **SMALL), generate(tmp_path / "b", workers=2, **SMALL, seed=1)
    assert hashes(again) == hashes(small)
    assert all(a.read_bytes() != b.read_bytes() for a, b in zip(videos(small), videos(other)))


def test_bytes_do_not_depend_on_which_classes_are_chosen(small, tmp_path):
    other = generate(tmp_path / "a", workers=2, **{**SMALL, "classes": ("PushUpsFast", "SameHand")})
    for p in (small / "UCF-101/SameHand").iterdir(): assert p.read_bytes() == (other / "UCF-101/SameHand" / p.name).read_bytes()
    assert "2 SameHand" in (other / "ucfTrainTestlist/classInd.txt").read_text()


def test_numbers_of_groups_and_clips(needs_coding, tmp_path):
    spec = check(Spec(classes=("OtherHand", "PushUpsFast"), train_groups=2, test_groups=1, clips=2, size=16))
    seen = []
    folder = generate(tmp_path / "a", workers=2, spec=spec, progress=lambda *x: seen.append(x))
    assert len(videos(folder)) == 2 * 3 * 2 and seen[-1] == (12, 12)
    assert len({r.source for r in datasets.load("ucf101", folder).records}) == 4


@pytest.mark.parametrize("knobs, words", [
    (dict(classes=("SameHand", "Jump")), "classes: unknown class 'Jump'; choose from TwirlForward"), (dict(classes=("SameHand",)), "at least two different"), (dict(classes=("SameHand", "SameHand")), "at least two different"),
    (dict(frames=20), "frames: 20 is too short for gap 13: the phases need 32"), (dict(gap=-1), "gap: -1 is outside"), (dict(gap=14), "too short for gap 14"), (dict(size=33), "size: 33 is odd"), (dict(size=8), "size: 8 is outside"),
    (dict(size=64.0), "size: 64.0"), (dict(difficulty=-.5), "difficulty: -0.5"), (dict(difficulty=float("nan")), "difficulty: nan"), (dict(seed=-1), "seed: -1"), (dict(seed=True), "seed: True"), (dict(clips=0), "clips: 0"),
    (dict(train_groups=90), "train_groups \\+ test_groups = 115"), (dict(test_groups=0), "test_groups: 0"), (dict(frames="32"), "frames: '32'"), (dict(gaps=3), "unknown knob 'gaps'; choose from classes"), (dict(layout="hmdb52"), "layout: 'hmdb52' is unknown; did you mean 'hmdb51'"),
    (dict(spec=Spec(), size=32), "either spec or knobs, not both"),
])
def test_bad_knobs_are_named_before_anything_is_written(tmp_path, knobs, words):
    with pytest.raises(ValueError, match=words): generate(tmp_path / "a", **knobs)
    assert not (tmp_path / "a").exists()


def test_frames_need_only_hold_what_the_chosen_classes_need():
    assert check(Spec(classes=("TwirlForward", "PushUpsSlow"), frames=8)) and check(Spec(classes=("LeftThenRight", "RightThenLeft"), frames=15))
    with pytest.raises(ValueError, match="need 15"): check(Spec(classes=("LeftThenRight", "RightThenLeft"), frames=14))
    assert render(Spec(classes=("SameHand", "OtherHand"), frames=29, size=16), "SameHand", 1, 1).shape[0] == 29
    assert render(Spec(frames=32, size=16), "ComesBack", 1, 1).shape[0] == 32


@pytest.mark.parametrize("ask, words", [
    (lambda: render(Spec(), "samehand", 1, 1), "class 'samehand' is unknown; did you mean 'SameHand'"), (lambda: required_range("Jump"), "class 'Jump' is unknown"), (lambda: mini.sample(Spec(), ("SameHand", "OtherFoot"), 1, 1), "'OtherFoot' is unknown"),
    (lambda: render(Spec(gap=30), "SameHand", 1, 1), "frames: 32 is too short for gap 30: the phases need 46"), (lambda: render(Spec(gap=14), "ComesBack", 1, 1), "the phases need 33"),
])
def test_a_class_or_a_gap_that_cannot_be_drawn_is_named(ask, words):
    with pytest.raises(ValueError, match=words): ask()
    assert len(render(Spec(gap=14, size=16), "SameHand", 1, 1)) == 32      # only what the pair needs is asked for


def test_a_probe_says_what_it_cannot_look_at():
    videos, labels, groups = mini.sample(Spec(size=16), ("SameHand", "OtherHand"), 2, 1)
    assert 0 <= probe(videos, labels, groups, "full clip, coarse")[0] <= 1
    with pytest.raises(ValueError, match="view 'single' is unknown; .*single window"): probe(videos, labels, groups, "single")
    with pytest.raises(ValueError, match="videos of 8 frames hold no window of 7 samples, 2 frames apart; give at least 13"): probe(videos[:, :8], labels, groups, "single window")
    with pytest.raises(ValueError, match="groups: 2 cannot be cut"): probe(videos[::2], labels[::2], groups[::2], "full clip, coarse")


def test_sized():
    for train, test in [(80, 40), (2400, 1000), (1, 1)]:
        spec = sized(train, test)
        assert spec.train_groups * spec.clips * 10 >= train and spec.test_groups * spec.clips * 10 >= test
    assert sized(30, 10, classes=("SameHand", "OtherHand"), seed=4).seed == 4
    with pytest.raises(ValueError, match="train_videos = 1000000"): sized(10**6, 10)


def test_generator_id_names_version_and_knobs():
    assert generator_id(Spec()).startswith(f"{mini.VERSION}/") and generator_id(Spec()) == generator_id(Spec())
    assert len({generator_id(Spec(**k)) for k in ({}, dict(seed=1), dict(gap=12), dict(phase=7), dict(size=32), dict(classes=CLASSES[::-1]))}) == 6
    assert generator_id(Spec()) == "1/b267ccd6"      # the id of the sets that were made before there was a knob `phase`
    assert generator_id(Spec(difficulty=1)) == generator_id(Spec(difficulty=1.0))      # equal specs, equal ids


# ---- four layouts

LAYOUTS, TEST = list(mini.LAYOUTS), {"ucf101": "test", "hmdb51": "test", "kinetics400": "validation", "ssv2": "validation"}
TINY = dict(classes=("SameHand", "TwirlForward", "ComesBack"), train_groups=5, test_groups=1, clips=2, size=32)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "{layout: folder}: the same set in each layout."
    pytest.importorskip("av")
    return {layout: generate(tmp_path_factory.mktemp(layout) / "set", layout=layout, workers=2, **TINY) for layout in LAYOUTS}


@pytest.mark.skipif(os.name == "nt", reason="a shell script stands for what Windows' virtual environments do")
def test_workers_work_where_python_is_started_by_a_launcher(needs_coding, tmp_path, monkeypatch):
    "On Windows a virtual environment's python.exe starts the interpreter as a child: the worker's parent is not the process that asked for it."
    launcher = tmp_path / "python.sh"
    launcher.write_text(f'#!/bin/sh\n{shlex.quote(sys.executable)} "$@"\nexit $?\n'); launcher.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(launcher))
    assert len(list(generate(tmp_path / "set", workers=2, **TINY).rglob("*.mp4"))) == len(mini._videos(mini.Spec(**TINY), "ucf101"))


def test_an_empty_file_is_no_video(needs_coding, tmp_path):
    "What a power cut leaves under a video's name is made again."
    folder = generate(tmp_path / "set", workers=1, **TINY); before = hashes(folder)
    next(folder.rglob("*.mp4")).write_bytes(b"")
    assert hashes(generate(folder, workers=1, **TINY)) == before


def test_classes_may_be_a_list():
    assert mini.Spec(classes=["SameHand", "OtherHand"]) == mini.Spec(classes=("SameHand", "OtherHand"))


def path_of(folder, layout, name, group, clip, part): return folder / mini.LAYOUTS[layout][0](name, group, clip, part)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_read_by_the_loader_of_the_real_set(tiny, layout):
    made, lists = mini._videos(Spec(**TINY), layout), {part: datasets.load(layout, tiny[layout], subset=subset) for part, subset in (("train", "train"), ("test", TEST[layout]))}
    if layout == "hmdb51": lists["unused"] = datasets.load(layout, tiny[layout], subset="unused")
    for part, data in lists.items():
        wanted = {path_of(tiny[layout], layout, *v): v for v in made if v[3] == part}
        assert data.expected == data.found == len(wanted) == {"train": 30, "test": 6, "unused": 3}[part] and not data.missing and not data.unreadable
        assert {r.path for r in data.records} == set(wanted) and all(data.classes[r.label] == wanted[r.path][0] for r in data.records)
        sources = {}
        for r in data.records: sources.setdefault(r.source, set()).add(wanted[r.path][:2])
        assert all(len(groups) == 1 for groups in sources.values()) and len(sources) == len(wanted) // (1 if layout == "ssv2" or part == "unused" else 2)
    assert len(videos(tiny[layout])) == len(made) == sum(data.found for data in lists.values())
    known = {part: {r.source for r in data.records} for part, data in lists.items()}
    assert not known["train"] & known["test"] and len({s for sources in known.values() for s in sources}) == sum(map(len, known.values()))
    assert set(datasets.cut_parts(lists["train"])) == {"fit", "map", "gate"}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_classes_keep_their_names_in_the_order_of_the_reader(tiny, layout):
    for subset in ("train", TEST[layout]):
        classes = datasets.load(layout, tiny[layout], subset=subset).classes
        assert classes == (sorted(TINY["classes"]) if layout in ("hmdb51", "kinetics400") else list(TINY["classes"]))
        assert all(KIND[c] and required_range(c, Spec(**TINY)) for c in classes)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_video_is_the_same_in_each_layout_but_for_its_coding(tiny, layout):
    from mbd.video import num_frames, read_frames
    for v in [("SameHand", 1, 1, "test"), ("TwirlForward", 4, 2, "train"), ("ComesBack", 6, 1, "train")]:
        path, drawn = path_of(tiny[layout], layout, *v), render(Spec(**TINY), *v[:3])
        stored = read_frames(path, range(32))
        assert num_frames(path) == 32 and stored.shape == drawn.shape
        apart = lambda shift: np.abs(stored[8:24].astype(int) - drawn[8 + shift:24 + shift]).mean()
        assert apart(0) < 9 and apart(0) < min(apart(-1), apart(1)), f"{path.name}: {apart(0):.1f} grey levels from what was drawn"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_description_names_the_layout_and_the_same_generator(tiny, layout):
    about = json.loads((tiny[layout] / "miniactions.json").read_text())
    assert about["layout"] == layout and about["generator"] == generator_id(Spec(**TINY))


def test_ssv2_entries_look_like_the_real_ones(tiny):
    for file, n in (("train", 30), ("validation", 6)):
        entries = json.loads((tiny["ssv2"] / f"labels/{file}.json").read_text())
        assert len(entries) == n and all(e["label"] == e["template"].replace(f"[{e['placeholders'][0]}]", e["placeholders"][0]) in TINY["classes"] for e in entries)
        assert all(e["template"].count("[") == len(e["placeholders"]) == 1 for e in entries)


def test_files_of_a_layout_have_names_of_their_own_that_do_not_depend_on_the_classes_chosen():
    whole, some = Spec(train_groups=74), Spec(train_groups=74, classes=CLASSES[::-2])
    for layout, (file, _, _) in mini.LAYOUTS.items():
        names = {file(*v) for v in mini._videos(whole, layout)}
        assert len({n.lower() for n in names}) == len(mini._videos(whole, layout)) and {file(*v) for v in mini._videos(some, layout)} < names


def test_only_the_classes_that_name_a_side_are_directional():
    assert {c for c in CLASSES if datasets.names_direction(c)} == {"LeftThenRight", "RightThenLeft"}


def test_titles_of_hmdb51_have_the_signs_of_the_real_ones(tiny):
    assert set("#!();+&[]") <= set("".join(p.name for p in videos(tiny["hmdb51"])))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_set_in_another_layout_is_refused_and_left_alone(tiny, layout):
    for other in set(LAYOUTS) - {layout}:
        before = {p: p.stat().st_mtime_ns for p in tiny[layout].rglob("*")}
        with pytest.raises(ValueError, match=f"layout '{layout}' there, '{other}' asked"): generate(tiny[layout], layout=other, workers=2, **TINY)
        assert before == {p: p.stat().st_mtime_ns for p in tiny[layout].rglob("*")}


def test_a_set_from_before_there_were_layouts_is_ucf101(small, tmp_path):
    folder = tmp_path / "a"
    shutil.copytree(small, folder)
    about = json.loads((folder / "miniactions.json").read_text())
    del about["layout"]
    (folder / "miniactions.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="layout 'ucf101' there"): generate(folder, layout="ssv2", **SMALL)
    assert hashes(generate(folder, **SMALL)) == hashes(small)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_missing_video_is_made_again_in_each_layout(tiny, tmp_path, layout, monkeypatch):
    folder = tmp_path / "a"
    shutil.copytree(tiny[layout], folder)
    whole, victim = hashes(folder), videos(folder)[3]
    victim.unlink()
    with monkeypatch.context() as m:
        m.setattr(mini, "_run_workers", lambda *given: None)
        with pytest.raises(RuntimeError, match="1 of .* videos were not made"): generate(folder, layout=layout, **TINY)
    for subset in ("train", TEST[layout]):
        with pytest.raises(FileNotFoundError): datasets.load(layout, folder, subset=subset)      # a set with a hole is no set
    times = {p: p.stat().st_mtime_ns for p in videos(folder)}
    generate(folder, layout=layout, workers=1, **TINY)
    assert hashes(folder) == whole and {p: t for p, t in ((p, p.stat().st_mtime_ns) for p in videos(folder)) if p != victim} == times


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lists_appear_all_together_or_not_at_all(tiny, tmp_path, layout, monkeypatch):
    folder, lists = tmp_path / "a", mini.LAYOUTS[layout][1]
    shutil.copytree(tiny[layout], folder)
    whole = hashes(folder)
    shutil.rmtree(folder / lists)
    inner = os.replace
    def killed(old, new):
        if Path(new).name == lists: raise KeyboardInterrupt
        inner(old, new)
    with monkeypatch.context() as m:
        m.setattr(mini.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt): generate(folder, layout=layout, **TINY)
    with pytest.raises(FileNotFoundError): datasets.load(layout, folder)
    assert hashes(generate(folder, layout=layout, **TINY)) == whole      # nothing is left of the first attempt


def test_killed_while_the_lists_of_a_set_with_a_hole_are_taken_away(tiny, tmp_path, monkeypatch):
    folder, inner = tmp_path / "a", shutil.rmtree
    shutil.copytree(tiny["hmdb51"], folder)
    whole = hashes(folder)
    videos(folder)[3].unlink()
    def killed(place, *more):
        next(Path(place).iterdir()).unlink()      # the list of one class is gone already
        raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(mini.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt): generate(folder, layout="hmdb51", **TINY)
    with pytest.raises(FileNotFoundError): datasets.load("hmdb51", folder)      # not a set of two classes
    assert hashes(generate(folder, layout="hmdb51", **TINY)) == whole


# ---- interrupted, resumed, refused

SCRIPT = "import json, sys; from mbd import miniactions as m; m.generate(sys.argv[1], **json.loads(sys.argv[2]))"
KNOBS = dict(classes=("SameHand", "OtherHand"), train_groups=30, test_groups=10, clips=3, frames=40, size=32)
TOTAL = 2 * 40 * 3


def begin(folder, **knobs):
    "Start a generation in a session of its own and return once some videos are there."
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder), json.dumps(knobs)], start_new_session=True, env={**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 60
    while len(videos(folder)) < 4:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(.005)
    return process


def end(process):
    try: os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError: pass
    process.wait()


@needs_groups
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kill_9_in_the_middle_then_again_gives_the_same_set(tiny, tmp_path, layout):
    folder = tmp_path / "a"
    end(begin(folder, layout=layout, workers=1, **TINY))
    made, whole = {p.name: p.read_bytes() for p in videos(folder)}, hashes(tiny[layout])
    assert 0 < len(made) < len(videos(tiny[layout]))
    for subset in ("train", TEST[layout]):
        with pytest.raises(FileNotFoundError): datasets.load(layout, folder, subset=subset)
    assert json.loads((folder / "miniactions.json").read_text())["status"] == "generating"
    generate(folder, layout=layout, workers=2, **TINY)
    assert hashes(folder) == whole
    assert all(p.read_bytes() == made[p.name] for p in videos(folder) if p.name in made)      # what was there was whole and kept


@needs_groups
def test_killing_only_the_parent_stops_the_workers(needs_coding, tmp_path):
    process = begin(tmp_path / "a", workers=2, **KNOBS)
    try:
        process.kill(); process.wait()
        counts = [len(videos(tmp_path / "a"))]
        while len(counts) < 4 or (len(set(counts[-4:])) > 1 and len(counts) < 30): time.sleep(1); counts.append(len(videos(tmp_path / "a")))      # each ends the video it is at, however busy the machine
        assert len(set(counts[-4:])) == 1 and counts[-1] <= counts[0] + 2 < TOTAL
    finally: end(process)


@needs_groups
def test_a_parent_that_dies_while_its_workers_start_leaves_none_working(needs_coding, tmp_path):
    script = SCRIPT.replace("; m.generate", "; import os, signal; m.time.sleep = lambda s: os.kill(os.getpid(), signal.SIGKILL); m.generate")
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "a"), json.dumps({"workers": 2, **KNOBS})], start_new_session=True, env={**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"})
    try:
        assert process.wait(60) == -signal.SIGKILL
        time.sleep(3)
        assert len(videos(tmp_path / "a")) <= 2
    finally: end(process)


def test_workers_that_start_late_leave_no_hole(needs_coding, tmp_path, monkeypatch):
    real = subprocess.Popen
    def late(*given, **more):
        process = real(*given, **more); time.sleep(1)
        return process
    monkeypatch.setattr(mini.subprocess, "Popen", late)
    folder = generate(tmp_path / "a", workers=2, **SMALL)
    for subset in ("train", "test"): assert datasets.load("ucf101", folder, subset=subset).missing == []


@pytest.mark.parametrize("workers", [0, -1, 2.5])
def test_an_odd_number_of_workers_never_makes_an_empty_set_look_whole(needs_coding, tmp_path, workers):
    try: folder = generate(tmp_path / "a", workers=workers, **SMALL)
    except (ValueError, TypeError): return
    assert len(videos(folder)) == 8


def test_a_missing_video_is_made_again(small, tmp_path):
    folder = tmp_path / "a"
    shutil.copytree(small, folder)
    whole = hashes(folder)
    videos(folder)[3].unlink()
    generate(folder, workers=2, **SMALL)
    assert hashes(folder) == whole


def test_a_complete_set_is_left_as_it_is(small):
    times = {p: p.stat().st_mtime_ns for p in videos(small)}
    generate(small, workers=2, **SMALL)
    assert times == {p: p.stat().st_mtime_ns for p in videos(small)}


def test_another_set_in_the_same_folder_is_refused(small):
    before = hashes(small)
    for change, words in [(dict(seed=5), "seed 0 there, 5 asked"), (dict(clips=2), "clips 1 there, 2 asked"), (dict(classes=("TwirlForward", "SameHand")), "classes")]:
        with pytest.raises(ValueError, match=words): generate(small, workers=2, **{**SMALL, **change})
    assert hashes(small) == before


def test_a_set_of_another_version_is_refused(small, tmp_path):
    folder = tmp_path / "a"
    shutil.copytree(small, folder)
    about = json.loads((folder / "miniactions.json").read_text())
    (folder / "miniactions.json").write_text(json.dumps({**about, "generator": "0/01234567"}))
    videos(folder)[0].unlink()      # else old and new frames would be mixed
    with pytest.raises(ValueError, match="another"): generate(folder, workers=2, **SMALL)


@pytest.mark.parametrize("text", ["", "garbage", '{"status": "complete", "spec": {"size": 3', "[]", "{}", "null", '{"spec": []}', '{"spec": null, "status": "complete"}', '{"spec": {"sise": 3}, "status": "complete"}',
                                  '{"spec": {"classes": 5}, "status": "complete"}', '{"spec": {}}'])
def test_a_damaged_description_is_refused_with_a_remedy(tmp_path, text):
    (tmp_path / "miniactions.json").write_text(text)
    with pytest.raises(ValueError, match="miniactions.json: not the description.*delete"): generate(tmp_path, **SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["miniactions.json"]


def test_a_folder_with_other_things_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="not empty"): generate(tmp_path, **SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_killed_before_the_first_worker_then_again(needs_coding, tmp_path, monkeypatch):
    for i, inner in enumerate(("_describe", "_write_atomic", "_run_workers")):
        folder = tmp_path / str(i)
        with monkeypatch.context() as m:
            def killed(*given): raise KeyboardInterrupt
            m.setattr(mini, inner, killed)
            with pytest.raises(KeyboardInterrupt): generate(folder, workers=2, **SMALL)
        assert len(videos(generate(folder, workers=2, **SMALL))) == 8


def test_a_failing_worker_is_heard_and_what_was_made_is_kept(needs_coding, tmp_path, monkeypatch):
    broken = tmp_path / "broken"; broken.mkdir()
    (broken / "av.py").write_text("raise ImportError('no codec on this machine')")
    folder = tmp_path / "a"
    with monkeypatch.context() as m:
        m.syspath_prepend(str(broken))
        with pytest.raises(RuntimeError, match="(?s)worker failed.*run again.*no codec on this machine"): generate(folder, workers=2, **SMALL)
    with pytest.raises(FileNotFoundError): datasets.load("ucf101", folder)
    assert len(videos(generate(folder, workers=2, **SMALL))) == 8


def test_stopping_by_hand_ends_the_workers(needs_coding, tmp_path):
    def stop(done, total):
        if done: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): generate(tmp_path / "a", workers=2, progress=stop, **KNOBS)
    count = len(videos(tmp_path / "a")); time.sleep(1)
    assert count == len(videos(tmp_path / "a")) < TOTAL


if __name__ == "__main__":
    kept = json.loads(REFERENCE.read_text()) if REFERENCE.exists() else {}
    kept[str(mini.VERSION)] = {name: coarse(render(Spec(), name, 1, 1)) for name in CLASSES}
    REFERENCE.write_text(json.dumps(kept, separators=(",", ":")) + "\n")


def test_lists_that_another_process_has_just_put_there_are_taken(tmp_path, monkeypatch):
    "Two runs that make the same set end at the same moment."
    texts, replace = {"a.txt": "one\n", "b.txt": "two\n"}, os.replace
    def late(source, target):
        if Path(target).name == "lists" and not Path(target).exists():
            Path(target).mkdir(); [(Path(target) / n).write_text(t) for n, t in texts.items()]
        return replace(source, target)
    monkeypatch.setattr(os, "replace", late)
    mini._write_lists(tmp_path / "lists", texts)
    assert {f.name: f.read_text() for f in (tmp_path / "lists").iterdir()} == texts and [p.name for p in tmp_path.iterdir()] == ["lists"]
