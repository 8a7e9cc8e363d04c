import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from mbd.dominance import fit_temperature, measure, simulate_streams
from mbd.fusion import (FUSIONS, AdaptiveFusion, ClassFusion, EntropyFusion, FeatureFusion, GateFusion, MeanFusion, ScalarFusion, StackingFusion,
                        ambiguity, build_fusion, corrupt, cross_fit, early_exit, fit_all, fuse, may_stop)


@pytest.fixture(scope="module")
def data():
    on, gate, test = (simulate_streams(seed=i, sources=s) for i, s in enumerate((5, 5, 15)))
    T = fit_temperature(on.local, on.labels), fit_temperature(on.global_, on.labels)
    m = measure(on.local / T[0], on.global_ / T[1], on.labels, on.sources, on.classes)
    p = lambda s: ((s.local / T[0]).softmax(1), (s.global_ / T[1]).softmax(1), s.labels)
    return m, p(gate), p(test)


def nll(fusion, part):
    return F.nll_loss(fusion(*part[:2]).log(), part[2]).item()


def test_fuse_is_the_weighted_sum():
    p, q = torch.tensor([[0.8, 0.2], [0.3, 0.7]]), torch.tensor([[0.4, 0.6], [0.5, 0.5]])
    assert torch.allclose(fuse(p, q, torch.tensor([0.25, 1.0])), torch.tensor([[0.5, 0.5], [0.3, 0.7]]))


@pytest.mark.parametrize("p, q, w, message", [
    (torch.eye(2), torch.eye(3), torch.full((2,), 0.5), "share a shape"),
    (torch.eye(2), torch.eye(2), torch.full((3,), 0.5), "weight must have shape"),
    (torch.eye(2), torch.eye(2), torch.full((2, 1), 0.5), "weight must have shape"),
    (torch.eye(2) * 2, torch.eye(2), torch.full((2,), 0.5), "p_local are not probabilities"),
    (torch.eye(2), torch.tensor([[1.5, -0.5], [0.5, 0.5]]), torch.full((2,), 0.5), "p_global are not probabilities"),
    (torch.eye(2), torch.eye(2), torch.tensor([0.5, 1.2]), "0..1"),
    (torch.eye(2), torch.eye(2), torch.tensor([0.5, float("nan")]), "0..1"),
    (torch.eye(2) * float("nan"), torch.eye(2), torch.full((2,), 0.5), "NaN"),
])
def test_fuse_refuses_what_is_not_a_mixture(p, q, w, message):
    with pytest.raises(ValueError, match=message): fuse(p, q, w)


def test_modules_give_distributions_and_weights_of_the_right_shape(data):
    m, gate, test = data
    for fusion, number in ((MeanFusion(), 0), (ScalarFusion(), 1), (AdaptiveFusion(m.logit_share), 2)):
        assert fusion.fit(*gate) is fusion and fusion.fitted_parameters == number and not list(fusion.parameters())
        w, p = fusion.weight(*test[:2]), fusion(*test[:2])
        assert w.shape == test[2].shape and p.shape == test[0].shape
        assert torch.allclose(p.sum(1), torch.ones(len(p)), atol=1e-5) and torch.equal(p, fuse(*test[:2], w))


def test_scalar_fit_is_the_best_weight_on_the_gate(data):
    _, gate, _ = data
    scalar = ScalarFusion().fit(*gate, strength=0)
    at = lambda w: F.nll_loss(fuse(*gate[:2], torch.full((len(gate[2]),), float(w))).log(), gate[2]).item()
    assert nll(scalar, gate) <= min(at(w) for w in torch.linspace(0.01, 0.99, 99)) + 1e-6


def test_scalar_starts_and_stays_at_the_mean_when_streams_are_alike(data):
    _, (p, _, y), _ = data
    assert ScalarFusion().weight(p, p)[0] == 0.5
    assert ScalarFusion().fit(p, p, y).weight(p, p)[0].item() == pytest.approx(0.5, abs=1e-4)


def test_adaptive_beats_mean_and_scalar_where_dominance_is_real(data):
    m, gate, test = data
    adaptive, scalar = AdaptiveFusion(m.logit_share).fit(*gate), ScalarFusion().fit(*gate)
    assert nll(adaptive, test) < 0.7 * min(nll(scalar, test), nll(MeanFusion(), test))
    w = adaptive.weight(*test[:2])
    assert w[test[2] < 4].mean() > 0.8 and w[test[2] >= 4].mean() < 0.2


def test_fit_is_a_local_minimum(data):
    m, gate, _ = data
    fusion = AdaptiveFusion(m.logit_share).fit(*gate, strength=0)
    best = nll(fusion, gate)
    for name in ("slope", "bias"):
        for step in (-0.3, 0.3):
            moved = AdaptiveFusion(m.logit_share); moved.load_state_dict(fusion.state_dict())
            getattr(moved, name).add_(step)
            assert nll(moved, gate) > best - 1e-6


