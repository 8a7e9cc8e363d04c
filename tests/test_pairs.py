import re
from dataclasses import replace
import pytest, torch, torch.nn as nn
from safetensors.torch import save_file
from mbd import pairs as pairs_module
from mbd.clips import GLOBAL_VIEW, LOCAL_VIEW, View
from mbd.local_stream import BACKBONES, LocalStream, StreamOutput, build_stream, register, stream_view
from mbd.pairs import PAIRS, UNEQUAL, Cost, Pair, Side, compared, count_cost, find_pair, flag, make_streams, map_refused, pairs_table, solo, step_time, stream_cost, table

ALL = [pair for pairs in PAIRS.values() for pair in pairs.values()]


@pytest.fixture
def own():
    "Names that a test registers are forgotten after it."
    before = dict(BACKBONES)
    yield
    BACKBONES.clear(); BACKBONES.update(before); pairs_module._count.cache_clear()


def rows(text): return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if line.startswith("| ") and not line.startswith("| pair ") and not line.startswith("| local ")]


# ---- cost

def test_operations_of_the_hand_built_cnn_by_the_formula():
    widths, kernels, size, macs, before = (16, 24, 48, 64), (3, 1, 3, 3), 56, 0, 3
    for n, (width, kernel) in enumerate(zip(widths, kernels)):
        size = size if n == 3 else -(-size // 2)
        macs += before * kernel * 9 * width * 16 * size * size; before = width
    cost = stream_cost("hand_cnn")
    assert cost.gflops == pytest.approx(2 * (macs + 64 * 10) / 1e9, rel=1e-9) and cost.parameters == sum(p.numel() for p in LocalStream(10).parameters())


@pytest.mark.parametrize("name, frames", [("r3d_18", 16), ("mc3_18", 16), ("r2plus1d_18", 16), ("s3d", 16), ("swin3d_t", 16), *(pytest.param(name, 16, marks=pytest.mark.slow) for name in ("swin3d_s", "swin3d_b", "mvit_v2_s"))])
def test_measured_operations_are_twice_what_torchvision_publishes_on_16_frames(name, frames):
    models = pytest.importorskip("torchvision.models")
    meta = models.get_model_weights(name)["KINETICS400_V1"].meta
    view = stream_view(name, "kinetics400")
    cost = stream_cost(name, replace(view, frames=frames), "kinetics400")
    assert cost.gflops == pytest.approx(2 * meta["_ops"], rel=1e-4) and cost.parameters == meta["num_params"]
    full = stream_cost(name, weights="kinetics400").gflops / (2 * meta["_ops"])
    assert full == pytest.approx({"s3d": 8, "swin3d_t": 2, "swin3d_s": 2, "swin3d_b": 2}.get(name, 1), rel=1e-3)


def test_attention_is_counted():
    "Joint attention costs two products of N x N x D a block; doubling the frames doubles the rest and quadruples it."
    once, twice = (stream_cost("hand_transformer", replace(GLOBAL_VIEW, frames=frames), frames=frames).gflops for frames in (8, 16))
    attention = 3 * 2 * 2 * 72 * 72 * 96 / 1e9
    assert twice - 2 * once == pytest.approx(2 * attention, rel=.01)


def test_classes_and_options_count():
    assert stream_cost("hand_cnn", num_classes=101).parameters - stream_cost("hand_cnn", num_classes=10).parameters == 91 * 65
    assert stream_cost("hand_cnn", widths=[8, 8], temporal_kernels=[3, 3]).parameters == sum(p.numel() for p in LocalStream(10, (8, 8), (3, 3)).parameters())
    with pytest.raises(ValueError, match="did you mean 'hand_cnn'"): stream_cost("hand_cn")
    with pytest.raises(ValueError, match="no weights"): stream_cost("hand_cnn", weights="kinetics400")


@pytest.mark.parametrize("training", [True, False])
def test_a_stream_that_exists_is_counted_as_it_is(training):
    stream = build_stream("hand_transformer", 10).train(training)
    before = {name: value.clone() for name, value in stream.state_dict().items()}
    assert count_cost(stream, 3, GLOBAL_VIEW.frames, GLOBAL_VIEW.size, GLOBAL_VIEW.size) == stream_cost("hand_transformer")
    assert stream.training is training and all(torch.equal(value, before[name]) for name, value in stream.state_dict().items())
    assert count_cost(nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 2)).train(training), 7) == Cost(8 * 5 + 6 * 2, 2 * (35 + 10) / 1e9)


