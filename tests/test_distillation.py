from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from mbd.distillation import ARMS, Distillation, directions, distillation_loss, pair_stages, relation_loss, relations, soft_kl


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def output(seed, channels, names, batch=6, classes=5):
    stages = OrderedDict((n, randn(batch, channels, 4, 3, 3, seed=seed + i + 1).requires_grad_()) for i, n in enumerate(names))
    return SimpleNamespace(logits=randn(batch, classes, seed=seed).requires_grad_(), stages=stages)


def streams():
    return (output(0, 8, ["c1", "c2", "c3"]), output(10, 12, ["b1", "b2"]), output(20, 8, ["c1", "c2", "c3"]), output(30, 12, ["b1", "b2"]))


CODES, LABELS = torch.tensor([1, 1, 0, 0, -1, -1]), torch.arange(6) % 5


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_soft_kl_equals_the_formula_in_float64_and_torch_batchmean(temperature):
    z, t = randn(7, 5), randn(7, 5, seed=1)
    p, q = (t.double() / temperature).softmax(1), (z.double() / temperature).softmax(1)
    exact = temperature ** 2 * (p * (p.log() - q.log())).sum(1)
    assert torch.allclose(soft_kl(z, t, temperature).double(), exact, atol=1e-5)
    torch_mean = temperature ** 2 * F.kl_div((z / temperature).log_softmax(1), (t / temperature).softmax(1), reduction="batchmean")
    assert torch.allclose(soft_kl(z, t, temperature).mean(), torch_mean, atol=1e-5)


def test_soft_kl_has_the_gradient_of_cross_entropy_with_soft_labels():
    z, t = randn(4, 5).double().requires_grad_(), randn(4, 5, seed=1).double().requires_grad_()
    soft_kl(z, t, 3.0).sum().backward()
    assert torch.allclose(z.grad, 3 * ((z / 3).softmax(1) - (t / 3).softmax(1))) and t.grad is None


def test_soft_kl_keeps_the_gradient_scale_over_temperatures():
    def size(T):
        z = randn(50, 8).requires_grad_()
        soft_kl(z, randn(50, 8, seed=1), T).mean().backward()
        return z.grad.norm().item()
    assert size(8.0) == pytest.approx(size(16.0), rel=0.1) and 0.3 < size(1.0) / size(16.0) < 3


def test_soft_kl_survives_extreme_logits_and_half_precision():
    far = soft_kl(torch.tensor([[0.0, 900.0]]), torch.tensor([[900.0, 0.0]]), 1.0)
    assert far.item() == pytest.approx(900, rel=1e-5)
    half = soft_kl(randn(4, 5).half(), randn(4, 5, seed=1).half(), 2.0)
    assert half.dtype == torch.float32 and torch.isfinite(half).all() and (half > 0).all()


def test_soft_kl_refuses_bad_shapes_and_temperatures():
    with pytest.raises(ValueError, match=r"\(2, 3\)"): soft_kl(torch.zeros(2, 3), torch.zeros(2, 4), 1.0)
    for T in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature"): soft_kl(torch.zeros(2, 3), torch.zeros(2, 3), T)


def test_relation_loss_compares_maps_of_any_shapes_and_is_zero_for_the_same_relations():
    a, b = randn(5, 8, 4, 6, 6), randn(5, 3, 2, 2, 7, seed=1)
    assert relation_loss(a, b).ndim == 0 and relation_loss(a, b) > 0
    assert relation_loss(a, a) < 1e-12
    turned = torch.einsum("bcthw,dc->bdthw", a, torch.linalg.qr(randn(8, 8, seed=2))[0])     # channels mixed by a rotation
    assert relation_loss(7 * turned + 3, a) < 1e-9                                            # scale and level do not matter either


def test_relation_loss_equals_the_formula():
    a, b, w = randn(4, 6, 2, 3, 3).double(), randn(4, 5, 3, 2, 2, seed=1).double(), torch.tensor([1.0, 0, 0.5, 0])
    def similarity(m):
        f = m.mean((2, 3, 4)); f = f - f.mean(0)
        return torch.stack([torch.stack([F.cosine_similarity(x, y, dim=0) for y in f]) for x in f])
    rows = ((similarity(a) - similarity(b)) ** 2).sum(1) / 3
    assert relation_loss(a, b).item() == pytest.approx(rows.mean().item())
    assert relation_loss(a, b, w).item() == pytest.approx(((rows * w).sum() / 4).item())