def test_adaptive_starts_as_the_share_of_the_predicted_class(data):
    m = data[0]
    fusion = AdaptiveFusion(m.logit_share)
    assert torch.allclose(fusion.weight(torch.eye(8), torch.eye(8)), m.share.float(), atol=1e-6)
    torn = fusion.weight(torch.eye(8)[:1], torch.eye(8)[5:6])                        # the streams disagree: the mean prediction decides
    assert torn.item() == pytest.approx(torch.sigmoid(m.logit_share[[0, 5]].mean()).item(), abs=1e-6)


def test_adaptive_falls_back_to_the_scalar_on_a_flat_map_and_ignores_the_scale_of_the_map(data):
    m, gate, test = data
    flat = AdaptiveFusion(torch.full((8,), 0.4)).fit(*gate)
    assert torch.allclose(flat.weight(*test[:2]), ScalarFusion().fit(*gate).weight(*test[:2]), atol=0.01)
    one, third = (AdaptiveFusion(m.logit_share * c).fit(*gate, strength=0) for c in (1, 1 / 3))
    assert third.slope.item() == pytest.approx(3 * one.slope.item(), rel=0.02)
    assert torch.allclose(one.weight(*test[:2]), third.weight(*test[:2]), atol=2e-3)


def test_a_map_of_little_contrast_is_followed_as_sharply_as_its_videos_allow(data):
    m, gate, test = data
    strong, faint = (AdaptiveFusion(m.logit_share * c).fit(*gate) for c in (1, 0.1))
    nll = lambda fusion: -fusion(*test[:2]).gather(1, test[2][:, None]).log().mean().item()
    assert nll(faint) < 1.1 * nll(strong) and faint.slope > 7 * strong.slope


@pytest.mark.parametrize("n", [1, 5])
def test_a_tiny_gate_that_one_stream_wins_does_not_explode(n):
    p, q, y = torch.tensor([[1.0, 0.0]]).repeat(n, 1), torch.tensor([[0.0, 1.0]]).repeat(n, 1), torch.zeros(n, dtype=torch.long)
    scalar, adaptive = ScalarFusion().fit(p, q, y), AdaptiveFusion(torch.tensor([1.0, -1.0])).fit(p, q, y)
    assert 0.5 < scalar.weight(p, q)[0] < 0.99
    assert adaptive.slope.abs() < 10 and adaptive.bias.abs() < 10
    assert torch.isfinite(adaptive(p, q)).all()


def test_a_video_both_streams_rule_out_does_not_spoil_the_fit():
    p, q = torch.tensor([[0.9, 0.1]]).repeat(6, 1), torch.tensor([[0.5, 0.5]]).repeat(6, 1)
    lost, y = torch.tensor([[0.0, 1.0]]), torch.zeros(7, dtype=torch.long)
    with_lost = ScalarFusion().fit(torch.cat([p, lost]), torch.cat([q, lost]), y)
    assert with_lost.bias.item() == pytest.approx(ScalarFusion().fit(p, q, y[:6]).bias.item(), abs=1e-3) and with_lost.bias > 1


@pytest.mark.parametrize("fusion", [ScalarFusion(), AdaptiveFusion(torch.zeros(3))])
def test_fit_names_what_is_wrong(fusion):
    p, y = torch.full((4, 3), 1 / 3), torch.tensor([0, 1, 2, 0])
    with pytest.raises(ValueError, match="gate part is empty"): fusion.fit(p[:0], p[:0], y[:0])
    with pytest.raises(ValueError, match="0..2, found 1..3"): fusion.fit(p, p, y + 1)
    with pytest.raises(ValueError, match="integers"): fusion.fit(p, p, y.float())
    with pytest.raises(ValueError, match="shape"): fusion.fit(p, p, y[:3])
    with pytest.raises(ValueError, match="NaN"): fusion.fit(p * float("nan"), p, y)
    with pytest.raises(ValueError, match="not probabilities"): fusion.fit(p * 5, p, y)


@pytest.mark.parametrize("fusion", [ScalarFusion(), AdaptiveFusion(torch.zeros(3))])
def test_arrays_are_named_where_tensors_are_needed_and_taken_as_labels(fusion):
    p, y = torch.full((4, 3), 1 / 3), torch.tensor([0, 1, 2, 0])
    with pytest.raises(TypeError, match=r"p_local is a ndarray; fusions take tensors: torch.as_tensor\(p_local\)"): fusion.fit(p.numpy(), p, y)
    with pytest.raises(TypeError, match="p_global is a ndarray"): fusion(p, p.numpy())
    wanted = {n: v.clone() for n, v in fusion.fit(p, p, y).state_dict().items()}
    for labels in (y.numpy(), y.tolist()): assert all(torch.equal(v, wanted[n]) for n, v in fusion.fit(p, p, labels).state_dict().items())


@pytest.mark.parametrize("make, width", [(lambda: StackingFusion(3), 3), (lambda: FeatureFusion(5, 5, 3), 5)])
def test_a_program_that_computes_in_float64_by_default_fits_the_same(make, width):
    p, q, y = torch.rand(12, width).softmax(1), torch.rand(12, width).softmax(1), torch.arange(12) % 3
    wanted = make().fit(p, q, y).state_dict()
    torch.set_default_dtype(torch.float64)
    try: found = make().fit(p, q, y).state_dict()
    finally: torch.set_default_dtype(torch.float32)
    assert all(torch.allclose(found[n].float(), v, atol=1e-5) for n, v in wanted.items())