def test_a_large_network_is_measured_without_its_memory():
    import resource
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pairs_module._count.cache_clear()
    cost = stream_cost("hand_transformer", width=8192, heads=4, depth=8)      # 16 GB of parameters
    assert cost.parameters * 4 > 16e9 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000      # KiB


def test_a_network_that_cannot_live_without_memory_is_run(own):
    @register("counting", "local", View(4, 1, 8))
    class Counting(nn.Module):
        def __init__(self, num_classes):
            super().__init__()
            self.rate, self.head = torch.linspace(0, 1, 3)[1].item(), nn.Linear(3, num_classes)
        def forward(self, x): return StreamOutput(self.head(x.mean((2, 3, 4))), x, {})
    assert stream_cost("counting").gflops == pytest.approx(2 * 3 * 10 / 1e9)


# ---- the table

def test_a_cell_that_is_run_again_is_counted_anew(own):
    def cell(width): register("mine", "local", View(4, 1, 8))(lambda num_classes: LocalStream(num_classes, (width,), (3,)))
    cell(8); few = stream_cost("mine")
    cell(64); assert stream_cost("mine").parameters > 4*few.parameters


def test_a_run_can_use_a_network_that_cannot_live_without_memory(own):
    @register("counting", "local", View(4, 1, 8))
    class Counting(LocalStream):
        def __init__(self, num_classes): super().__init__(num_classes, (4,), (3,)); self.count = float(torch.ones(3).sum().item())
    assert make_streams(Pair("miniactions", "own", Side("counting"), Side("hand_transformer"), ""), 3)[0].count == 3.


def test_every_data_set_has_a_default_and_it_comes_first():
    assert list(PAIRS) == ["ucf101", "hmdb51", "kinetics400", "ssv2", "miniactions"]
    for name, pairs in PAIRS.items():
        assert find_pair(name) is next(iter(pairs.values())) and [pair.default for pair in pairs.values()].count(True) == 1
        assert all(pair.dataset == name and pair.name == key and len(pair.about) > 20 for key, pair in pairs.items()) and "hand" in pairs


def test_each_side_stands_on_its_side():
    for pair in ALL:
        assert BACKBONES[pair.local.backbone].kind in ("local", "either") and BACKBONES[pair.global_.backbone].kind in ("global", "either")
        assert "shared" not in (pair.local.view.sampling, pair.global_.view.sampling)


@pytest.mark.parametrize("name, frames, size", [pytest.param(*key, marks=[pytest.mark.slow] * (key[0] not in ("hand_cnn", "hand_transformer", "long_cnn", "window_transformer", "r2plus1d_18"))) for key in sorted({pairs_module._key(side) for pair in ALL for side in (pair.local, pair.global_)})])
def test_each_stream_takes_the_view_of_its_pair(name, frames, size):
    with torch.device("meta"): assert BACKBONES[name].build(7).eval()(torch.empty(1, 3, frames, size, size)).logits.shape == (1, 7)


def test_numbers_without_a_source_are_not_printed():
    for pair in ALL:
        for side in (pair.local, pair.global_):
            assert (side.top1 is None) == (side.source == "")
            if side.weights and side.trained.top1 is not None: assert side.trained.source
    for pair in PAIRS["ucf101"].values(): assert solo(pair) == (None, None)      # nobody has tuned these very networks here and published it


def test_numbers_of_weights_are_torchvisions():
    models = pytest.importorskip("torchvision.models")
    for pair in ALL:
        for side in (pair.local, pair.global_):
            if side.weights and side.weights.startswith("kinetics400"):
                meta = models.get_model_weights(side.backbone)[{"kinetics400": "KINETICS400_V1", "kinetics400_imagenet22k": "KINETICS400_IMAGENET22K_V1"}[side.weights]].meta
                assert side.trained.top1 == pytest.approx(meta["_metrics"]["Kinetics-400"]["acc@1"], abs=.01)


