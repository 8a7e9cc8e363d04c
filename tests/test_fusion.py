import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from mbd.dominance import fit_temperature, measure, simulate_streams
from mbd.fusion import AdaptiveFusion, MeanFusion, ScalarFusion, fuse


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