def test_adaptive_asks_for_the_shares_of_a_map(data):
    with pytest.raises(TypeError, match="logit_share is a DominanceMap; of a DominanceMap give map.logit_share"): AdaptiveFusion(data[0])


def test_adaptive_refuses_a_map_of_other_classes():
    with pytest.raises(ValueError, match="3 classes"): AdaptiveFusion(torch.zeros(3))(torch.eye(4), torch.eye(4))
    with pytest.raises(ValueError, match="finite"): AdaptiveFusion(torch.tensor([0.0, float("inf")]))


def test_fitting_works_where_gradients_are_off_and_ignores_the_callers_precision(data):
    m, (p, q, y), _ = data
    with torch.no_grad(): a = AdaptiveFusion(m.logit_share).fit(p, q, y)
    fusion = AdaptiveFusion(m.logit_share)
    with torch.inference_mode(): fusion.fit(p * 1.0, q * 1.0, y)
    assert fusion.slope.item() == pytest.approx(a.slope.item())
    b = AdaptiveFusion(m.logit_share).fit(p.double(), q.double(), y)
    assert a.slope.item() == pytest.approx(b.slope.item(), rel=1e-3) and a.slope.dtype == torch.float32


def test_state_goes_through_safetensors(data, tmp_path):
    m, gate, test = data
    for fusion, fresh in ((ScalarFusion(), ScalarFusion()), (AdaptiveFusion(m.logit_share), AdaptiveFusion(torch.zeros(8)))):
        fusion.fit(*gate)
        save_file(fusion.state_dict(), tmp_path / "fusion.safetensors")
        fresh.load_state_dict(load_file(tmp_path / "fusion.safetensors"))
        assert torch.equal(fresh(*test[:2]), fusion(*test[:2]))


# ---- the rivals
KINDS = ["ScalarFusion", "AdaptiveFusion", "ClassFusion", "EntropyFusion", "StackingFusion", "GateFusion"]


def make(kind, k):
    if kind == "AdaptiveFusion": return AdaptiveFusion(torch.linspace(-1, 1, k))
    return FUSIONS[kind].from_config({"num_classes": k} if kind in ("ClassFusion", "StackingFusion", "GateFusion") else {})


def table(n, k, lift=3.0, seed=0, labels=None):
    draw = torch.Generator().manual_seed(seed)
    y = torch.randint(0, k, (n,), generator=draw) if labels is None else labels
    return tuple((torch.randn(n, k, generator=draw) + lift * F.one_hot(y, k)).softmax(1) for _ in range(2)) + (y,)


def is_sound(fusion, p, q):
    out, w = fusion(p, q), fusion.weight(p, q)
    assert out.shape == p.shape and out.dtype == p.dtype and torch.isfinite(out).all() and (out >= 0).all()
    assert torch.allclose(out.sum(1), torch.ones_like(w), atol=1e-4) and w.shape == (len(p),) and ((w >= 0) & (w <= 1)).all()
    assert all(torch.isfinite(b).all() for name, b in fusion.state_dict().items() if name != "strength")
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_missing_on_the_gate_is_no_trouble(kind):
    p, q, y = table(60, 5, labels=torch.arange(60) % 4)                     # class 4 never occurs
    fusion = make(kind, 5).fit(p, q, y)
    a, b, t = table(100, 5, seed=1, labels=torch.full((100,), 4))
    assert (is_sound(fusion, a, b).argmax(1) == t).float().mean() > 0.5      # and is still found


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_videos_of_400_classes(kind):
    p, q, y = table(20, 400, lift=7)
    fusion = make(kind, 400).fit(p, q, y, sources=[f"s{i // 2}" for i in range(20)])
    a, b, t = table(200, 400, lift=7, seed=1)
    mean = (MeanFusion()(a, b).argmax(1) == t).float().mean()
    assert (is_sound(fusion, a, b).argmax(1) == t).float().mean() > mean - 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_of_exactly_0_and_1(kind):
    y = torch.arange(24) % 4
    right, wrong = F.one_hot(y, 4).float(), F.one_hot((y + 1) % 4, 4).float()
    fusion = make(kind, 4).fit(right, wrong, y)
    is_sound(fusion, right, wrong); is_sound(fusion, wrong, wrong)
    if kind != "AdaptiveFusion": assert (fusion(right, wrong).argmax(1) == y).all()


@pytest.mark.parametrize("kind", KINDS)
def test_streams_that_always_say_the_same(kind):
    y = torch.arange(40) % 4
    flat, stuck = torch.full((40, 4), 0.25), torch.tensor([[0.7, 0.1, 0.1, 0.1]]).expand(40, 4)
    good = table(40, 4, labels=y)[0]
    for p, q in ((flat, flat), (stuck, flat), (good, stuck)): is_sound(make(kind, 4).fit(p, q, y), p, q)
    assert (make(kind, 4).fit(good, flat, y)(good, flat).argmax(1) == y).float().mean() > 0.7