def test_relation_loss_moves_only_the_videos_taught_and_never_the_teacher():
    a, b = randn(5, 8, 2, 3, 3).requires_grad_(), randn(5, 4, 2, 3, 3, seed=1).requires_grad_()
    relation_loss(a, b, torch.tensor([0.0, 1, 0, 1, 0])).backward()
    size = a.grad.flatten(1).norm(dim=1)
    assert (size[[0, 2, 4]] == 0).all() and (size[[1, 3]] > 0).all() and b.grad is None


def test_following_the_relation_gradient_brings_the_relations_together():
    a, b = randn(6, 8, 1, 2, 2).requires_grad_(), randn(6, 12, 2, 1, 1, seed=1)
    first, step = relation_loss(a, b).item(), torch.optim.Adam([a], lr=0.05)
    for _ in range(150):
        step.zero_grad(); relation_loss(a, b).backward(); step.step()
    assert relation_loss(a, b).item() < first / 20


def test_relation_loss_stays_finite_on_constant_maps():
    a = torch.ones(4, 3, 1, 2, 2, requires_grad=True)
    loss = relation_loss(a, randn(4, 3, 1, 2, 2))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(a.grad).all()


def test_mixed_precision_changes_neither_loss():
    a, b = randn(5, 8, 2, 3, 3), randn(5, 4, 2, 3, 3, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = relation_loss(a, b), soft_kl(a[:, :, 0, 0, 0], a[:, :, 1, 0, 0], 2.0)
    assert torch.equal(mixed[0], relation_loss(a, b)) and torch.allclose(mixed[1], soft_kl(a[:, :, 0, 0, 0], a[:, :, 1, 0, 0], 2.0), atol=1e-5)


def test_relation_loss_refuses_single_videos_and_unequal_batches():
    with pytest.raises(ValueError, match="B >= 2"): relation_loss(randn(1, 3, 1, 2, 2), randn(1, 3, 1, 2, 2))
    with pytest.raises(ValueError, match="batches differ"): relation_loss(randn(3, 3, 1, 2, 2), randn(4, 3, 1, 2, 2))
    with pytest.raises(ValueError, match="weight"): relation_loss(randn(3, 3, 1, 2, 2), randn(3, 3, 1, 2, 2), torch.ones(2))


def test_relations_are_unit_rows_around_the_batch_mean():
    u = relations(randn(6, 9, 2, 3, 3).abs() + 5)
    assert u.shape == (6, 9) and torch.allclose(u.norm(dim=1), torch.ones(6)) and (u @ u.T).min() < -0.1


@pytest.mark.parametrize("arm, to_global, to_local", [
    ("directed", [1, 0, 0], [0, 0, 1]), ("reversed", [0, 0, 1], [1, 0, 0]), ("both", [1, 1, 1], [1, 1, 1]), ("none", [0, 0, 0], [0, 0, 0])])
def test_directions_follow_the_group(arm, to_global, to_local):
    g, l = directions(torch.tensor([1, 0, -1]), arm)
    assert g.tolist() == to_global and l.tolist() == to_local and g.is_floating_point()


def test_directions_refuse_unknown_arms_and_codes():
    with pytest.raises(ValueError, match="directed, both, reversed, none"): directions(torch.tensor([1]), "forward")
    with pytest.raises(ValueError, match="codes"): directions(torch.tensor([2]))


@pytest.mark.parametrize("n, m, expected", [
    (3, 3, [(0, 0), (1, 1), (2, 2)]), (4, 3, [(0, 0), (2, 1), (3, 2)]), (3, 4, [(0, 0), (1, 2), (2, 3)]), (1, 5, [(0, 4)]), (4, 2, [(1, 0), (3, 1)])])
def test_stages_pair_by_relative_depth_and_the_last_meet(n, m, expected):
    pairs = pair_stages([f"c{i}" for i in range(n)], [f"b{i}" for i in range(m)])
    assert pairs == [(f"c{i}", f"b{j}") for i, j in expected]


def test_pairing_needs_stages():
    with pytest.raises(ValueError, match="intermediate_weight"): pair_stages([], ["b1"])


@pytest.mark.parametrize("change", [dict(arm="forward"), dict(temperature=0.0), dict(temperature=float("nan")), dict(final_weight=-1.0), dict(intermediate_weight=float("inf"))])
def test_config_refuses_impossible_values(change):
    with pytest.raises(ValueError, match=next(iter(change))): Distillation(**change)


@pytest.mark.parametrize("arm", ARMS)
def test_gradient_reaches_the_stream_taught_and_never_a_teacher(arm):
    local, global_, teacher_local, teacher_global = streams()
    config = Distillation(arm=arm, only_right_teacher=False)
    loss, parts = distillation_loss(local, global_, teacher_local, teacher_global, LABELS, CODES, config)
    to_global, to_local = directions(CODES, arm)
    if arm == "none":
        assert loss.item() == 0 and not loss.requires_grad
    else:
        loss.backward()
        for stream, mask in ((global_, to_global), (local, to_local)):
            assert torch.equal(stream.logits.grad.norm(dim=1) > 0, mask > 0)
            assert torch.equal(list(stream.stages.values())[-1].grad.flatten(1).norm(dim=1) > 0, mask > 0)
    for teacher in (teacher_local, teacher_global):
        assert teacher.logits.grad is None and all(m.grad is None for m in teacher.stages.values())
    assert not any(value.requires_grad for value in parts.values())


def test_live_peers_as_teachers_are_not_moved_as_teachers():
    local, global_, _, _ = streams()
    codes = torch.ones(6, dtype=torch.long)                                        # local teaches global on every video
    distillation_loss(local, global_, local, global_, LABELS, codes, Distillation(only_right_teacher=False))[0].backward()
    assert (global_.logits.grad != 0).any() and (local.logits.grad is None or (local.logits.grad == 0).all())


def test_the_loss_is_the_weighted_sum_of_its_parts_over_the_whole_batch():
    local, global_, teacher_local, teacher_global = streams()
    config = Distillation(temperature=3.0, final_weight=0.7, intermediate_weight=0.2, only_right_teacher=False)
    loss, parts = distillation_loss(local, global_, teacher_local, teacher_global, LABELS, CODES, config)
    by_hand = soft_kl(global_.logits, teacher_local.logits, 3.0)[:2].sum() / 6
    assert parts["final_to_global"].item() == pytest.approx(by_hand.item(), rel=1e-5)
    pairs = pair_stages(local.stages, global_.stages)
    inter = sum(relation_loss(local.stages[l], teacher_global.stages[g], (CODES == -1).float()) for l, g in pairs) / len(pairs)
    assert parts["intermediate_to_local"].item() == pytest.approx(inter.item(), rel=1e-5)
    total = 0.7 * (parts["final_to_global"] + parts["final_to_local"]) + 0.2 * (parts["intermediate_to_global"] + parts["intermediate_to_local"])
    assert loss.item() == pytest.approx(total.item(), rel=1e-5) and parts["taught_global"].item() == pytest.approx(2 / 6)


def test_only_right_teachers_teach():
    local, global_, teacher_local, teacher_global = streams()
    wrong = (teacher_local.logits.argmax(1) + 1) % 5
    labels = torch.where(torch.arange(6) == 0, teacher_local.logits.argmax(1), wrong)
    _, parts = distillation_loss(local, global_, teacher_local, teacher_global, labels, torch.ones(6, dtype=torch.long))
    assert parts["taught_global"].item() == pytest.approx(1 / 6)
    assert parts["final_to_global"].item() == pytest.approx(soft_kl(global_.logits, teacher_local.logits, 2.0)[0].item() / 6, rel=1e-5)


def test_switched_off_parts_are_absent_and_stages_can_be_chosen():
    s = streams()
    _, parts = distillation_loss(*s, LABELS, CODES, Distillation(intermediate_weight=0.0))
    assert "final_to_global" in parts and "intermediate_to_global" not in parts
    chosen = distillation_loss(*s, LABELS, CODES, Distillation(final_weight=0.0, only_right_teacher=False), stages=[("c1", "b2")])[1]
    expected = relation_loss(s[1].stages["b2"], s[2].stages["c1"], (CODES == 1).float())
    assert "final_to_global" not in chosen and chosen["intermediate_to_global"].item() == pytest.approx(expected.item(), rel=1e-5)
