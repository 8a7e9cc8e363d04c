import itertools
import pytest, torch
from mbd.global_stream import Block, FrameStem, GlobalStream
from mbd.local_stream import LONG, ConvStage, LocalStream, gradient_field, long_cnn, receptive_field


def local(seed=0, classes=5, **config):
    torch.manual_seed(seed)
    return spread(LocalStream(classes, **config)).eval()


def global_(seed=0, **config):
    torch.manual_seed(seed)
    return spread(GlobalStream(5, **{**dict(frames=6, width=24, depth=2, heads=3), **config})).eval()


def spread(stream):
    "Batch norms as after some training, not as they begin."
    for m in stream.modules():
        if isinstance(m, torch.nn.modules.batchnorm._BatchNorm): m.running_mean.normal_(0, .1); m.running_var.uniform_(.05, .2); m.bias.data.normal_(.1, .1)
    return stream


def clip(batch=2, frames=8, size=32, seed=0): return torch.randn(batch, 3, frames, size, size, generator=torch.Generator().manual_seed(seed))


# ---- what both return

@pytest.mark.parametrize("stream, x, names, shapes", [
    (local(), clip(), ["stage1", "stage2", "stage3", "stage4"], [(2, 16, 8, 16, 16), (2, 24, 8, 8, 8), (2, 48, 8, 4, 4), (2, 64, 8, 4, 4)]),
    (local(widths=(4, 6), temporal_kernels=(1, 3)), clip(1, 3, 20), ["stage1", "stage2"], [(1, 4, 3, 10, 10), (1, 6, 3, 10, 10)]),
    (local(widths=(4, 6), temporal_kernels=(3, 5), strides=(1, 2), dilations=(2, 3)), clip(1, 3, 20), ["stage1", "stage2"], [(1, 4, 3, 20, 20), (1, 6, 3, 10, 10)]),
    (local(**LONG), clip(2, 8, 28), [f"stage{i}" for i in range(1, 6)], [(2, 16, 8, 14, 14), (2, 24, 8, 7, 7), (2, 48, 8, 4, 4), (2, 64, 8, 4, 4), (2, 64, 8, 4, 4)]),
    (global_(), clip(frames=6, size=28), ["stem", "block1", "block2"], [(2, 24, 6, 3, 3)] * 3),
    (global_(grid=2, frames=3, depth=1), clip(1, 3, 16), ["stem", "block1"], [(1, 24, 3, 2, 2)] * 2),
])
def test_shapes(stream, x, names, shapes):
    out = stream(x)
    assert list(out.stages) == names and [tuple(m.shape) for m in out.stages.values()] == shapes
    assert out.logits.shape == (len(x), 5) and torch.allclose(stream.head(out.embedding), out.logits, atol=1e-6)


@pytest.mark.parametrize("stream, x", [(local(), clip(4)), (global_(), clip(4, 6))])
def test_the_answer_to_a_video_does_not_depend_on_the_others_of_its_batch(stream, x):
    with torch.no_grad(): assert torch.allclose(stream(x).logits[1:2], stream(x[1:2]).logits, atol=1e-5)


@pytest.mark.parametrize("stream, x", [(local(), clip(4)), (global_(), clip(4, 6))])
def test_every_parameter_learns(stream, x):
    stream.train()(x).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in stream.named_parameters() if n != "head.bias")
    stream.zero_grad()


@pytest.mark.parametrize("stream, x", [(local(), clip(2, 8, 33)), (global_(), clip(2, 6, 33)), (global_(), clip(2, 6, 8)), (local(), clip(1, 1, 8))])
def test_odd_and_small_pictures(stream, x): assert torch.isfinite(stream(x).logits).all()


def test_config_builds_the_same_stream_again():
    for stream in (local(widths=(4, 6), temporal_kernels=(3, 1)), local(widths=[4, 6], temporal_kernels=[3, 1], strides=[1, 2], dilations=[1, 2]), global_()):
        again = type(stream)(**stream.config)
        again.load_state_dict(stream.state_dict())
        x = clip(frames=6)
        assert torch.equal(again.eval()(x).logits, stream(x).logits)