@pytest.mark.parametrize("kind", KINDS)
def test_float32_and_float64_fit_alike(kind):
    p, q, y = table(80, 4)
    a, b = make(kind, 4).fit(p, q, y), make(kind, 4).fit(p.double(), q.double(), y)
    assert torch.allclose(is_sound(a, p, q), b(p, q), atol=5e-3) and is_sound(a, p.double(), q.double()).dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS + ["FeatureFusion"])
def test_state_is_tensors_and_config_is_json(kind, tmp_path):
    p, q, y = table(40, 4)
    fusion = (FeatureFusion(4, 4, 4, hidden=3) if kind == "FeatureFusion" else make(kind, 4)).fit(p, q, y)
    assert not list(fusion.parameters()) and fusion.fitted_parameters > 0
    save_file(fusion.state_dict(), tmp_path / "f.safetensors")
    again = build_fusion(kind, json.loads(json.dumps(fusion.config)))
    assert not torch.equal(again(p, q), fusion(p, q))
    again.load_state_dict(load_file(tmp_path / "f.safetensors"))
    assert torch.equal(again(p, q), fusion(p, q)) and torch.equal(again.weight(p, q), fusion.weight(p, q))
    twice = build_fusion(kind, fusion.config).fit(p, q, y)
    assert torch.equal(twice(p, q), build_fusion(kind, fusion.config).fit(p, q, y)(p, q))           # a fit is reproducible
    with torch.inference_mode(): inside = build_fusion(kind, fusion.config).fit(p * 1.0, q * 1.0, y)
    assert torch.allclose(inside(p, q), twice(p, q), atol=1e-5)


