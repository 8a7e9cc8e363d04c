import inspect, json
import pytest, torch
from torch.nn import functional as F
from mbd.clips import GLOBAL_VIEW, LOCAL_VIEW
from mbd.global_stream import DividedStream, GlobalStream, MultiscaleStream, ShiftedWindowStream, TimeAttention, WindowBlock, WindowStream, attention, attention_distance, attention_weights
from mbd.local_stream import BACKBONES, LocalStream, build_stream, find_backbone, gradient_field, receptive_field, stream_view

timm = pytest.importorskip("timm")
models = pytest.importorskip("torchvision.models.video")
TORCHVISION = ["mvit_v2_s", "swin3d_t", "swin3d_s", "swin3d_b"]


def noise(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clip(batch=2, frames=4, size=32, seed=0): return noise(batch, 3, frames, size, size, seed=seed)


def strong(net, seed=0):
    "Parameters as large as after training, so that nothing hides behind a small one."
    g = torch.Generator().manual_seed(seed)
    for p in net.parameters(): p.data.add_(torch.randn(p.shape, generator=g) * (.3 / max(p.shape[-1], 1)**.5 if p.ndim > 1 else .1))
    return net


def same(a, b, tolerance=1e-5): return torch.allclose(a, b, atol=tolerance, rtol=tolerance)


def average_of_frames(vit, x): return torch.stack([vit(x[:, :, t]) for t in range(x.shape[2])]).mean(0)


def meta(make):
    "Shapes without numbers: large networks in a moment."
    with torch.device("meta"): return make()


def gradients(stream, x, seed=0):
    stream.zero_grad()
    torch.manual_seed(seed)
    stream(x).logits.logsumexp(1).sum().backward()
    return {name: p.grad.clone() for name, p in stream.named_parameters() if p.grad is not None}


# ---- attention

@pytest.mark.parametrize("masked", [False, True])
def test_fused_and_plain_attention_are_one_and_weights_are_their_rows(masked):
    q, k, v = noise(2, 3, 5, 4), noise(2, 3, 7, 4, seed=1), noise(2, 3, 7, 4, seed=2)
    mask = torch.zeros(5, 7).masked_fill(torch.rand(5, 7, generator=torch.Generator().manual_seed(3)) < .4, -torch.inf).index_fill(1, torch.tensor([0]), 0.) if masked else None
    weights = attention_weights(q, k, mask)
    assert same(weights.sum(-1), torch.ones(2, 3, 5)) and (mask is None or (weights[..., mask.isinf()] == 0).all())
    assert same(attention(q, k, v, True, mask), attention(q, k, v, False, mask)) and same(attention(q, k, v, False, mask), weights @ v)
    assert same(weights[0, 1, 2], ((q[0, 1, 2] @ k[0, 1].T) / 2 + (0 if mask is None else mask[2])).softmax(0))


def test_distance_of_attention():
    places = torch.tensor([[0., 0.], [3., 4.], [0., 8.]])
    assert attention_distance(torch.eye(3), places) == 0
    assert attention_distance(torch.tensor([[0., 1, 0], [1, 0, 0], [1, 0, 0]]), places) == pytest.approx((5 + 5 + 8) / 3)
    assert attention_distance(torch.full((2, 4, 3, 3), 1/3), places).shape == (2, 4)


# ---- divided attention

VITS = {"class token": dict(vit="test_vit"), "registers, average": dict(vit="test_vit2"), "attention pooling": dict(vit="test_vit3"), "rms norms": dict(vit="test_vit4"),
        "ViT-S/16": dict(vit="vit_small_patch16_224", depth=2), "before the blocks a norm": dict(vit="vit_xsmall_patch16_clip_224", depth=1),
        "class token and registers": dict(vit="vit_small_patch14_reg4_dinov2", depth=2, size=28)}


@pytest.mark.parametrize("name, fused", [*((name, True) for name in VITS), ("class token", False), ("registers, average", False)])
def test_at_the_start_it_is_the_image_transformer_averaged_over_frames(name, fused):
    options = {**dict(size=32), **VITS[name]}
    x = clip(size=options["size"])
    vit = strong(timm.create_model(options["vit"], num_classes=5, img_size=options["size"], **{k: v for k, v in options.items() if k == "depth"})).eval()
    stream = DividedStream(5, frames=4, fused=fused, **options).eval()
    stream.net.load_state_dict(vit.state_dict())
    with torch.no_grad(): out, expected = stream(x), average_of_frames(vit, x)
    assert same(out.logits, expected) and expected.std() > .02 and same(stream.net.head(out.embedding), out.logits)
    for m in out.stages.values(): assert m.shape == (2, vit.embed_dim, 4, *vit.patch_embed.grid_size)
    with torch.no_grad():
        for part in stream.times: part.out.weight.normal_(0, .3)
        assert not same(stream(x).logits, expected, 1e-3)


def test_stages_are_the_patches_of_each_frame_in_their_places():
    vit = strong(timm.create_model("test_vit", num_classes=5, img_size=32)).eval()
    stream = DividedStream(5, "test_vit", frames=4, size=32).eval()
    stream.net.load_state_dict(vit.state_dict())
    x = clip()
    with torch.no_grad():
        stages = stream(x).stages
        assert list(stages) == ["block2", "block3", "block5", "block6"]
        theirs = vit.forward_intermediates(x[:, :, 1], indices=[1, 2, 4, 5], intermediates_only=True)
    for m, image in zip(stages.values(), theirs): assert same(m[:, :, 1], image)


@pytest.mark.parametrize("depth, names", [(1, ["block1"]), (2, ["block1", "block2"]), (3, ["block1", "block2", "block3"]), (4, ["block1", "block2", "block3", "block4"])])
def test_few_blocks_have_few_stages(depth, names): assert list(DividedStream(3, "test_vit", frames=2, size=16, depth=depth)(clip(1, 2, 16)).stages) == names


def test_attention_along_time_mixes_moments_of_one_place_only():
    part, x = strong(TimeAttention(8, 2)), noise(2, 5, 3, 8)
    y = part(x)
    by_place = torch.stack([part(x[:, :, n:n + 1])[:, :, 0] for n in range(3)], 2)
    assert same(y, by_place)
    q, k, v = part.queries_keys_values(x)
    assert q.shape == (2, 3, 2, 5, 4)
    by_hand = part.out(torch.cat([attention_weights(q[0, 1, h], k[0, 1, h]) @ v[0, 1, h] for h in range(2)], -1))
    assert same(y[0, :, 1], by_hand)


def test_time_counts_only_once_the_projection_has_moved():
    stream, x = DividedStream(5, "test_vit", frames=4, size=32, depth=2).eval(), clip()
    with torch.no_grad():
        assert same(stream(x).logits, stream(x[:, :, [2, 0, 3, 1]]).logits)
        strong(stream); stream.moment.normal_(0, 1)
        assert not same(stream(x).logits, stream(x[:, :, [2, 0, 3, 1]]).logits, 1e-4)


def test_what_can_learn_at_the_start_and_after_one_step():
    stream, x = DividedStream(5, "test_vit", frames=4, size=32, depth=2), clip()
    grads = gradients(stream, x)
    assert grads["moment"].any() and all(grads[f"times.{n}.out.weight"].any() and not grads[f"times.{n}.qkv.weight"].any() for n in range(2))
    torch.optim.SGD(stream.parameters(), .1).step()
    grads = gradients(stream, x)
    assert all(g.any() for g in grads.values()) and set(grads) == {name for name, _ in stream.named_parameters()}


@pytest.mark.parametrize("vit", ["test_vit", "test_vit2"])
def test_fused_plain_checkpointed_same_gradients(vit):
    state = strong(DividedStream(5, vit, frames=4, size=32, depth=2)).state_dict()
    found = {}
    for fused in (True, False):
        for checkpointing in (False, True):
            stream = DividedStream(5, vit, frames=4, size=32, depth=2, fused=fused, checkpointing=checkpointing).train()
            stream.load_state_dict(state)
            found[fused, checkpointing] = gradients(stream, clip())
    for grads in found.values():
        for name, g in grads.items(): assert same(g, found[True, False][name], 1e-4), name


def test_checkpointing_computes_each_block_twice_and_nothing_without_gradients():
    stream, calls = DividedStream(5, "test_vit", frames=2, size=16, depth=2, checkpointing=True), []
    stream.net.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad(): stream(clip(1, 2, 16))
    assert len(calls) == 1
    stream(clip(1, 2, 16)).logits.sum().backward()
    assert len(calls) == 3


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_image_weights_from_a_file(tmp_path, ending):
    vit, file = strong(timm.create_model("test_vit", num_classes=1000, img_size=32)).eval(), tmp_path/f"vit{ending}"
    if ending == ".pt": torch.save(vit.state_dict(), file)
    else:
        from safetensors.torch import save_file
        save_file(vit.state_dict(), file)
    options, x = dict(vit="test_vit", size=32, frames=4), clip()
    whole = build_stream("timesformer_s16", 1000, "imagenet21k", file=file, **options).eval()
    with torch.no_grad(): assert same(whole(x).logits, average_of_frames(vit, x))
    assert whole.seen == {"imagenet21k", "imagenet1k"} and whole.backbone == "timesformer_s16" and not whole.new_head
    ours = build_stream("timesformer_b16", 7, file=file, **options).eval()
    assert ours.new_head and ours.seen == {"not stated"} and ours(x).logits.shape == (2, 7)
    with torch.no_grad(): assert same(ours(x).embedding, whole(x).embedding)


def test_own_weights_come_back_and_another_networks_are_refused(tmp_path):
    options = dict(vit="test_vit", size=32, frames=4, depth=2)
    stream = strong(build_stream("timesformer_s16", 5, **options)).eval()
    torch.save(stream.state_dict(), tmp_path/"own.pt")
    again = build_stream("timesformer_s16", 5, file=tmp_path/"own.pt", **options).eval()
    with torch.no_grad(): assert torch.equal(again(clip()).logits, stream(clip()).logits)
    state = {k[4:]: v for k, v in stream.state_dict().items() if k.startswith("net.")}
    for name, bad in {"lacks a block": {k: v for k, v in state.items() if not k.startswith("blocks.1.")}, "other size": {**state, "pos_embed": torch.zeros(1, 50, 64)}, "one more": {**state, "extra": torch.zeros(1)}}.items():
        torch.save(bad, tmp_path/"bad.pt")
        with pytest.raises(ValueError, match="are not those of 'timesformer_s16'"): build_stream("timesformer_s16", 5, file=tmp_path/"bad.pt", **options)


@pytest.mark.parametrize("make, words", [
    (lambda: DividedStream(5, "foo"), "vit = 'foo' is no model of timm [0-9.]*; timm.list_models"), (lambda: DividedStream(5, "vit_smal_patch16_224"), "vit = 'vit_smal_patch16_224' is no model of timm.*did you mean vit_small_patch16_224"),
    (lambda: meta(lambda: DividedStream(5, "resnet18")), "vit = 'resnet18' is a ResNet.*plain VisionTransformer"), (lambda: meta(lambda: DividedStream(5, "deit_tiny_distilled_patch16_224", depth=1)), "is a VisionTransformerDistilled"),
    (lambda: DividedStream(5, "test_vit", frames=4, size=32, depth=1)(clip(frames=3)), r"expected a clip \(B, 3, 4, 32, 32\), got \(2, 3, 3, 32, 32\)"),
    (lambda: DividedStream(5, "test_vit", frames=4, size=32, depth=1)(clip(size=48)), r"got \(2, 3, 4, 48, 48\)"), (lambda: DividedStream(5, "test_vit", frames=4, size=32, depth=1)(clip()[0]), r"got \(3, 4, 32, 32\)"),
    (lambda: WindowBlock(8, 2, "times"), "axis must be 'time' or 'space', not 'times'"), (lambda: WindowBlock(8, 2, "time", window=4), "window must be odd, not 4"), (lambda: WindowStream(5)(clip()[:, :2]), r"expected a clip \(B, 3, T, H, W\)"),
    (lambda: WindowBlock(10, 4, "time"), r"heads \(4\) must divide width \(10\)"), (lambda: build_stream("timesformer_s16", 5, "imagenet22k"), "did you mean 'imagenet21k'"), (lambda: build_stream("hand_transformer", 5, "kinetics400"), "has no weights"),
])
def test_clear_errors(make, words):
    with pytest.raises(ValueError, match=words): make()


# ---- torchvision's video Transformers

def tiny_mvit():
    "torchvision's MViT v2 with five small blocks for 4 frames of 32 pixels, behind our stream."
    from torchvision.models.video.mvit import MSBlockConfig, MViT
    step = lambda i, o, stride: MSBlockConfig(2, i, o, [3, 3, 3], [3, 3, 3], stride, [1, 2, 2])
    blocks = [step(8, 8, [1, 1, 1]), step(8, 16, [1, 2, 2]), step(16, 16, [1, 1, 1]), step(16, 24, [1, 2, 2]), step(24, 24, [1, 1, 1])]
    with torch.device("meta"): stream = MultiscaleStream(5)
    dropout = stream.net.head[0]
    torch.manual_seed(0)
    stream.net = MViT((32, 32), 4, blocks, residual_pool=True, residual_with_cls_embed=False, rel_pos_embed=True, proj_after_attn=True, stochastic_depth_prob=.2, num_classes=5)
    stream.net.head[0] = dropout
    return stream


def tiny_swin():
    "torchvision's Video Swin with four small blocks in two stages, behind our stream."
    from torchvision.models.video.swin_transformer import SwinTransformer3d
    with torch.device("meta"): stream = ShiftedWindowStream("swin3d_t", 5)
    torch.manual_seed(0)
    stream.net = SwinTransformer3d([2, 4, 4], 12, [2, 2], [2, 4], [2, 3, 3], stochastic_depth_prob=.4, num_classes=5)
    return stream


@pytest.mark.parametrize("frames, size", [(4, 32), (7, 50)])
def test_swin_has_torchvisions_logits(frames, size):
    stream, x = strong(tiny_swin()).eval(), clip(2, frames, size)
    with torch.no_grad(): out, expected = stream(x), stream.net(x)
    assert same(out.logits, expected) and expected.std() > .01 and same(stream.net.head(out.embedding), out.logits)
    half, side = -(-frames // 2), -(-size // 4)
    assert {name: tuple(m.shape) for name, m in out.stages.items()} == {"stage1": (2, 12, half, side, side), "stage2": (2, 24, half, -(-side // 2), -(-side // 2))}


def test_mvit_has_torchvisions_logits():
    stream, x = strong(tiny_mvit()).eval(), clip()
    with torch.no_grad(): out = stream(x); expected = stream.net(x)
    assert same(out.logits, expected) and expected.std() > .01 and same(stream.net.head(out.embedding), out.logits)
    assert {name: tuple(m.shape) for name, m in out.stages.items()} == {"stage1": (2, 8, 2, 8, 8), "stage2": (2, 16, 2, 4, 4), "stage3": (2, 24, 2, 2, 2)}
    kept = []
    stream.net.blocks[2].register_forward_hook(lambda m, i, o: kept.append(o[0]))
    with torch.no_grad(): stages = stream(x).stages
    assert torch.equal(stages["stage2"][1, :, 1, 2, 3], kept[0][1, 1 + 16 + 2*4 + 3])          # the token of its place, after the class token


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
def test_full_size_parity_from_a_file(tmp_path, name):
    torch.manual_seed(0)
    theirs = getattr(models, name)(num_classes=400).eval()
    torch.save(theirs.state_dict(), tmp_path/"weights.pth")
    stream = build_stream(name, 400, "kinetics400", file=tmp_path/"weights.pth").eval()
    x = clip(1, 16, 224) if name == "mvit_v2_s" else clip(1, 8, 64)
    with torch.no_grad(): assert same(stream(x).logits, theirs(x))
    assert "kinetics400/train" in stream.seen and not stream.new_head
    ours = build_stream(name, 7, "kinetics400", file=tmp_path/"weights.pth").eval()
    with torch.no_grad(): assert ours.new_head and ours(x).logits.shape == (1, 7) and torch.equal(ours(x).embedding, stream(x).embedding)


def test_mvit_wants_its_own_clip_size():
    with torch.device("meta"): stream = MultiscaleStream(5)
    for shape in [(1, 3, 15, 224, 224), (1, 3, 32, 224, 224), (1, 3, 16, 256, 256), (1, 3, 16, 224, 112), (3, 16, 224, 224)]:
        with pytest.raises(ValueError, match=r"expected a clip \(B, 3, 16, 224, 224\), got \("): stream(torch.empty(shape, device="meta"))
    with pytest.raises(ValueError, match=r"expected a clip \(B, 3, T, H, W\)"): tiny_swin()(clip()[:, :1])


@pytest.mark.parametrize("make", [tiny_swin, tiny_mvit])
def test_checkpointing_keeps_gradients_dropped_paths_included(make):
    stream, x = strong(make()).train(), clip(4)
    plain = gradients(stream, x); stream.checkpointing = True
    saving = gradients(stream, x); stream.checkpointing = False
    other = gradients(stream, x, seed=1)
    assert plain.keys() == saving.keys() and all(same(g, saving[name], 1e-4) for name, g in plain.items())
    assert not all(same(g, other[name], 1e-4) for name, g in plain.items())                     # chance was at work


def test_the_embedding_is_what_the_dropout_gets():
    stream = tiny_mvit().train()
    torch.manual_seed(0)
    assert (stream(clip()).embedding != 0).all()


# ---- the registry

STAGES = {   # of each backbone with its own view: channels, moments, rows = columns
    "hand_transformer": {"stem": (96, 8, 3), "block1": (96, 8, 3), "block2": (96, 8, 3), "block3": (96, 8, 3)},
    "window_transformer": {"stem": (64, 16, 7), **{f"block{n}": (64, 16, 7) for n in (1, 2, 3, 4)}},
    "timesformer_s16": {f"block{n}": (384, 8, 14) for n in (3, 6, 9, 12)}, "timesformer_b16": {f"block{n}": (768, 8, 14) for n in (3, 6, 9, 12)},
    "mvit_v2_s": {"stage1": (96, 8, 56), "stage2": (192, 8, 28), "stage3": (384, 8, 14), "stage4": (768, 8, 7)},
    "swin3d_t": {f"stage{n + 1}": (96 * 2**n, 16, 56 // 2**n) for n in range(4)}, "swin3d_s": {f"stage{n + 1}": (96 * 2**n, 16, 56 // 2**n) for n in range(4)},
    "swin3d_b": {f"stage{n + 1}": (128 * 2**n, 16, 56 // 2**n) for n in range(4)}}


@pytest.mark.parametrize("name", STAGES)
def test_stages_at_full_size(name):
    view, entry = stream_view(name), find_backbone(name)[0]
    with torch.device("meta"):
        stream = entry.build(9)
        out = stream(torch.empty(2, 3, view.frames, view.size, view.size))
    assert {k: tuple(m.shape) for k, m in out.stages.items()} == {k: (2, c, t, s, s) for k, (c, t, s) in STAGES[name].items()}
    assert out.logits.shape == (2, 9) and out.embedding.shape == (2, next(reversed(out.stages.values())).shape[1])
    assert any(key.startswith(entry.head) for key in stream.state_dict()) and stream.backbone == name.replace("b16", "s16") and stream.seen == frozenset()
    assert json.loads(json.dumps(stream.config))["num_classes"] == 9 and not set(stream.config) - {"num_classes", *inspect.signature(entry.build).parameters}


def test_kinds_and_views():
    assert {name: BACKBONES[name].kind for name in STAGES} == {name: "local" if name == "window_transformer" else "global" for name in STAGES}
    assert stream_view("hand_transformer") == GLOBAL_VIEW and stream_view("window_transformer") == LOCAL_VIEW
    for name in STAGES:
        for entry in BACKBONES[name].weights.values(): assert entry.view == BACKBONES[name].view and entry.seen and entry.source and entry.views


@pytest.mark.parametrize("name, weights, enum", [("mvit_v2_s", "kinetics400", "MViT_V2_S_Weights.KINETICS400_V1"), ("swin3d_t", "kinetics400", "Swin3D_T_Weights.KINETICS400_V1"), ("swin3d_s", "kinetics400", "Swin3D_S_Weights.KINETICS400_V1"),
                                                 ("swin3d_b", "kinetics400", "Swin3D_B_Weights.KINETICS400_V1"), ("swin3d_b", "kinetics400_imagenet22k", "Swin3D_B_Weights.KINETICS400_IMAGENET22K_V1")])
def test_entries_say_what_torchvision_says(name, weights, enum):
    entry, (family, member) = find_backbone(name, weights)[1], enum.split(".")
    theirs = getattr(models, family)[member]
    ours, made = entry.view, theirs.transforms()
    assert entry.url == theirs.url and entry.classes == len(theirs.meta["categories"]) and entry.top1 == theirs.meta["_metrics"]["Kinetics-400"]["acc@1"]
    assert [ours.size]*2 == list(made.crop_size) and round(ours.size / .875) == made.resize_size[0]
    for value, wanted in [(ours.mean, made.mean), (ours.std, made.std)]: assert list(value if isinstance(value, tuple) else [value]*3) == pytest.approx(list(wanted))
    said = theirs.meta["_docs"]
    assert f"frame_rate={1/ours.seconds:g}" in said and f"clip_len={ours.frames}" in said and f"{said.split('clips_per_video=')[1].split('`')[0]} clips" in entry.views
    assert "kinetics400/train" in entry.seen and ("imagenet21k" in entry.seen) == ("IMAGENET22K" in enum)


@pytest.mark.parametrize("name", ["timesformer_s16", "timesformer_b16"])
def test_entries_say_what_timm_says(name):
    entry = find_backbone(name, "imagenet21k")[1]
    stream = meta(lambda: find_backbone(name)[0].build(3, depth=1))
    tag = entry.url.removeprefix("timm:")
    known = timm.models.get_pretrained_cfg(tag)
    assert tag.split(".")[0] == stream.config["vit"] and known.input_size == (3, entry.view.size, entry.view.size)
    assert known.mean == (entry.view.mean,)*3 and known.std == (entry.view.std,)*3 and known.num_classes == entry.classes == 1000
    assert tag.endswith("in21k_ft_in1k") and set(entry.seen) == {"imagenet21k", "imagenet1k"}


# ---- the near-sighted Transformer

WINDOWS = [dict(), dict(axes=("time",), widths=(4, 8), heads=2), dict(axes=("space", "space", "time"), widths=(4, 4, 8), heads=2), dict(axes=("space", "time"), window=5, widths=(4, 8), heads=2)]


def near(seed=0, **options):
    torch.manual_seed(seed)
    stream = WindowStream(5, **options).eval()
    for m in stream.modules():
        if isinstance(m, torch.nn.modules.batchnorm._BatchNorm): m.running_mean.normal_(0, .1); m.running_var.uniform_(.05, .2); m.bias.data.normal_(.1, .1)
    return stream


def test_as_near_sighted_as_the_cnn(): assert receptive_field(WindowStream(5), 2) == receptive_field(LocalStream(5), 2) == (13, 31)


@pytest.mark.parametrize("options", WINDOWS)
def test_nothing_outside_the_field_is_felt_and_everything_to_its_rim_is(options):
    stream = near(**options)
    frames, pixels = receptive_field(stream)
    felt = sum(gradient_field(stream, noise(3, frames + 4, pixels + 34, pixels + 34, seed=seed)) != 0 for seed in range(2)) > 0
    rows, columns = felt.any(-1).any(-1).nonzero().flatten(), felt.any(0).any(0).nonzero().flatten()
    assert (int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1) == (frames, pixels)


def test_the_answer_is_the_mean_of_the_votes_of_windows():
    stream, x = near(), clip(2, 10, 40)
    with torch.no_grad():
        out = stream(x)
        votes = stream.head(stream.norm(out.stages["block4"].permute(0, 2, 3, 4, 1)).amax((2, 3)))
    assert votes.shape == (2, 10, 5) and same(votes.mean(1), out.logits) and votes.std(1).min() > 1e-4


def test_order_beyond_the_field_is_invisible_and_within_it_seen():
    stream, events = near(), [noise(1, 3, 6, 32, 32, seed=s) for s in (1, 2)]
    def story(order, quiet):
        still = torch.zeros(1, 3, quiet, 32, 32)
        return torch.cat([still, events[order[0]], still, events[order[1]], still], 2)
    with torch.no_grad():
        assert same(stream(story((0, 1), 9)).logits, stream(story((1, 0), 9)).logits) and not same(stream(story((0, 1), 9)).logits, stream(story((0, 0), 9)).logits, 1e-3)
        assert not same(stream(story((0, 1), 2)).logits, stream(story((1, 0), 2)).logits, 1e-4)


def test_it_sees_which_way_things_move():
    stream, x = near(), clip(1, 6, 32)
    with torch.no_grad(): assert not same(stream(x).logits, stream(x.flip(2)).logits, 1e-3)


@pytest.mark.parametrize("training", [False, True])
def test_a_still_video_looks_the_same_at_all_moments(training):
    stream = near().train(training)
    with torch.no_grad(): maps = stream(clip(3, 1).repeat(1, 1, 9, 1, 1)).stages
    for name, m in maps.items(): assert same(m, m[:, :, :1].expand_as(m)), name


@pytest.mark.parametrize("axis, window", [("time", 3), ("space", 3), ("time", 5), ("space", 5)])
def test_a_window_is_joint_attention_over_its_tokens(axis, window):
    torch.manual_seed(0)
    block, x = strong(WindowBlock(8, 2, axis, window)), noise(1, 4, 5, 6, 8)
    with torch.no_grad(): y = block(x)
    t, r, c, half = 2, 1, 4, window // 2
    if axis == "time": near_by = [((s, r, c), s - t + half) for s in range(4) if abs(s - t) <= half]
    else: near_by = [((t, i, j), (i - r + half) * window + j - c + half) for i in range(5) for j in range(6) if max(abs(i - r), abs(j - c)) <= half]
    tokens = torch.stack([x[0][place] for place, _ in near_by])
    q, _, _ = block.queries_keys_values(x[0, t, r, c][None, None])
    _, k, v = block.queries_keys_values(tokens[None])
    with torch.no_grad():
        weights = ((q @ k.transpose(-2, -1))[0, :, 0] / 2 + block.bias[:, [number for _, number in near_by]]).softmax(-1)
        z = x[0, t, r, c] + block.out(torch.einsum("hn,hnd->hd", weights, v[0]).flatten())
        assert same(y[0, t, r, c], z + block.mlp(block.norm2(z)))


@pytest.mark.parametrize("shape", [(2, 3, 1, 8, 8), (1, 3, 3, 33, 20), (1, 3, 20, 64, 64)])
def test_clips_of_any_length_and_size(shape): assert torch.isfinite(near()(noise(*shape)).logits).all()


def test_every_parameter_of_it_learns():
    stream = near().train()
    stream(clip(4, 6, 32)).logits.square().sum().backward()
    assert [n for n, p in stream.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("name, options", [("hand_transformer", dict(frames=4, width=24, depth=1, heads=3)), ("window_transformer", dict(widths=(4, 8), heads=2, axes=["time", "space"])), ("timesformer_s16", dict(vit="test_vit", frames=4, size=32, depth=2))])
def test_each_video_is_answered_by_itself_and_the_config_rebuilds(name, options):
    torch.manual_seed(0)
    stream, x = build_stream(name, 5, **options).eval(), clip(3)
    again = find_backbone(name)[0].build(**stream.config).eval()
    again.load_state_dict(stream.state_dict())
    with torch.no_grad(): assert same(stream(x).logits[1:2], stream(x[1:2]).logits) and torch.equal(again(x).logits, stream(x).logits)
    assert isinstance(stream, {"hand_transformer": GlobalStream, "window_transformer": WindowStream, "timesformer_s16": DividedStream}[name])
    assert F.cross_entropy(stream(x).logits, torch.tensor([0, 1, 2])).isfinite()
