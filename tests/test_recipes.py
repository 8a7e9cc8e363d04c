import copy, functools, math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from mbd import global_stream  # noqa: F401  (registers its backbones)
from mbd.distillation import Distillation, distillation_terms
from mbd.local_stream import build_stream
from mbd.recipes import Mixing, Mixture, cosine, mix, parameter_groups


@functools.cache
def built(name):
    "A stream of this backbone, without memory for its numbers."
    with torch.device("meta"): return build_stream(name, 10, **({"depth": 4} if name.startswith("timesformer") else {}))


TRANSFORMERS = ["hand_transformer", "window_transformer", "timesformer_s16", "timesformer_b16", "mvit_v2_s", "swin3d_t", "swin3d_s", "swin3d_b"]
CNNS = ["hand_cnn", "long_cnn", "r3d_18", "mc3_18", "r2plus1d_18", "s3d"]


# ---- the rate

@pytest.mark.parametrize("steps, warm_up", [(1, .1), (2, .5), (10, 0.), (10, 1.), (37, .1), (1000, .05)])
def test_the_rate_rises_to_its_peak_and_falls_to_nothing(steps, warm_up):
    curve = [cosine(step, steps, warm_up) for step in range(steps + 3)]
    top = min(round(warm_up * steps), steps - 1)
    assert curve[steps:] == [0] * 3 and all(0 < v <= 1 for v in curve[:steps])
    assert curve[:top + 1] == sorted(curve[:top + 1]) and curve[top:] == sorted(curve[top:], reverse=True)
    if warm_up < 1: assert curve[top] == 1


def test_the_rate_equals_the_formula_between_the_ends():
    for step in range(20, 200): assert cosine(step, 200, .1) == pytest.approx(.5 * (1 + math.cos(math.pi * (step - 20) / 180)))
    assert [cosine(step, 200, .1) for step in range(3)] == pytest.approx([1 / 21, 2 / 21, 3 / 21])


def test_a_schedule_made_anew_at_any_step_continues_exactly():
    def rates(begin, end):
        adam = torch.optim.AdamW([dict(params=[torch.zeros(1, requires_grad=True)], lr=.3, initial_lr=.3)])
        schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: cosine(step, 23), last_epoch=begin - 1); out = []
        for _ in range(begin, end): out.append(adam.param_groups[0]["lr"]); adam.step(); schedule.step()
        return out
    for stop in (1, 2, 11, 22): assert rates(0, stop) + rates(stop, 23) == rates(0, 23)


@pytest.mark.parametrize("given, words", [((-1, 10), "step must be at least 0, not -1"), ((0, 0), "steps must be at least 1, not 0"), ((0, 10, 1.5), "warm_up must be at least 0 and at most 1, not 1.5")])
def test_what_is_no_step_is_refused(given, words):
    with pytest.raises(ValueError, match=words): cosine(*given)


# ---- groups

@pytest.mark.parametrize("name", TRANSFORMERS + CNNS)
def test_every_parameter_is_in_one_group_with_the_rate_of_its_layer(name):
    stream = built(name); groups = parameter_groups(stream, .1, .05, .5)
    names = [n for g in groups for n in g["names"]]
    assert sorted(names) == sorted(n for n, _ in stream.named_parameters()) and sum(len(g["params"]) for g in groups) == len(names)
    by_name = dict(stream.named_parameters()); assert all(by_name[n] is p for g in groups for n, p in zip(g["names"], g["params"]))
    rate = {n: g["lr"] for g in groups for n in g["names"]}
    exponents = sorted({round(-math.log2(r / .1), 6) for r in rate.values()})
    assert exponents == list(range(len(exponents)))                                       # no layer is left out
    assert {n for n, r in rate.items() if r == .1} == {n for n in rate if any(n.startswith(h) for h in ("head.", "net.head.", "net.fc.", "net.classifier."))}