def test_a_fusion_that_comes_back_is_fitted_apart_where_it_was():
    p, q, y = table(60, 4); sources = [str(i // 3) for i in range(60)]
    for apart in (False, True):
        fusion = AdaptiveFusion(torch.linspace(-1, 1, 4), apart).fit(p, q, y, sources=sources)
        again = build_fusion("AdaptiveFusion", json.loads(json.dumps(fusion.config))); again.load_state_dict(fusion.state_dict())
        assert again.apart is apart and again.config == fusion.config and torch.equal(again(p, q), fusion(p, q))
        assert torch.equal(again.fit(p, q, y, sources=sources)(p, q), fusion(p, q))
    assert AdaptiveFusion(torch.zeros(4)).config == {"num_classes": 4}                       # as in files that know no `apart`


@pytest.mark.parametrize("kind", ["ClassFusion", "EntropyFusion", "StackingFusion", "GateFusion"])
def test_rivals_name_what_is_wrong(kind):
    p, q, y = table(12, 3)
    fusion = make(kind, 3)
    with pytest.raises(ValueError, match="gate part is empty"): fusion.fit(p[:0], q[:0], y[:0])
    with pytest.raises(ValueError, match="0..2, found"): fusion.fit(p, q, y + 1)
    with pytest.raises(ValueError, match="integers"): fusion.fit(p, q, y.float())
    with pytest.raises(ValueError, match="p_global holds NaN"): fusion.fit(p, q * float("nan"), y)
    with pytest.raises(ValueError, match="sources has 3 entries for 12"): fusion.fit(p, q, y, sources=list("abc"))
    if kind != "EntropyFusion":
        with pytest.raises(ValueError, match="p_local has 4 classes.*num_classes=4"): fusion.fit(*table(12, 4))
        with pytest.raises(ValueError, match="4 classes, the fusion 3"): fusion(*table(12, 4)[:2])
        for wrong in (1, "3", 3.0, True):
            with pytest.raises(ValueError, match="num_classes must be a whole number"): FUSIONS[kind](wrong)


def test_build_fusion_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match="'Exec'.*known are MeanFusion"): build_fusion("Exec", {})
    with pytest.raises(ValueError, match="does not fit GateFusion"): build_fusion("GateFusion", {"classes": 3})
    with pytest.raises(ValueError, match="does not fit AdaptiveFusion"): build_fusion("AdaptiveFusion", {})


def test_class_weights_follow_their_class(data):
    _, gate, test = data
    fusion = ClassFusion(8).fit(*gate)
    assert fusion.bias[:4].min() > fusion.bias[4:].max() and nll(fusion, test) < nll(ScalarFusion().fit(*gate), test)
    missing = gate[2] != 0
    left = ClassFusion(8).fit(*(t[missing] for t in gate), strength=1e6)
    assert torch.allclose(left.bias, ScalarFusion().fit(*(t[missing] for t in gate)).bias.expand(8), atol=1e-2)


def test_entropy_weight_is_the_usual_rule_before_a_fit():
    p, q, _ = table(9, 5)
    h = [-(t * t.log()).sum(1) for t in (p, q)]
    assert torch.allclose(EntropyFusion().weight(p, q), (-h[0]).exp() / ((-h[0]).exp() + (-h[1]).exp()), atol=1e-6)


def test_stacking_learns_where_there_is_something_to_learn_and_the_pull_falls_with_data():
    few, many = table(20, 5, lift=1), table(1000, 5, lift=1)
    turned = lambda t: (t[0].roll(1, 1), t[1].roll(1, 1), t[2])                                   # answers name the wrong class, always
    fusion = StackingFusion(5).fit(*turned(many))
    a, b, y = turned(table(400, 5, lift=1, seed=2))
    assert (fusion(a, b).argmax(1) == y).float().mean() > (MeanFusion()(a, b).argmax(1) == y).float().mean() + 0.4
    assert fusion.strength <= StackingFusion(5).fit(*few).strength
    one = StackingFusion(5).fit(*few, sources=["same"] * 20)                                         # no folds to be had: the pool
    assert one.strength == float("inf") and is_sound(one, *few[:2]) is not None


def test_stacking_chooses_its_pull_by_sources():
    y = torch.randint(0, 4, (20,), generator=torch.Generator().manual_seed(0)).repeat_interleave(10)     # ten copies of each of twenty videos
    p, q, _ = (t.repeat_interleave(10, 0) for t in table(20, 4, lift=0.3, labels=y[::10]))
    by_video, by_source = StackingFusion(4).fit(p, q, y), StackingFusion(4).fit(p, q, y, sources=[f"s{i // 10}" for i in range(200)])
    assert by_video.strength < by_source.strength                     # copies in both halves make every weak pull look good


def test_damage(data):
    p = data[1][0]
    assert torch.allclose(corrupt(p, "noise", 0.0), p, atol=1e-4) and torch.equal(corrupt(p, "swap", 0.0), p)
    assert torch.allclose(corrupt(p, "drop", 1.0), torch.full_like(p, 1 / 8))
    swapped = corrupt(p, "swap", 1.0)
    assert torch.allclose(swapped.sum(0), p.sum(0), atol=1e-3) and not torch.equal(swapped, p)
    stuck = corrupt(p, "stuck", 1.0)
    assert torch.allclose(stuck, stuck[:1].expand_as(stuck)) and (p - stuck[0]).abs().sum(1).min() < 1e-5
    assert torch.equal(corrupt(p, "noise", 1.0, seed=3), corrupt(p, "noise", 1.0, seed=3)) and not torch.equal(corrupt(p, "noise", 1.0, seed=3), corrupt(p, "noise", 1.0, seed=4))
    with pytest.raises(ValueError, match="'fog'.*noise, drop, swap, stuck"): corrupt(p, "fog", 1)
    with pytest.raises(ValueError, match="swap takes 0..1"): corrupt(p, "swap", 2)


def test_a_gate_that_has_seen_damage_trusts_a_silent_stream_less(data):
    _, gate, test = data
    silent = corrupt(test[0], "drop", 1.0)
    seen, unseen = GateFusion(8).fit(*gate), GateFusion(8, corruption=False).fit(*gate)
    assert seen.weight(silent, test[1]).mean() < seen.weight(*test[:2]).mean() - 0.1
    assert nll(seen, (silent, *test[1:])) < nll(unseen, (silent, *test[1:]))
    assert nll(seen, test) < nll(MeanFusion(), test)


def test_features_learn_and_survive_the_loss_of_a_stream():
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(300) % 3
    centres = torch.randn(2, 3, 6, generator=draw) * 2
    e = [centres[i][y] + torch.randn(300, 6, generator=draw) for i in (0, 1)]
    fusion = FeatureFusion(6, 6, 3).fit(e[0][:200], e[1][:200], y[:200])
    top1 = lambda a, b: (fusion(a, b).argmax(1) == y[200:]).float().mean().item()
    assert top1(e[0][200:], e[1][200:]) > 0.9 and top1(e[0][200:], e[1][:200].mean(0).expand(100, 6)) > 0.7
    constant = FeatureFusion(6, 6, 3).fit(torch.ones(30, 6), e[1][:30], y[:30])
    assert torch.isfinite(constant(torch.ones(30, 6), e[1][:30])).all()
    with pytest.raises(ValueError, match="e_local must have shape .N, 6."): fusion(torch.zeros(2, 5), torch.zeros(2, 6))
    with pytest.raises(ValueError, match="e_global holds NaN"): fusion.fit(e[0], e[1] * float("nan"), y)
    with pytest.raises(ValueError, match="0..2"): fusion.fit(*e, y + 1)
    with pytest.raises(ValueError, match="same videos"): fusion(torch.zeros(2, 6), torch.zeros(3, 6))
    with pytest.raises(ValueError, match="empty"): fusion.fit(e[0][:0], e[1][:0], y[:0])


# ---- cross-fitting
class Spy(MeanFusion):
    met = []
    def fit(self, p_local, p_global, labels, sources=None):
        self.seen = set(sources)
        assert len(sources) == len(labels) == len(p_local) == len(p_global)
        return self
    def forward(self, p_local, p_global):
        Spy.met.append((self.seen, p_local[:, 0]))
        return super().forward(p_local, p_global)


def spied(sources, **options):
    Spy.met.clear()
    n = len(sources)
    first = torch.stack([torch.arange(n) / n, 1 - torch.arange(n) / n], 1)                  # the first column is the video's number
    out = cross_fit(Spy, first, first, torch.arange(n) % 2, sources, **options)
    assert torch.equal(out, first)                                                          # every video answered, in its place
    return [(seen, {sources[round(v * n)] for v in column.tolist()}) for seen, column in Spy.met]


def test_no_video_is_answered_by_a_fusion_that_has_seen_its_source():
    sources = [f"s{i % 13}" for i in range(60)]
    asked = spied(sources)
    assert len(asked) == 5 and all(not seen & held and seen | held == set(sources) for seen, held in asked)


@pytest.mark.parametrize("number, folds", [(2, 2), (3, 3), (5, 5), (9, 5)])
def test_few_sources_make_fewer_folds(number, folds):
    assert len(spied([f"s{i % number}" for i in range(40)])) == folds


def test_cross_fit_names_what_is_wrong():
    p, q, y = table(12, 3)
    with pytest.raises(ValueError, match="1 sources cannot be dealt into 2"): cross_fit(ScalarFusion, p, q, y, ["s"] * 12)
    with pytest.raises(ValueError, match="folds must be a whole number of at least 2, not 1"): cross_fit(ScalarFusion, p, q, y, list("abcdefabcdef"), folds=1)
    with pytest.raises(ValueError, match="12 and 12 answers for 11 labels"): cross_fit(ScalarFusion, p, q, y[:11], list("abcdefabcde"))
    with pytest.raises(ValueError, match="11 sources for labels"): cross_fit(ScalarFusion, p, q, y, list("abcdefabcde"))


@pytest.mark.parametrize("kind", ["ScalarFusion", "ClassFusion", "EntropyFusion", "StackingFusion", "AdaptiveFusion"])
def test_the_order_of_videos_does_not_matter(kind):
    p, q, y = table(60, 4)
    sources, order = [f"s{i // 4}" for i in range(60)], torch.randperm(60, generator=torch.Generator().manual_seed(1))
    one = cross_fit(lambda: make(kind, 4), p, q, y, sources)
    other = cross_fit(lambda: make(kind, 4), p[order], q[order], y[order], [sources[i] for i in order.tolist()])
    assert torch.allclose(one[order], other, atol=1e-4)


@pytest.fixture(scope="module")
def everything():
    p, q, y = table(120, 4, lift=1.5)
    embeddings = tuple(torch.randn(120, 60, generator=torch.Generator().manual_seed(s)) for s in (1, 2))      # they know nothing, and are many
    given = p, q, y, [f"s{i // 4}" for i in range(120)], torch.linspace(-1, 1, 4), embeddings
    return given, fit_all(*given)


def test_fit_all_gives_every_fusion_fitted_and_cross_fitted(everything):
    (p, q, y, sources, shares, embeddings), (fusions, held_out) = everything
    names = ["average", "scalar", "class", "entropy", "stacking", "gate", "adaptive", "features"]
    assert list(fusions) == list(held_out) == names and {type(f) for f in fusions.values()} == set(FUSIONS.values())
    for name in names:
        assert held_out[name].shape == (120, 4) and torch.allclose(held_out[name].sum(1), torch.ones(120), atol=1e-4)
    assert torch.equal(held_out["average"], (p + q) / 2) and torch.equal(fusions["adaptive"].logit_share, shares)
    assert torch.allclose(fusions["scalar"](p, q), ScalarFusion().fit(p, q, y)(p, q)) and torch.equal(held_out["scalar"], cross_fit(ScalarFusion, p, q, y, sources))
    assert not torch.allclose(held_out["class"], fusions["class"](p, q), atol=1e-3)
    assert "features" not in fit_all(p[:40], q[:40], y[:40], sources[:40], shares, folds=2)[0]


def test_a_fusion_that_overfits_is_found_out_by_its_cross_fitted_answers(everything):
    (p, q, y, _, _, embeddings), (fusions, held_out) = everything
    right = lambda answer: (answer.argmax(1) == y).float().mean().item()
    assert right(fusions["features"](*embeddings)) > right(held_out["average"]) > 0.5 > right(held_out["features"]) + 0.1


def test_the_same_seed_gives_the_same_answers(everything):
    (p, q, y, sources, shares, embeddings), _ = everything
    small = lambda seed: fit_all(p[:48], q[:48], y[:48], sources[:48], shares, tuple(e[:48] for e in embeddings), folds=2, seed=seed)[1]
    one, again = small(3), small(3)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["class"], cross_fit(lambda: ClassFusion(4), p[:48], q[:48], y[:48], sources[:48], folds=2, seed=4))          # other folds