def test_unequal_is_said_of_two_numbers_on_one_list():
    cnn, transformer = Side("r2plus1d_18", "kinetics400"), Side("swin3d_t", "kinetics400")
    pair = Pair("hmdb51", "x", cnn, transformer, "")
    assert compared(pair) == (67.463, 77.715, "kinetics400") and flag(pair) == "unequal" and solo(pair) == (None, None)
    assert solo(replace(pair, dataset="kinetics400")) == (67.463, 77.715)
    tuned = replace(pair, local=replace(cnn, top1=70.), global_=replace(transformer, top1=70. + UNEQUAL))
    assert compared(tuned) == (70., 75., "hmdb51") and flag(tuned) == "equal"
    assert flag(replace(tuned, local=replace(cnn, top1=80.1))) == "unequal"                  # in either direction
    half = replace(pair, local=replace(cnn, top1=70.))
    assert solo(half) == (70., None) and compared(half)[2] == "kinetics400"                    # one number here and one there are not compared
    assert flag(replace(pair, local=Side("r2plus1d_18"))) == flag(replace(pair, global_=Side("timesformer_s16", "imagenet21k"))) == "?"


def test_two_lists_of_images_are_no_comparison():
    "Swin has seen images before Kinetics; top-1 is of Kinetics, and images alone make nothing comparable."
    pair = Pair("ucf101", "x", Side("swin3d_t", "kinetics400"), Side("timesformer_s16", "imagenet21k"), "")
    assert compared(pair) is None


def test_every_pair_of_torchvisions_weights_is_flagged():
    for pair in ALL:
        if pair.local.weights and (pair.global_.weights or "").startswith("kinetics400"): assert flag(pair) == "unequal", pair
    assert flag(find_pair("miniactions", "hand")) == "equal" and flag(find_pair("miniactions", "swapped")) == "?"


def test_a_map_on_the_training_list_is_refused_where_it_was_seen():
    assert {pair.name: map_refused(pair) for pair in PAIRS["kinetics400"].values()} == {"pretrained": True, "fewer_frames": True, "unseen": False, "hand": False}
    assert not any(map_refused(pair) for pair in ALL if pair.dataset != "kinetics400")
    only_one = Pair("kinetics400", "x", Side("hand_cnn"), Side("swin3d_t", "kinetics400"), "")
    assert map_refused(only_one)


def test_the_swapped_pair_exchanges_architectures_and_keeps_the_reach():
    from mbd.local_stream import receptive_field
    hand, swapped = find_pair("miniactions", "hand"), find_pair("miniactions", "swapped")
    assert swapped.local.backbone == "window_transformer" and swapped.global_.backbone == "long_cnn"
    assert (swapped.local.view, swapped.global_.view) == (hand.local.view, hand.global_.view) == (LOCAL_VIEW, GLOBAL_VIEW)
    fields = {name: receptive_field(build_stream(name, 10), 1) for name in ("hand_cnn", "window_transformer", "long_cnn")}
    assert fields["hand_cnn"] == fields["window_transformer"] and fields["long_cnn"][0] >= 2 * 8 - 1


def test_ssv2_spreads_the_global_frames_and_keeps_the_local_ones_together():
    for pair in PAIRS["ssv2"].values(): assert (pair.local.view.sampling, pair.global_.view.sampling) == ("dense", "segments")


@pytest.mark.parametrize("asked, problem", [(("ucf11",), "did you mean 'ucf101'"), (("mini",), "valid: ucf101, hmdb51"), (("miniactions", "swaped"), "did you mean 'swapped'"), (("hmdb51", "hands"), "hmdb51 has no pair 'hands'; did you mean 'hand'")])
def test_a_wrong_name_is_answered_with_the_right_one(asked, problem):
    with pytest.raises(ValueError, match=re.escape(problem)): find_pair(*asked)