LAYERS = {"hand_transformer": 5, "window_transformer": 6, "timesformer_s16": 6, "timesformer_b16": 6, "mvit_v2_s": 18, "swin3d_t": 14, "swin3d_s": 26, "swin3d_b": 26, "hand_cnn": 5, "r3d_18": 6}

@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_counted(name): assert len({g["lr"] for g in parameter_groups(built(name), .1, 0., .5)}) == LAYERS[name]


def test_first_and_last_layers_of_each_kind():
    for name, expected in {"hand_transformer": {"head.bias": 0, "norm.weight": 1, "blocks.2.qkv.weight": 1, "blocks.0.qkv.weight": 3, "moment": 4, "place": 4, "stem.layers.0.weight": 4},
                           "timesformer_s16": {"net.head.weight": 0, "net.norm.bias": 1, "times.3.qkv.weight": 1, "net.blocks.3.mlp.fc1.weight": 1, "times.0.out.weight": 4, "net.blocks.0.attn.qkv.weight": 4, "net.cls_token": 5, "net.pos_embed": 5, "moment": 5, "net.patch_embed.proj.weight": 5},
                           "mvit_v2_s": {"net.head.1.weight": 0, "net.norm.weight": 1, "net.blocks.15.mlp.0.weight": 1, "net.blocks.0.attn.rel_pos_t": 16, "net.pos_encoding.class_token": 17, "net.conv_proj.weight": 17},
                           "swin3d_t": {"net.head.weight": 0, "net.norm.weight": 1, "net.features.6.1.mlp.0.weight": 1, "net.features.6.0.attn.qkv.weight": 2, "net.features.5.reduction.weight": 2, "net.features.4.5.norm1.weight": 3, "net.features.0.0.attn.relative_position_bias_table": 12, "net.patch_embed.proj.weight": 13},
                           "r3d_18": {"net.fc.weight": 0, "net.layer4.1.conv2.0.weight": 1, "net.layer1.0.conv1.0.weight": 4, "net.stem.0.weight": 5}}.items():
        depth = {n: round(-math.log2(g["lr"])) for g in parameter_groups(built(name), 1., 0., .5) for n in g["names"]}
        for parameter, d in expected.items(): assert depth[parameter] == d, (name, parameter)


@pytest.mark.parametrize("name", TRANSFORMERS + CNNS)
def test_biases_norms_tokens_and_positions_do_not_decay_and_matrices_do(name):
    stream = built(name)
    decayed = {n for g in parameter_groups(stream, .1, .05, .9) if g["weight_decay"] for n in g["names"]}
    matrices = {f"{prefix}.weight" for prefix, part in stream.named_modules() if isinstance(part, (nn.Linear, nn.Conv2d, nn.Conv3d))}
    assert decayed == matrices and all(g["weight_decay"] in (0., .05) for g in parameter_groups(stream, .1, .05))


def test_a_plain_vit_gets_timms_own_groups():
    timm = pytest.importorskip("timm"); from timm.optim import param_groups_layer_decay
    with torch.device("meta"): net = timm.create_model("vit_tiny_patch16_224", num_classes=7)
    net.backbone = None
    theirs = {id(p): (g["lr_scale"], g["weight_decay"]) for g in param_groups_layer_decay(net, .05, net.no_weight_decay(), layer_decay=.7) for p in g["params"]}
    for group in parameter_groups(net, 1., .05, .7):
        for name, p in zip(group["names"], group["params"]): assert (group["lr"], group["weight_decay"]) == pytest.approx(theirs[id(p)]), name


def test_what_does_not_learn_is_left_out_and_nothing_left_is_an_error():
    stream = copy.deepcopy(built("hand_transformer")); stream.stem.requires_grad_(False)
    groups = parameter_groups(stream, .1, layer_decay=.5); names = {n for g in groups for n in g["names"]}
    assert names == {n for n, p in stream.named_parameters() if p.requires_grad} and min(g["lr"] for g in groups) == .1 * .5 ** 4
    with pytest.raises(ValueError, match="no parameter of GlobalStream learns"): parameter_groups(stream.requires_grad_(False), .1)
    for change, words in ((dict(rate=0.), "rate must be above 0"), (dict(layer_decay=0.), "layer_decay must be above 0"), (dict(layer_decay=1.1), "layer_decay.*1.1"), (dict(weight_decay=-1.), "weight_decay.*-1")):
        with pytest.raises(ValueError, match=words): parameter_groups(built("hand_cnn"), **{"rate": .1, **change})