# ---- ambiguity, early exit
@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 1.0])
def test_the_ambiguity_identity_is_exact(weight):
    p, q, y = table(50, 7)
    p, q = (t.double() / t.double().sum(1, keepdim=True) for t in (p, q))
    fused, streams, gain = ambiguity(p.log(), q.log(), y, weight)
    plain = p ** weight * q ** (1 - weight)
    plain = plain / plain.sum(1, keepdim=True)
    assert (fused + plain.gather(1, y[:, None])[:, 0].log()).abs().max() < 1e-10
    assert (fused - (streams - gain)).abs().max() < 1e-10 and (gain > -1e-12).all()
    assert ambiguity(p.log(), p.log(), y, weight)[2].abs().max() < 1e-12
    with pytest.raises(ValueError, match="weight must lie in 0..1, not 2"): ambiguity(p.log(), q.log(), y, 2)
    with pytest.raises(ValueError, match="log_p_global are not log-probabilities.*take log_softmax"): ambiguity(p.log(), 2*q.log(), y, weight)
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.\d+, found -1"): ambiguity(p.log(), q.log(), y - 1, weight)


def test_early_exit_by_hand():
    first = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.45, 0.55]])
    both = torch.tensor([[0.9, 0.1], [0.3, 0.7], [0.8, 0.2], [0.9, 0.1]])
    y = torch.tensor([0, 1, 1, 0])
    curve = early_exit(first, both, y, (1.0, 3.0), [0.0, 0.7, 0.85])
    assert curve.thresholds.tolist() == pytest.approx([0, 0.7, 0.85, 2]) and curve.stopped.tolist() == [1, 0.5, 0.25, 0]
    assert curve.gflops.tolist() == [1, 2.5, 3.25, 4] and curve.accuracy.tolist() == [0.5, 1, 0.75, 0.75]
    assert curve.choose() == pytest.approx(0.7) and curve.choose(0.25) == 0
    assert curve.stopped.tolist() == [may_stop(first, t).double().mean().item() for t in curve.thresholds.tolist()]
    leaning = early_exit(first, both, y, (1.0, 3.0), [0.0], share=torch.tensor([0.9, 0.1]))        # dominant on class 0 only
    assert leaning.stopped.tolist() == [0.5, 0]