def test_the_table_says_what_the_pairs_say(monkeypatch):
    assert "| 0.23 / 0.08 | 0.1 / 0.3 |" in table("miniactions")
    monkeypatch.setattr(pairs_module, "stream_cost", lambda name, *given: Cost(31_505_325, {"r2plus1d_18": 81.04}.get(name, .5)))
    for dataset, pairs in PAIRS.items():
        text = table(dataset)
        found = {row[0].removesuffix(" (default)"): row for row in rows(text)}
        assert set(found) == set(pairs) and f"| {find_pair(dataset).name} (default) |" in text
        for name, pair in pairs.items():
            row = found[name]
            assert row[1].startswith(pair.local.backbone) and row[2].startswith(pair.global_.backbone) and f"- *{name}*: {pair.about}." in text
            assert row[3] == " / ".join("?" if value is None else f"{value:.1f}" for value in solo(pair)) and row[-1] == ("refused" if map_refused(pair) else "allowed")
            assert ("**unequal**" in row[4], row[4] == "?") == (flag(pair) == "unequal", flag(pair) == "?") and row[5] == f"{pair.local.view.frames} / {pair.global_.view.frames}"
    assert "| 81 / 0.50 | 31.5 / 31.5 |" in table("ucf101") and "PySlowFast" in table("ssv2")
    assert all(f"**{name}**" in table() for name in PAIRS)
    with pytest.raises(ValueError, match="did you mean 'ssv2'"): table("ssv3")


# ---- from a pair to two streams

def test_streams_of_a_pair():
    local, global_, *views = make_streams(find_pair("miniactions", "swapped"), 6)
    assert (local.backbone, global_.backbone, *views) == ("window_transformer", "long_cnn", LOCAL_VIEW, GLOBAL_VIEW)
    for stream, view in zip((local, global_), views): assert stream(torch.zeros(1, 3, view.frames, view.size, view.size)).logits.shape == (1, 6)


def test_views_of_ones_own():
    mine = View(12, 3, 28), View(10, 2, 20)
    local, global_, *views = make_streams(find_pair("ucf101", "hand"), 4, local_view=mine[0], global_view=mine[1])
    assert views == list(mine) and global_.config["frames"] == 10
    assert local(torch.zeros(1, 3, 12, 28, 28)).logits.shape == global_(torch.zeros(1, 3, 10, 20, 20)).logits.shape == (1, 4)


def test_weights_from_files(tmp_path, own):
    pair = find_pair("miniactions")
    source = build_stream("hand_cnn", 5)
    save_file(source.state_dict(), str(tmp_path / "local.safetensors"))
    local, global_, *_ = make_streams(pair, 5, files={"local": tmp_path / "local.safetensors"})
    assert torch.equal(local.head.weight, source.head.weight) and local.seen == {"not stated"} and global_.seen == frozenset()
    with pytest.raises(FileNotFoundError, match="nowhere"): make_streams(pair, 5, files={"global": tmp_path / "nowhere.pth"})
    with pytest.raises(ValueError, match="'globl' is no stream; did you mean 'global'"): make_streams(pair, 5, files={"globl": "x"})


def test_pretrained_weights_from_a_file_keep_what_they_have_seen(tmp_path):
    torch.save(BACKBONES["mc3_18"].build(400).net.state_dict(), tmp_path / "mc3.pth")
    pair = Pair("ucf101", "x", Side("mc3_18", "kinetics400"), Side("hand_transformer"), "")
    local, _, view, _ = make_streams(pair, 101, files={"local": tmp_path / "mc3.pth"})
    assert local.seen == {"kinetics400/train"} and local.config["num_classes"] == 101 and view == stream_view("mc3_18", "kinetics400")


# ---- time

def test_time_of_a_step():
    seconds = step_time(find_pair("miniactions"), batch_size=2, rounds=3)
    assert list(seconds) == ["local", "global"] and all(len(s) == 3 and min(s) > 0 for s in seconds.values())
    for wrong in (dict(batch_size=1), dict(rounds=0)):
        with pytest.raises(ValueError, match="batch_size must be at least 2 and rounds at least 1"): step_time(find_pair("miniactions"), **wrong)
        with pytest.raises(ValueError, match="batch_size must be at least 2 and rounds at least 1"): pairs_table(**wrong)


def test_a_step_trains(monkeypatch):
    "Forward, backward and AdamW really happen, and in training mode."
    steps, modes = [], []
    real = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *given: (steps.append([p.grad is not None for group in self.param_groups for p in group["params"]]), real(self, *given)))
    forward = LocalStream.forward
    monkeypatch.setattr(LocalStream, "forward", lambda self, x: (modes.append((self.training, tuple(x.shape))), forward(self, x))[1])
    step_time(find_pair("miniactions"), batch_size=3, rounds=2)
    assert len(steps) == 2 * 3 and all(map(all, steps)) and modes == [(True, (3, 3, 16, 56, 56))] * 3