def test_any_module_can_be_grouped_and_optimised():
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)); groups = parameter_groups(net, .1, .5, .5)
    assert {g["lr"] for g in groups} == {.1} and {g["weight_decay"] for g in groups} == {0., .5}
    before = net[0].weight.detach().clone(); net(torch.ones(1, 3)).sum().backward(); torch.optim.AdamW(groups).step()
    assert not torch.equal(before, net[0].weight)


# ---- mixing

def batch(size=4, local=(56, 56), global_=(28, 28), frames=(3, 2)):
    "Clip i is filled with the number i; labels are 0, 1, ..."
    fill = lambda t, s: torch.arange(float(size)).view(-1, 1, 1, 1, 1).expand(size, 2, t, *s).clone()
    return dict(local=fill(frames[0], local), global_=fill(frames[1], global_), label=torch.arange(size))


@pytest.mark.parametrize("sizes", [((56, 56), (28, 28)), ((112, 112), (224, 224)), ((56, 40), (28, 20)), ((30, 30), (24, 24)), ((8, 12), (4, 4))])
def test_cutmix_replaces_the_same_region_of_both_views_and_the_share_is_what_is_left(sizes):
    given, shares = batch(4, *sizes, frames=(2, 1)), set()
    for seed in range(30):
        local, global_, m = mix(given, Mixing(cutmix=1.), (7, seed)); shares.add(m.share)
        for view, size in ((local, sizes[0]), (global_, sizes[1])):
            own = view[:, 0, 0] == given["label"].view(-1, 1, 1)
            assert ((view == view[:, :1, :1]).all())                                     # the same region in every frame and channel
            assert (own.sum((1, 2)) == own[0].sum()).all() and own[0].sum().item() / math.prod(size) == pytest.approx(m.share, abs=1e-12)
            assert (view[:, 0, 0][~own].view(4, -1) == m.others.view(-1, 1)).all()
        coarse, fine = sorted((local[0, 0, 0] == 0, global_[0, 0, 0] == 0), key=lambda mask: mask.numel())
        if all(f % c == 0 for f, c in zip(fine.shape, coarse.shape)): assert torch.equal(fine, coarse.repeat_interleave(fine.shape[0] // coarse.shape[0], 0).repeat_interleave(fine.shape[1] // coarse.shape[1], 1))
    assert len(shares) > 5


def test_mixup_weighs_both_views_alike():
    given, seen = batch(5), set()
    for seed in range(20):
        local, global_, m = mix(given, Mixing(mixup=.4), (seed,)); seen.add(tuple(m.others.tolist()))
        expected = m.share * given["label"] + (1 - m.share) * m.others
        for view in (local, global_): assert torch.allclose(view, expected.view(-1, 1, 1, 1, 1).float().expand_as(view), atol=1e-5)
        assert 0 <= m.share <= 1 and (m.others != m.labels).all() and sorted(m.others.tolist()) == list(range(5))
    assert len(seen) == 4                                                                # every other clip has its turn


def test_the_same_seed_mixes_alike_whatever_was_drawn_before_and_the_batch_stays():
    given, kept = batch(), batch(); first = mix(given, Mixing(.5, .5), (3, 9))
    torch.rand(5); np.random.rand(5); again = mix(given, Mixing(.5, .5), (3, 9))
    assert all(torch.equal(a, b) for a, b in zip(first[:2], again[:2])) and first[2].share == again[2].share
    assert all(torch.equal(given[name], kept[name]) for name in given)
    assert len({mix(given, Mixing(.5, .5), (3, step))[2].share for step in range(10)}) > 5


def test_how_often_and_which():
    given = batch(); kinds = []
    for step in range(200):
        local, _, m = mix(given, Mixing(1., 1., probability=.6), (0, step)); inside = local[1, 0, 0]
        kinds.append("none" if m.share == 1 and torch.equal(local, given["local"]) else "cutmix" if set(inside.unique().tolist()) <= {0., 1., 2., 3.} else "mixup")
    assert 55 <= kinds.count("none") <= 105 and kinds.count("mixup") > 35 and kinds.count("cutmix") > 35


def test_nothing_to_mix_is_share_one():
    for given, mixing in ((batch(), Mixing()), (batch(1), Mixing(mixup=1.)), (batch(), Mixing(cutmix=1., probability=0.))):
        local, global_, m = mix(given, mixing, (0,))
        assert local is given["local"] and global_ is given["global_"] and m.share == 1 and torch.equal(m.others, m.labels)


def test_views_without_a_common_grid_refuse_cutmix_and_take_mixup():
    given = batch(local=(56, 56), global_=(30, 30))
    with pytest.raises(ValueError, match="56 x 56 and 30 x 30 pixels share a grid of 2 x 2.*or mixup"): mix(given, Mixing(cutmix=1.), (0,))
    assert mix(given, Mixing(mixup=1.), (0,))[2].share < 1


@pytest.mark.parametrize("change, words", [(dict(mixup=-.1), "mixup.*-0.1"), (dict(cutmix=math.nan), "cutmix.*nan"), (dict(probability=1.2), "probability.*1.2"), (dict(mixup="a"), "mixup.*'a'")])
def test_mixing_names_the_field_it_refuses(change, words):
    with pytest.raises(ValueError, match=words): Mixing(**change)


# ---- labels of mixtures

@pytest.mark.parametrize("smoothing", [0., .1])
def test_the_loss_is_that_of_soft_labels(smoothing):
    torch.manual_seed(0); z = torch.randn(6, 5, dtype=torch.float64, requires_grad=True); a, b = torch.arange(6) % 5, torch.arange(6).flip(0) % 5
    soft = .3 * F.one_hot(a, 5).double() + .7 * F.one_hot(b, 5).double()
    loss, expected = Mixture(a, b, .3).cross_entropy(z, smoothing), F.cross_entropy(z, soft, label_smoothing=smoothing)
    assert abs(loss - expected) < 1e-12
    for x, y in zip(*(torch.autograd.grad(v, z) for v in (loss, expected))): assert torch.allclose(x, y, atol=1e-12)
    whole = Mixture(a, b, 1.).cross_entropy(z, smoothing); assert torch.equal(whole, F.cross_entropy(z, a, label_smoothing=smoothing))
    assert Mixture(a, b, .3).cross_entropy(z.bfloat16()).dtype == torch.float32


def test_accuracy_counts_the_share_of_the_label_that_was_named():
    m = Mixture(torch.tensor([0, 1, 2, 2]), torch.tensor([1, 0, 2, 0]), .75)
    assert m.accuracy(F.one_hot(torch.tensor([0, 0, 2, 1]), 3).float()).tolist() == [.75, .25, 1, 0]


def test_partners_are_what_distillation_takes():
    torch.manual_seed(0); codes = torch.tensor([1, 1, -1, -1]); m = Mixture(torch.arange(4), torch.arange(4).roll(2), .25)
    streams = [SimpleNamespace(logits=torch.randn(4, 4), stages={}) for _ in range(4)]
    taught = distillation_terms(*streams, m.labels, codes[m.labels], Distillation(intermediate_weight=0., only_right_teacher=False), others=m.partners(codes))[1]
    assert taught["taught_global"].item() == taught["taught_local"].item() == pytest.approx(.5)
    assert [t.tolist() for t in m.partners(codes)[:2]] == [[2, 3, 0, 1], [-1, -1, 1, 1]]