def test_a_stream_may_stop_where_it_is_sure_and_dominant():
    p = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.1, 0.9]])
    assert may_stop(p, 0.89).tolist() == [True, False, True] and may_stop(p, 0.0).all() and not may_stop(p, 1.01).any()
    assert may_stop(p, 0.5, torch.tensor([0.9, 0.2])).tolist() == [True, True, False]
    assert may_stop(p, 0.5, torch.tensor([0.9, 0.2]), least_share=0.7).tolist() == [True, False, False]
    with pytest.raises(ValueError, match="1 - map.share"): may_stop(p, 0.5, torch.tensor([1.5, 0.0]))
    with pytest.raises(ValueError, match="pass softmax"): may_stop(9*p, 0.5)
    for wrong in (float("nan"), -.1):
        with pytest.raises(ValueError, match=f"threshold must be 0 or more, not {wrong}"): may_stop(p, wrong)


@pytest.mark.parametrize("change, message", [
    (dict(costs=(1.0, 0.0)), "costs must be two positive"), (dict(costs=(1.0,)), "costs must be two positive"),
    (dict(thresholds=[float("nan")]), "thresholds must be finite"), (dict(thresholds=[-0.1]), "thresholds must be finite"),
    (dict(share=torch.zeros(3)), "share must be .2,."), (dict(share=torch.tensor([0.5, 2.0])), "1 - map.share"),
    (dict(labels=torch.tensor([0, 2])), "labels must lie in 0..1"),
])
def test_early_exit_names_what_is_wrong(change, message):
    given = dict(p_first=torch.eye(2), p_fused=torch.eye(2), labels=torch.tensor([0, 1]), costs=(1.0, 2.0)) | change
    with pytest.raises(ValueError, match=message): early_exit(**given)


def test_a_threshold_from_the_gate_holds_on_the_test(data):
    m, gate, test = data
    adaptive = AdaptiveFusion(m.logit_share).fit(*gate)
    curve = lambda part: early_exit(part[0], adaptive(*part[:2]), part[2], (2.0, 8.0), torch.linspace(0.1, 1, 46), share=m.share)
    on_gate, on_test = curve(gate), curve(test)
    i = (on_test.thresholds - on_gate.choose(0.01)).abs().argmin()
    assert on_test.gflops[i] < 9 and on_test.accuracy[i] > on_test.accuracy[-1] - 0.05
    assert (on_test.gflops.diff() >= 0).all() and on_test.gflops[-1] == 10
    with pytest.raises(ValueError, match="tolerance must lie in 0..1, not 1.5"): on_gate.choose(1.5)


def test_a_tie_counts_as_wrong_in_an_early_exit_too():
    p, labels = torch.full((6, 3), 1/3), torch.zeros(6, dtype=torch.long)
    assert early_exit(p, p, labels, (1., 2.)).accuracy.tolist() == [0.]*len(early_exit(p, p, labels, (1., 2.)).accuracy)


def test_a_map_of_the_gate_itself_is_not_followed_where_it_shows_nothing():
    "Two streams that are alike in every class; each video has a say in the share of its own class."
    slopes = {False: [], True: []}
    for seed in range(4):
        draw, y = torch.Generator().manual_seed(seed), torch.arange(30).repeat_interleave(8)
        p, q = ((2 * (torch.randn(240, 30, generator=draw) + (1.6 + 1.2*torch.randn(240, 1, generator=draw)) * F.one_hot(y, 30))).softmax(1) for _ in range(2))
        m = measure(p.log(), q.log(), y, [str(i) for i in range(240)], [str(k) for k in range(30)], resamples=50)
        for apart in slopes: slopes[apart].append(float(AdaptiveFusion(m.logit_share, apart).fit(p, q, y, sources=[str(i) for i in range(240)]).slope))
    assert min(slopes[False]) > 2 and sum(slopes[True])/4 < 1.5