def few(monkeypatch, fail=None, calls=None, error=None):
    def step(side, batch_size, device, rounds):
        if calls is not None: calls.append(side.backbone)
        if side.backbone == fail: raise error or KeyboardInterrupt
        return [(.2, .3), (.1, .31), (.4, .3)]
    monkeypatch.setattr(pairs_module, "_step", step)
    monkeypatch.setattr(pairs_module, "stream_cost", lambda name, view: Cost(1, 500. if name == "swin3d_b" else view.size * view.frames / 1e3))


def test_the_report_has_each_pair_once_and_measures_each_stream_once(monkeypatch, tmp_path):
    calls, seen = [], []
    few(monkeypatch, calls=calls)
    text = pairs_table(tmp_path / "deep" / "pairs.md", progress=lambda *given: seen.append(given), command="mbd bench pairs --rounds 3")
    assert (tmp_path / "deep" / "pairs.md").read_text() == text and "Unfinished" not in text and "`mbd bench pairs --rounds 3`" in text and not list((tmp_path / "deep").glob("*.part"))
    assert all(text.count(f"{pair.dataset} {pair.name}") >= 1 for pair in ALL) and len(calls) == len(set(calls)) and seen == [(n, len(calls)) for n in range(1, len(calls) + 1)]
    found = rows(text)
    work = [sum(map(float, row[2].split(" / "))) for row in found]
    assert work == sorted(work) and {tuple(row[3:7]) for row in found} == {("0.2 [0.1, 0.4]; 0.3 CPU", "0.2 [0.1, 0.4]; 0.3 CPU", "0.4", "5")}


def test_a_stop_loses_nothing(monkeypatch, tmp_path):
    few(monkeypatch, fail="swin3d_t")
    with pytest.raises(KeyboardInterrupt): pairs_table(tmp_path / "pairs.md")
    text = (tmp_path / "pairs.md").read_text()
    assert "miniactions hand" in text and 4 <= len(rows(text)) and f"Unfinished: {len(rows(text))} of " in text
    few(monkeypatch, fail="hand_cnn")
    with pytest.raises(KeyboardInterrupt): pairs_table(tmp_path / "first.md")
    assert "Unfinished: 0 of " in (tmp_path / "first.md").read_text()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")])
def test_what_does_not_fit_is_said_and_the_rest_goes_on(monkeypatch, error):
    few(monkeypatch, fail="swin3d_b", error=error)
    row = next(row for row in rows(pairs_table(datasets=["ucf101"])) if row[1].startswith("swin3d_b"))
    assert row[3:7] == ["0.2 [0.1, 0.4]; 0.3 CPU", "out of memory", "-", "-"]
    assert all(row[5] == "0.4" for row in rows(pairs_table(datasets=["ucf101"])) if not row[1].startswith("swin3d_b"))
    few(monkeypatch, fail="swin3d_b", error=RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"): pairs_table(datasets=["ucf101"])


def test_a_wrong_data_set_is_found_before_anything_is_measured(monkeypatch):
    calls = []
    few(monkeypatch, calls=calls)
    with pytest.raises(ValueError, match="no pairs for data set 'ucf11'"): pairs_table(datasets=["miniactions", "ucf11"])
    assert not calls


# ---- the simulation of the chapter, with other seeds

@pytest.mark.parametrize("seed", [11, 12])
def test_a_stronger_stream_owns_the_map_by_absolute_share_and_not_by_relative(seed):
    from mbd import dominance
    lean, labels = torch.linspace(-.4, .4, 20), torch.arange(20).repeat_interleave(120)
    draw, own = torch.Generator().manual_seed(seed), torch.nn.functional.one_hot(labels, 20)
    pair = [(a + sign * lean[labels])[:, None] * own + torch.randn(2400, 20, generator=draw) for a, sign in ((2.4, 1), (2.9, -1))]
    m = dominance.measure(*(z / dominance.fit_temperature(z, labels) for z in pair), labels, [f"{i // 12}" for i in range(2400)], list(map(str, range(20))), resamples=200)
    absolute = dominance.groups(m.low, m.high, .5)
    assert absolute.count("local") <= 2 and absolute.count("global") >= 12 and min(m.group.count("local"), m.group.count("global")) >= 3