@pytest.mark.parametrize("make, words", [
    (lambda: ConvStage(3, 4, 2), "temporal_kernel must be odd, not 2"), (lambda: LocalStream(5, (4, 6), (3,)), "2 stages, temporal_kernels 1"),
    (lambda: LocalStream(5, (4, 6), (3, 3), strides=(2,)), "2 stages, strides 1"), (lambda: long_cnn(5, dilations=(1, 2)), "5 stages, dilations 2"), (lambda: local()(clip()[0]), r"expected a clip \(B, 3, T, H, W\), got \(3, 8, 32, 32\)"),
    (lambda: local()(clip().transpose(1, 2)), r"got \(2, 8, 3, 32, 32\)"), (lambda: GlobalStream(5, width=10, heads=4), r"heads \(4\) must divide width \(10\)"), (lambda: global_()(clip(frames=8)), r"expected a clip \(B, 3, 6, H, W\), got \(2, 3, 8, 32, 32\)"),
    (lambda: global_()(clip(frames=6)[:, :1]), r"got \(2, 1, 6, 32, 32\)"),
])
def test_clear_errors(make, words):
    with pytest.raises(ValueError, match=words): make()


# ---- the local stream is local

CONFIGS = [dict(), dict(widths=(4, 6), temporal_kernels=(3, 3)), dict(widths=(4, 6, 8), temporal_kernels=(1, 5, 1)), dict(widths=(6,), temporal_kernels=(7,)), dict(widths=(4, 4, 4), temporal_kernels=(1, 1, 1)),
           dict(widths=(4, 6, 6), temporal_kernels=(3, 1, 5), strides=(1, 2, 1), dilations=(2, 1, 3)), LONG]