def test_no_map_is_followed_backwards():
    "Where nothing leans, shares of the other folds lean against a fold: without the bound, most of these slopes would be below zero."
    flat = 0
    for seed in range(8):
        draw, y = torch.Generator().manual_seed(seed), torch.arange(6).repeat_interleave(15)
        p, q = ((2 * (torch.randn(90, 6, generator=draw) + (1.6 + 1.2*torch.randn(90, 1, generator=draw)) * F.one_hot(y, 6))).softmax(1) for _ in range(2))
        fitted, scalar = AdaptiveFusion(torch.linspace(-1, 1, 6), apart=True).fit(p, q, y, sources=list(range(90))), ScalarFusion().fit(p, q, y)
        assert fitted.slope >= 0
        if fitted.slope == 0: flat += 1; assert torch.allclose(fitted(p, q), scalar(p, q), atol=1e-6)      # one weight for all remains
    assert flat >= 4


@pytest.mark.parametrize("count", [2, 3, 7])
def test_apart_takes_as_many_folds_as_there_are_sources(count):
    rng = torch.Generator().manual_seed(0)
    l, g = (torch.randn(60, 3, generator=rng).softmax(1) for _ in range(2)); y = torch.arange(60) % 3
    fusion = AdaptiveFusion(torch.zeros(3), apart=True).fit(l, g, y, sources=[f"s{i % count}" for i in range(60)])
    assert torch.isfinite(fusion(l, g)).all()
    for wrong, found in ((None, "none"), (["s"]*60, "1")):
        with pytest.raises(ValueError, match=f"give the sources of the videos.*{found} found"): AdaptiveFusion(torch.zeros(3), apart=True).fit(l, g, y, sources=wrong)


def test_the_decomposition_refuses_what_is_not_finite():
    z = torch.zeros(2, 3).log_softmax(1); broken = z.clone(); broken[0, 0] = -torch.inf
    with pytest.raises(ValueError, match="log_p_global holds NaN or infinite"): ambiguity(z, broken, torch.zeros(2, dtype=torch.long), 1.)


@pytest.mark.parametrize("make", [MeanFusion, ScalarFusion, lambda: AdaptiveFusion(torch.zeros(2)), lambda: ClassFusion(2), EntropyFusion, lambda: StackingFusion(2), lambda: GateFusion(2)])
@pytest.mark.parametrize("given", [torch.eye(2).numpy(), torch.eye(2).tolist()], ids=["array", "list"])
def test_every_fusion_says_that_it_takes_tensors(make, given):
    for ask in (make(), make().weight):
        with pytest.raises(TypeError, match="p_local is a .*fusions take tensors"): ask(given, given)


@pytest.mark.parametrize("weight", [0.5, 1, [0.5, 0.5], torch.full((2,), 0.5).numpy()])
def test_a_weight_is_one_for_each_video(weight):
    with pytest.raises(TypeError, match=f"weight is a {type(weight).__name__}; give one for each video"): fuse(torch.eye(2), torch.eye(2), weight)


@pytest.mark.parametrize("given, error, message", [(torch.randn(5, 4), ValueError, "rows of p are not probabilities"), (torch.eye(3) * float("nan"), ValueError, "p holds NaN"), ([[1.0, 0.0]], TypeError, "p is a list"),
                                                   (torch.eye(3)[:, None], ValueError, "shape .N, K.")])
@pytest.mark.parametrize("kind", ["noise", "drop", "swap", "stuck"])
def test_only_probabilities_are_damaged(given, error, message, kind):
    "Logits came back as other numbers, without a word."
    with pytest.raises(error, match=message): corrupt(given, kind, 1.0)


def test_labels_may_be_a_list_wherever_fusions_are_compared(data):
    m, gate, _ = data
    sources = [str(i // 4) for i in range(len(gate[2]))]
    for labels in (gate[2].tolist(), gate[2].numpy(), gate[2].to(torch.int16)):
        assert torch.equal(cross_fit(ScalarFusion, *gate[:2], labels, sources), cross_fit(ScalarFusion, *gate, sources))
        assert torch.equal(early_exit(*gate[:2], labels, (1., 2.)).accuracy, early_exit(*gate, (1., 2.)).accuracy)
    with pytest.raises(TypeError, match="make is a fusion; give what makes one: ScalarFusion"): cross_fit(ScalarFusion(), *gate, sources)


def test_a_share_may_be_a_list_and_is_no_log_odds(data):
    m, gate, _ = data
    assert torch.equal(may_stop(gate[0], 0.5, m.share.tolist()), may_stop(gate[0], 0.5, m.share.float()))
    with pytest.raises(ValueError, match=r"share must lie in 0..1, found -.*pass map.share and not map.logit_share"): may_stop(gate[0], 0.5, m.logit_share)
    with pytest.raises(TypeError, match="p_first is a list"): may_stop(gate[0].tolist(), 0.5)