@pytest.mark.parametrize("config", CONFIGS)
def test_the_field_is_what_the_gradient_measures(config):
    stream = local(**config)
    frames, pixels = receptive_field(stream)
    touched = torch.zeros(frames + 6, pixels + 34, dtype=torch.bool)
    for seed in range(3):
        x = clip(1, frames + 6, pixels + 34, seed).requires_grad_()
        last = list(stream(x).stages.values())[-1]
        last[0, :, last.shape[2] // 2, last.shape[3] // 2, last.shape[4] // 2].sum().backward()
        touched |= (x.grad[0] != 0).any(0).any(-1)
    rows, columns = touched.any(1).nonzero().flatten(), touched.any(0).nonzero().flatten()
    assert (int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1) == (frames, pixels)


def test_the_field_in_frames_of_the_video():
    stream = local()
    assert receptive_field(stream) == (7, 31) and receptive_field(stream, 2) == (13, 31) and receptive_field(stream, view_stride=4)[0] == 25


def test_the_answer_is_the_mean_of_the_votes_of_all_moments():
    stream, x = local(), clip(frames=10)
    with torch.no_grad():
        out = stream(x)
        votes = stream.head(out.stages["stage4"].amax((3, 4)).transpose(1, 2))
    assert votes.shape == (2, 10, 5) and torch.allclose(votes.mean(1), out.logits, atol=1e-5) and votes.std(1).min() > 1e-4


def story(order, length=8, quiet=9, size=32):
    "Two events in the given order, with still frames before, between and after."
    events = torch.randn(2, 3, length, size, size, generator=torch.Generator().manual_seed(1))
    still = torch.zeros(3, quiet, size, size)
    return torch.cat([still, *itertools.chain.from_iterable((events[i], still) for i in order)], 1)[None]


def test_the_order_of_events_further_apart_than_the_field_is_invisible_to_the_local_stream_and_not_to_the_global():
    stream = local()
    ab, ba = story((0, 1)), story((1, 0))
    assert receptive_field(stream)[0] < 9
    with torch.no_grad():
        answers = [stream(x).logits for x in (ab, ba, story((0, 0)))]
        assert torch.allclose(answers[0], answers[1], atol=1e-5) and not torch.allclose(answers[0], answers[2], atol=1e-3)
        nearer = [stream(story(order, quiet=2)).logits for order in ((0, 1), (1, 0))]
        assert not torch.allclose(*nearer, atol=1e-4)      # within the field it is seen
        whole = global_(frames=ab.shape[2])
        assert not torch.allclose(whole(ab).logits, whole(ba).logits, atol=1e-3)


@pytest.mark.parametrize("training", [False, True])
def test_a_still_video_looks_the_same_at_all_moments(training):
    stream = local().train(training)
    with torch.no_grad(): maps = stream(clip(3, 1).repeat(1, 1, 9, 1, 1)).stages
    for name, m in maps.items(): assert torch.allclose(m, m[:, :, :1].expand_as(m), atol=1e-5), name


# ---- the long CNN sees everything

def test_every_position_of_the_long_cnn_sees_every_frame_and_every_pixel():
    stream = spread(long_cnn(5)).eval()
    last = stream(clip(1, 8, 28)).stages["stage5"].shape[2:]
    assert receptive_field(stream) == (15, 63) and 15 >= 2*7 + 1 and 63 >= 2*27 + 1 and last == (8, 4, 4)
    for position in itertools.product((0, 4, 7), (0, 3), (0, 1, 3)):
        seen = sum(gradient_field(stream, clip(1, 8, 28, seed)[0], position=position) for seed in range(3))
        assert (seen > 0).all(), position


def test_the_hand_built_one_does_not_and_the_order_of_far_events_reaches_the_long_one_only():
    short, long = local(), spread(long_cnn(5)).eval()
    events = torch.randn(2, 3, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    still = torch.zeros(3, 1, 28, 28)
    def story(first, last): return torch.cat([events[first], *[still]*6, events[last]], 1)[None]      # the first and the last of 8 frames
    assert (gradient_field(short, story(0, 1)[0], position=(0, 1, 1)).sum((1, 2)) > 0).tolist() == [True]*4 + [False]*4
    with torch.no_grad():
        assert not torch.allclose(long(story(0, 1)).stages["stage5"][:, :, 3], long(story(0, 0)).stages["stage5"][:, :, 3], atol=1e-4)
        assert not torch.allclose(long(story(0, 1)).logits, long(story(1, 0)).logits, atol=1e-4)


# ---- the global stream is global

def test_every_frame_and_every_place_reaches_the_answer_and_every_token():
    stream = global_()
    x = clip(1, 6, 24).requires_grad_()
    out = stream(x)
    seen, = torch.autograd.grad(out.logits.square().sum(), x, retain_graph=True)
    assert (seen.abs().sum((0, 1, 3, 4)) > 0).all()
    cells = seen.abs().sum((0, 1, 2)).unflatten(0, (3, 8)).unflatten(2, (3, 8)).sum((1, 3))
    assert (cells > 0).all()
    token, = torch.autograd.grad(out.stages["block1"][0, :, 0, 0, 0].square().sum(), x)
    assert (token.abs().sum((0, 1, 3, 4)) > 0).all()      # after one block already


def test_the_stem_looks_at_each_frame_alone():
    stem = FrameStem(12).eval()
    x = clip(2, 5)
    with torch.no_grad(): assert torch.allclose(stem(x)[:, :, 3:4], stem(x[:, :, 3:4]), atol=1e-6) and stem(x).shape == (2, 12, 5, 3, 3)


def test_the_order_of_frames_counts():
    stream, x = global_(), clip(frames=6)
    with torch.no_grad(): assert not torch.allclose(stream(x).logits, stream(x.flip(2)).logits, atol=1e-4)


def test_attention_of_a_block_is_a_mean_over_all_tokens():
    block, x = Block(12, 3).eval(), torch.randn(2, 7, 12)
    q, k, v = block.queries_keys_values(x)
    assert q.shape == k.shape == v.shape == (2, 3, 7, 4)
    with torch.no_grad():
        mixed = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
        by_hand = x + block.out(mixed.transpose(1, 2).flatten(2))
        assert torch.allclose(block(x), by_hand + block.mlp(block.norm2(by_hand)), atol=1e-5)
        turned = torch.randperm(7, generator=torch.Generator().manual_seed(0))
        assert torch.allclose(block(x)[:, turned], block(x[:, turned]), atol=1e-5)
