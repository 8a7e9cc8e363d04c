import copy, itertools, math
from collections import OrderedDict
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from mbd.clips import Augmentation, ClipDataset, View
from mbd.fusion import MeanFusion
from mbd.distillation import (ARMS, INTERMEDIATES, Distillation, Placement, Projections, Teacher, align, attention_loss, cell_edges, cell_overlap, compare_gradients, decoupled_kl, directions,
                              distillation_loss, distillation_terms, hint_loss, lesson_mask, logit_loss, pair_stages, relation_loss, relations, soft_kl, weight_at, weighted_sum, Lesson, exchange, presumed_groups)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def output(seed, channels, names, batch=6, classes=5):
    stages = OrderedDict((n, randn(batch, channels, 4, 3, 3, seed=seed + i + 1).requires_grad_()) for i, n in enumerate(names))
    return SimpleNamespace(logits=randn(batch, classes, seed=seed).requires_grad_(), stages=stages)


def streams():
    return (output(0, 8, ["c1", "c2", "c3"]), output(10, 12, ["b1", "b2"]), output(20, 8, ["c1", "c2", "c3"]), output(30, 12, ["b1", "b2"]))


CODES, LABELS = torch.tensor([1, 1, 0, 0, -1, -1]), torch.arange(6) % 5


def place(batch=6, t0=0.0, t1=30.0, frames=16, box=(0, 0, 56, 56), flip=False):
    full = lambda v: torch.full((batch,), float(v), dtype=torch.float64) if not torch.is_tensor(v) else v.double()
    return Placement(full(t0), full(t1), torch.tensor([box] * batch), torch.full((batch,), flip), frames)


# ---- plain references in float64: loops over numbers, nothing shared with the module

def plain_softmax(row): top = max(row); e = [math.exp(v - top) for v in row]; return [v / sum(e) for v in e]

def plain_kl(p, q): return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q) if a > 0)

def plain_edges(t0, t1, frames, cells):
    length = (t1 - t0) / (frames - 1) * frames
    return [(t0 + t1) / 2 - length / 2 + length * j / cells for j in range(cells + 1)]

def plain_mix(values, edges, wanted):
    "Values on cells `edges`, averaged over the parts of the cells `wanted` that they cover; and the covered fractions."
    out, covered = [], []
    for a, b in zip(wanted, wanted[1:]):
        parts = [max(0.0, min(b, d) - max(a, c)) for c, d in zip(edges, edges[1:])]
        out.append(sum(w * v for w, v in zip(parts, values)) / sum(parts) if sum(parts) else 0.0); covered.append(sum(parts) / (b - a))
    return out, covered

def plain_align(student, teacher, times_student, times_teacher):
    "Lists [t][h][w] of two maps (T, H, W) on their coarser cells, and the coverage; times = (t0, t1, frames)."
    maps, edges = [student.tolist(), teacher.tolist()], [plain_edges(*times, len(m)) for times, m in ((times_student, student), (times_teacher, teacher))]
    coarse = 0 if edges[0][1] - edges[0][0] >= edges[1][1] - edges[1][0] else 1
    fine, H, W = 1 - coarse, len(maps[1 - coarse][0]), len(maps[1 - coarse][0][0])
    columns = {(h, w): plain_mix([frame[h][w] for frame in maps[fine]], edges[fine], edges[coarse]) for h in range(H) for w in range(W)}
    coverage = columns[0, 0][1]
    maps[fine] = [[[columns[h, w][0][t] for w in range(W)] for h in range(H)] for t in range(len(coverage))]
    sides = {n: [i / n for i in range(n + 1)] for n in range(1, 20)}
    h, w = min(len(m[0]) for m in maps), min(len(m[0][0]) for m in maps)
    def shrink(frame):
        rows = [plain_mix(row, sides[len(row)], sides[w])[0] for row in frame]
        return [list(r) for r in zip(*[plain_mix(list(c), sides[len(rows)], sides[h])[0] for c in zip(*rows)])]
    return [[shrink(frame) for frame in m] for m in maps] + [coverage]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_soft_kl_equals_the_formula_in_float64_and_torch_batchmean(temperature):
    z, t = randn(7, 5), randn(7, 5, seed=1)
    p, q = (t.double() / temperature).softmax(1), (z.double() / temperature).softmax(1)
    exact = temperature ** 2 * (p * (p.log() - q.log())).sum(1)
    assert torch.allclose(soft_kl(z, t, temperature).double(), exact, atol=1e-5)
    torch_mean = temperature ** 2 * F.kl_div((z / temperature).log_softmax(1), (t / temperature).softmax(1), reduction="batchmean")
    assert torch.allclose(soft_kl(z, t, temperature).mean(), torch_mean, atol=1e-5)


def test_soft_kl_equals_loops_and_the_libraries():
    z, t = randn(5, 4).double(), randn(5, 4, seed=1).double()
    loops = [9 * plain_kl(plain_softmax([v / 3 for v in b]), plain_softmax([v / 3 for v in a])) for a, b in zip(z.tolist(), t.tolist())]
    assert soft_kl(z, t, 3.0).tolist() == pytest.approx(loops)
    categorical = lambda x: torch.distributions.Categorical(logits=x / 3)
    assert torch.allclose(soft_kl(z, t, 3.0), 9 * torch.distributions.kl_divergence(categorical(t), categorical(z)))


@pytest.mark.slow
def test_soft_kl_equals_timms_distillation_task():
    task = pytest.importorskip("timm.task", reason="this timm has no distillation task")
    class Fixed(nn.Module):
        pretrained_cfg, num_classes, in_chans = dict(mean=(0.5,) * 3, std=(0.5,) * 3), 4, 3
        def __init__(self, logits): super().__init__(); self.logits = nn.Parameter(logits)
        def forward(self, x): return self.logits
    z, t = randn(6, 4), randn(6, 4, seed=1)
    theirs = task.LogitDistillationTask(Fixed(z), Fixed(t), criterion=nn.CrossEntropyLoss(), distill_loss_weight=1.0, temperature=2.5, verbose=False)
    assert soft_kl(z, t, 2.5).mean().item() == pytest.approx(theirs(torch.zeros(6, 3, 2, 2), torch.zeros(6, dtype=torch.long))["kd_loss"].item(), rel=1e-5)


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


def test_relation_loss_equals_loops():
    a, b = randn(4, 3, 2, 2, 1).double(), randn(4, 5, 1, 2, 3, seed=1).double()
    def similarity(m):
        f = [[sum(c.flatten().tolist()) / c.numel() for c in video] for video in m]
        f = [[v - sum(row[k] for row in f) / 4 for k, v in enumerate(video)] for video in f]
        return [[sum(x * y for x, y in zip(u, v)) / math.sqrt(sum(x * x for x in u) * sum(y * y for y in v)) for v in f] for u in f]
    s, t = similarity(a), similarity(b)
    rows = [sum((s[i][j] - t[i][j]) ** 2 for j in range(4) if j != i) / 3 for i in range(4)]
    assert relation_loss(a, b).item() == pytest.approx(sum(rows) / 4)


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
    for few in (1, 2):
        with pytest.raises(ValueError, match=f"batch of 3 or more, not {few}.*batch_size"): relation_loss(randn(few, 3, 1, 2, 2), randn(few, 3, 1, 2, 2))
    with pytest.raises(ValueError, match="batches differ"): relation_loss(randn(3, 3, 1, 2, 2), randn(4, 3, 1, 2, 2))
    with pytest.raises(ValueError, match="weight"): relation_loss(randn(3, 3, 1, 2, 2), randn(3, 3, 1, 2, 2), torch.ones(2))


def test_relations_are_unit_rows_around_the_batch_mean():
    u = relations(randn(6, 9, 2, 3, 3).abs() + 5)
    assert u.shape == (6, 9) and torch.allclose(u.norm(dim=1), torch.ones(6)) and (u @ u.T).min() < -0.1


@pytest.mark.parametrize("arm, to_global, to_local", [
    ("directed", [1, 0, 0], [0, 0, 1]), ("reversed", [0, 0, 1], [1, 0, 0]), ("both", [1, 1, 1], [1, 1, 1]), ("none", [0, 0, 0], [0, 0, 0]),
    ("to_global", [1, 1, 1], [0, 0, 0]), ("to_local", [0, 0, 0], [1, 1, 1])])
def test_directions_follow_the_group(arm, to_global, to_local):
    g, l = directions(torch.tensor([1, 0, -1]), arm)
    assert g.tolist() == to_global and l.tolist() == to_local and g.is_floating_point()


def test_directions_refuse_unknown_arms_and_codes():
    with pytest.raises(ValueError, match="directed, both, reversed, to_global, to_local, none"): directions(torch.tensor([1]), "forward")
    with pytest.raises(ValueError, match="codes"): directions(torch.tensor([2]))


@pytest.mark.parametrize("n, m, expected", [
    (3, 3, [(0, 0), (1, 1), (2, 2)]), (4, 3, [(0, 0), (2, 1), (3, 2)]), (3, 4, [(0, 0), (1, 2), (2, 3)]), (1, 5, [(0, 4)]), (4, 2, [(1, 0), (3, 1)])])
def test_stages_pair_by_relative_depth_and_the_last_meet(n, m, expected):
    pairs = pair_stages([f"c{i}" for i in range(n)], [f"b{i}" for i in range(m)])
    assert pairs == [(f"c{i}", f"b{j}") for i, j in expected]


def test_pairing_needs_stages():
    with pytest.raises(ValueError, match="intermediate_weight"): pair_stages([], ["b1"])


@pytest.mark.parametrize("change", [dict(arm="forward"), dict(temperature=0.0), dict(temperature=float("nan")), dict(temperature="hot"), dict(temperature=True), dict(final_weight=-1.0), dict(intermediate_weight=float("inf")),
    dict(only_right_teacher=1), dict(student_below=0), dict(student_below=1.5), dict(final="dkd"), dict(target_weight=-1), dict(other_weight=None), dict(intermediate="fitnet"), dict(teacher="ema"),
    dict(teacher_decay=1.0), dict(teacher_decay=0), dict(warm_up=-0.1), dict(fade=1.1), dict(lesson="own"), dict(sure_above=1.0), dict(sure_above=-0.1)])
def test_config_names_the_field_and_the_value_it_refuses(change):
    (name, value), = change.items()
    with pytest.raises(ValueError) as error: Distillation(**change)
    assert name in str(error.value) and repr(value).strip("'") in str(error.value)


def test_a_warm_up_and_a_fade_that_overlap_are_refused():
    with pytest.raises(ValueError, match="warm_up = 0.7 and fade = 0.6.*lower"): Distillation(warm_up=0.7, fade=0.6)
    Distillation(warm_up=0.7, fade=0.3)


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


def test_without_a_label_the_group_is_that_of_the_class_the_teachers_mean_puts_first():
    codes = torch.tensor([1, 1, -1])
    local, global_ = torch.tensor([[9., 0, 0], [0, 1, 0], [0, 0, 0]]), torch.tensor([[0., 0, 1], [0, 0, 9.], [0, 0, 2.]])
    assert presumed_groups(torch.tensor([-1, -1, -1]), codes, local, global_).tolist() == [1, -1, -1]
    assert presumed_groups(torch.tensor([2, -1, 0]), codes, local, global_).tolist() == [-1, -1, 1]       # a label decides where there is one


def test_masks_ask_of_a_label_only_where_there_is_one():
    teacher, student = torch.tensor([[3., 0, 0], [3., 0, 0], [.1, 0, 0]]), torch.tensor([[0., 9, 0]] * 3)
    mask = lambda labels, **more: lesson_mask(student, teacher, torch.tensor(labels), **more).tolist()
    assert mask([0, 1, 1]) == [1, 0, 0] and mask([0, -1, -1]) == [1, 1, 1]
    assert mask([1, -1, 0], only_right_teacher=False, student_below=.5) == [0, 1, 1]


@pytest.mark.parametrize("labels", [[0, 0, 0], [-1, -1, -1], [1, -1, 0]])
def test_an_unsure_teacher_gives_no_lesson_with_a_label_or_without(labels):
    teacher, student = torch.tensor([[3., 0, 0], [3., 0, 0], [.1, 0, 0]]), torch.zeros(3, 3)
    mask = lambda above: lesson_mask(student, teacher, torch.tensor(labels), only_right_teacher=False, sure_above=above).tolist()
    assert mask(0.) == [1, 1, 1] and mask(.8) == [1, 1, 0] and mask(.95) == [0, 0, 0]
    teaching = Distillation(arm="both", intermediate_weight=0., only_right_teacher=False, sure_above=.95)      # and no loss: where nobody is sure, labels are all that is learnt from
    outputs = [Lesson(student.clone().requires_grad_(), {}) for _ in "lg"] + [Lesson(teacher, {}) for _ in "lg"]
    loss = lambda config: float(distillation_loss(*outputs, torch.tensor(labels), torch.ones(3, dtype=torch.long), config)[0])
    assert loss(teaching) == 0 < loss(replace(teaching, sure_above=.8))


def test_a_split_off_label_needs_one():
    outputs = streams()
    with pytest.raises(ValueError, match="final='soft'"): distillation_loss(*outputs, torch.full_like(LABELS, -1), CODES, Distillation(final="decoupled", intermediate_weight=0.))


@pytest.mark.parametrize("lesson, of_global, of_local", [("other", [1., 0], [0, 2.]), ("self", [0, 2.], [1., 0]), ("fused", None, None)])
def test_whose_answer_each_stream_hears(lesson, of_global, of_local):
    local, global_ = (Lesson(torch.tensor([z]), {"stage": torch.ones(1)}) for z in ([1., 0], [0, 2.]))
    to_global, to_local = exchange(local, global_, lesson, fusion=MeanFusion())
    if lesson != "fused": assert to_global.logits[0].tolist() == of_global and to_local.logits[0].tolist() == of_local
    else:
        mean = (local.logits.softmax(1) + global_.logits.softmax(1)) / 2
        assert torch.allclose(to_global.logits.exp(), mean) and torch.equal(to_global.logits, to_local.logits) and not to_global.stages


def test_lessons_that_teach_the_last_layer_only_say_so():
    with pytest.raises(ValueError, match="lesson='self'.*intermediate_weight.*0"): Distillation(lesson="self")
    with pytest.raises(ValueError, match="fusion"): exchange(None, None, "fused")
    with pytest.raises(ValueError, match="groups"): exchange(None, None, "dominant")


def test_both_hear_the_dominant_stream_and_themselves_where_nobody_is():
    local, global_ = (Lesson(torch.full((3, 2), v), {}) for v in (1., 2.))
    to_global, to_local = exchange(local, global_, "dominant", torch.tensor([1, 0, -1]))
    assert to_global.logits[:, 0].tolist() == [1, 2, 2] and to_local.logits[:, 0].tolist() == [1, 1, 2]


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
    assert torch.equal(loss, total) and parts["taught_global"].item() == pytest.approx(2 / 6)


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


# ---- decoupled

@pytest.mark.parametrize("temperature, alpha, beta", [(1.0, 1.0, 1.0), (2.0, 1.0, 8.0), (4.0, 0.0, 1.0), (0.5, 2.0, 0.0)])
def test_decoupled_equals_loops_and_torch_distributions(temperature, alpha, beta):
    z, t, y = randn(6, 5).double(), randn(6, 5, seed=1).double(), torch.tensor([0, 1, 2, 3, 4, 0])
    loops = []
    for a, b, k in zip(z.tolist(), t.tolist(), y.tolist()):
        q, p = plain_softmax([v / temperature for v in a]), plain_softmax([v / temperature for v in b])
        rest = lambda r: [v / (1 - r[k]) for i, v in enumerate(r) if i != k]
        loops.append(temperature ** 2 * (alpha * plain_kl([p[k], 1 - p[k]], [q[k], 1 - q[k]]) + beta * plain_kl(rest(p), rest(q))))
    ours = decoupled_kl(z, t, y, temperature, alpha, beta)
    assert ours.tolist() == pytest.approx(loops, rel=1e-9)
    sure = lambda x: torch.distributions.Bernoulli(probs=(x / temperature).softmax(1).gather(1, y[:, None])[:, 0])
    ranks = lambda x: torch.distributions.Categorical(logits=torch.stack([r[torch.arange(5) != k] for r, k in zip(x / temperature, y)]))
    kl = torch.distributions.kl_divergence
    assert torch.allclose(ours, temperature ** 2 * (alpha * kl(sure(t), sure(z)) + beta * kl(ranks(t), ranks(z))))


def test_decoupled_parts_weighted_by_the_teachers_doubt_are_soft_kl():
    z, t, y = randn(7, 6), randn(7, 6, seed=1), torch.arange(7) % 6
    doubt = 1 - (t / 2).softmax(1).gather(1, y[:, None])[:, 0]
    assert torch.allclose(soft_kl(z, t, 2.0), decoupled_kl(z, t, y, 2.0, 1, 0) + doubt * decoupled_kl(z, t, y, 2.0, 0, 1), atol=1e-5)


def test_decoupled_ranks_reach_the_student_however_sure_the_teacher_is():
    def spread(loss, sure):
        z = torch.zeros(1, 4, requires_grad=True); loss(z, torch.tensor([[sure, 2.0, 0.0, -1.0]])).sum().backward()
        return (z.grad[0, 1:] - z.grad[0, 1:].mean()).norm().item()
    decoupled = lambda z, t: decoupled_kl(z, t, torch.tensor([0]), 1.0)
    assert spread(decoupled, 12.0) == pytest.approx(spread(decoupled, 0.0), rel=1e-4)
    assert spread(lambda z, t: soft_kl(z, t, 1.0), 12.0) < 1e-3 * spread(decoupled, 12.0)


def test_decoupled_survives_extreme_logits_two_classes_and_half_precision_and_detaches_the_teacher():
    far = torch.tensor([[0.0, 900.0, -900.0]], requires_grad=True); teacher = torch.tensor([[900.0, 0.0, 0.0]], requires_grad=True)
    loss = decoupled_kl(far, teacher, torch.tensor([0]), 1.0); loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(far.grad).all() and teacher.grad is None
    z, t = randn(4, 2), randn(4, 2, seed=1)
    assert torch.allclose(decoupled_kl(z, t, torch.zeros(4, dtype=torch.long), 2.0), soft_kl(z, t, 2.0), atol=1e-6)
    assert decoupled_kl(randn(4, 5).half(), randn(4, 5, seed=1).half(), torch.arange(4), 2.0).dtype == torch.float32


@pytest.mark.parametrize("labels, words", [(torch.tensor([0, 5]), r"0\.\.4, found 0\.\.5"), (torch.tensor([-1, 0]), "found -1"), (torch.zeros(3, dtype=torch.long), r"\(2,\)"), (torch.zeros(2), "int64")])
def test_decoupled_refuses_labels_that_are_no_classes(labels, words):
    with pytest.raises(ValueError, match=words): decoupled_kl(torch.zeros(2, 5), torch.zeros(2, 5), labels, 1.0)


def test_a_single_class_has_no_ranks_to_teach():
    with pytest.raises(ValueError, match="have 1 class"): decoupled_kl(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2, dtype=torch.long), 1.0)


# ---- cells by time stamp

@pytest.mark.parametrize("t0, t1, frames, cells", [(0, 30, 16, 16), (0, 30, 16, 4), (12, 68, 8, 3), (5, 5, 1, 1), (2.5, 47.5, 4, 8)])
def test_cells_divide_the_stretch_of_the_clip_evenly(t0, t1, frames, cells):
    edges = cell_edges(torch.tensor([float(t0)]), torch.tensor([float(t1)]), frames, cells)[0].tolist()
    assert edges == pytest.approx(plain_edges(t0, t1, frames, cells) if frames > 1 else [4.5, 5.5])


def test_with_a_cell_a_frame_each_cell_lies_around_its_frame():
    edges = cell_edges(torch.tensor([10.0]), torch.tensor([38.0]), 8, 8)[0]
    assert torch.allclose((edges[:-1] + edges[1:]) / 2, torch.arange(10.0, 39, 4, dtype=torch.float64))


def test_overlap_equals_loops_and_rows_sum_to_the_coverage():
    wanted, given = torch.tensor([[0.0, 4, 8, 12]], dtype=torch.float64), torch.tensor([[-2.0, 1, 5, 6, 9]], dtype=torch.float64)
    rows = cell_overlap(wanted, given)[0]
    for j, k in itertools.product(range(3), range(4)):
        part = max(0.0, min(wanted[0, j + 1], given[0, k + 1]) - max(wanted[0, j], given[0, k]))
        assert rows[j, k].item() == pytest.approx(float(part) / 4)
    assert rows.sum(1).tolist() == [1, 1, 0.25]


@pytest.mark.parametrize("shapes, times", [(((8, 7, 7), (4, 3, 3)), ((0, 30, 16), (1, 29, 8))), (((4, 4, 6), (8, 6, 4)), ((0, 30, 16), (12, 68, 8))), (((3, 2, 5), (5, 5, 2)), ((20, 50, 4), (0, 35, 8)))])
def test_alignment_equals_loops(shapes, times):
    student, teacher = randn(1, 1, *shapes[0]).double(), randn(1, 1, *shapes[1], seed=1).double()
    places = [place(1, a, b, n) for a, b, n in times]
    s, t, coverage = align(student, teacher, *places)
    plain_s, plain_t, plain_coverage = plain_align(student[0, 0], teacher[0, 0], *times)
    assert torch.allclose(s[0, 0], torch.tensor(plain_s, dtype=torch.float64)) and torch.allclose(t[0, 0], torch.tensor(plain_t, dtype=torch.float64))
    assert coverage[0].tolist() == pytest.approx(plain_coverage)


def test_alignment_within_one_stretch_is_torchs_pooling():
    fine, coarse = randn(2, 3, 8, 6, 6), randn(2, 5, 4, 3, 2, seed=1)
    a, b, coverage = align(fine, coarse, place(2), place(2))
    assert torch.allclose(a, F.adaptive_avg_pool3d(fine, (4, 3, 2)), atol=1e-6) and torch.equal(b, coarse) and torch.allclose(coverage, torch.ones(2, 4))
    a, b, _ = align(coarse, fine, place(2), place(2))
    assert torch.equal(a, coarse) and b.shape == (2, 3, 4, 3, 2)


class Clock(nn.Module):
    "A stream whose only channel is the red value of the frames, which is their number."
    def forward(self, clip, cells, side): return F.adaptive_avg_pool3d(clip[:, :1], (cells, side, side))


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("local, global_, tolerance", [(dict(frames=16, stride=2), dict(frames=8, stride=4), 1.1), (dict(frames=12, stride=2), dict(frames=4, stride=6), 1.1), (dict(frames=16, stride=2), dict(frames=8, sampling="segments"), 5)])
def test_clips_of_the_data_set_tell_the_same_time_in_every_covered_cell(local, global_, tolerance, train):
    frames = np.zeros((60, 24, 24, 3), np.uint8); frames[..., 0] = np.arange(60)[:, None, None]                # red is the number of the frame
    records, views = [SimpleNamespace(id=f"v{i}", path=None, label=0, source="s") for i in range(4)], [View(size=12, mean=0.0, std=1.0, **v) for v in (local, global_)]
    data = ClipDataset(records, {r.id: frames for r in records}, *views, train=train, flip=True, augment=Augmentation(brightness=0.0))
    batch = torch.utils.data.default_collate([data[i] for i in range(4)])
    places = [Placement.from_batch(batch, name) for name in ("local", "global")]
    assert [p.frames for p in places] == [v.frames for v in views]
    clocks = [F.adaptive_avg_pool3d(255 * clip[:, :1], (clip.shape[2] // 2, side, side)) for clip, side in ((batch["local"], 4), (batch["global_"], 3))]
    student, teacher, coverage = align(*clocks, *places)
    seen = coverage > 0.999
    assert seen.any() and (student - teacher)[:, 0, :, 0, 0][seen].abs().max() < tolerance


def test_what_cannot_be_aligned_is_refused_with_a_way_out():
    m = randn(2, 3, 4, 2, 2)
    late = torch.tensor([0.0, 100.0])
    for other, words in [(place(2, late, late + 30), "video 1 .*frames -1 to 31.*99 to 131.*share no time.*relation"), (place(2, flip=True), r"flip \[False\].*\[True\]"), (place(2, box=(0, 1, 56, 56)), r"box \[0, 0, 56, 56\]"), (place(3), "t0 of 3 clips, the maps have 2")]:
        with pytest.raises(ValueError, match=words): align(m, m, place(2), other)
    with pytest.raises(ValueError, match=r"\(B, C, T, H, W\)"): align(m[0], m, place(2), place(2))
    with pytest.raises(ValueError, match="t1 must not lie before t0; the clip of video 1"): cell_edges(torch.zeros(2), torch.tensor([1.0, -1.0]), 4, 2)
    with pytest.raises(ValueError, match="at least 1, not 0 and 2"): cell_edges(torch.zeros(2), torch.ones(2), 0, 2)
    with pytest.raises(ValueError, match="local_t0.*relation"): Placement.from_batch({"local": m}, "local")
    with pytest.raises(ValueError, match="stream = 'global_'"): Placement.from_batch({"local": m}, "global_")


# ---- hint, attention, logit-space

TIMES = (0, 30, 16), (12, 40, 8)

def test_hint_equals_loops():
    student, teacher, weight = randn(3, 2, 4, 3, 2).double(), 5 + 3 * randn(3, 4, 6, 2, 2, seed=1).double(), torch.tensor([1.0, 0.0, 0.5])
    layer = nn.Conv3d(2, 4, 1).double()
    aligned = [[plain_align(student[i, min(c, 1)], teacher[i, c], *TIMES) for c in range(4)] for i in range(3)]
    coverage = aligned[0][0][2]; cells = list(itertools.product(range(len(coverage)), range(2), range(2)))
    def standardised(side, channels):
        out = {}
        for c in range(channels):
            at = {(i, cell): aligned[i][c][side][cell[0]][cell[1]][cell[2]] for i in range(3) for cell in cells}
            total = sum(coverage[cell[0]] for _, cell in at)
            mean = sum(coverage[k[1][0]] * v for k, v in at.items()) / total
            deviation = math.sqrt(sum(coverage[k[1][0]] * (v - mean) ** 2 for k, v in at.items()) / total + 1e-5)
            out |= {(c, *k): (v - mean) / deviation for k, v in at.items()}
        return out
    u, v = standardised(0, 2), standardised(1, 4)
    W, b = layer.weight[:, :, 0, 0, 0].tolist(), layer.bias.tolist()
    rows = [sum(coverage[cell[0]] * (sum(W[d][c] * u[c, i, cell] for c in range(2)) + b[d] - v[d, i, cell]) ** 2 / 16 for cell in cells for d in range(4)) / sum(coverage) for i in range(3)]
    places = [place(3, *times) for times in TIMES]
    assert hint_loss(student, teacher, layer, *places).item() == pytest.approx(sum(rows) / 3)
    assert hint_loss(student, teacher, layer, *places, weight).item() == pytest.approx((rows[0] + 0.5 * rows[2]) / 3)


def test_hint_standardises_as_torchs_batch_norm():
    student, teacher, layer = randn(4, 2, 4, 2, 2), 7 + 3 * randn(4, 5, 4, 2, 2, seed=1), nn.Conv3d(2, 5, 1)
    u, v = (F.batch_norm(m, None, None, training=True) for m in (student, teacher))
    assert hint_loss(student, teacher, layer, place(4), place(4)).item() == pytest.approx(F.mse_loss(layer(u), v).item(), rel=1e-4)


def test_a_hint_is_one_for_silence_and_falls_to_nothing_where_the_student_knows():
    student = randn(6, 4, 2, 2, 2); teacher = torch.einsum("bcthw,dc->bdthw", student, randn(5, 4, seed=1)) * 9 + 20
    layer = nn.Conv3d(4, 5, 1); nn.init.zeros_(layer.weight); nn.init.zeros_(layer.bias)
    assert hint_loss(student, teacher, layer, place(), place()).item() == pytest.approx(1, abs=1e-3)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    for _ in range(100): optimizer.zero_grad(); loss = hint_loss(student, teacher, layer, place(), place()); loss.backward(); optimizer.step()
    assert loss.item() < 0.01


def test_attention_equals_loops_and_torchs_cosine():
    student, teacher, weight = randn(3, 2, 4, 3, 2).double(), randn(3, 4, 6, 2, 2, seed=1).double(), torch.tensor([0.0, 1.0, 0.5])
    energy = lambda m: [[[sum(v * v for v in m[:, t, h, w].tolist()) for w in range(m.shape[3])] for h in range(m.shape[2])] for t in range(m.shape[1])]
    rows, flat = [], ([], [])
    for s, t in zip(student, teacher):
        *maps, coverage = plain_align(torch.tensor(energy(s), dtype=torch.float64), torch.tensor(energy(t), dtype=torch.float64), *TIMES)
        a, b = ([coverage[k] * v for k, frame in enumerate(m) for row in frame for v in row] for m in maps)
        size = lambda x: math.sqrt(sum(v * v for v in x))
        rows.append(sum((x / size(a) - y / size(b)) ** 2 for x, y in zip(a, b))); flat[0].append(a); flat[1].append(b)
    places = [place(3, *times) for times in TIMES]
    assert attention_loss(student, teacher, *places).item() == pytest.approx(sum(rows) / 3)
    assert attention_loss(student, teacher, *places, weight).item() == pytest.approx((rows[1] + 0.5 * rows[2]) / 3)
    assert sum(rows) / 3 == pytest.approx((2 - 2 * F.cosine_similarity(*map(torch.tensor, flat)).mean()).item(), rel=1e-5)


def test_attention_does_not_mind_channels_or_scale_and_sees_where():
    m = randn(4, 6, 3, 4, 4).abs()
    assert attention_loss(7 * m.flip(1), m, place(4), place(4)) < 1e-10
    assert attention_loss(m.flip(2), m, place(4), place(4)) > 0.01
    with pytest.raises(ValueError, match="one cell in common.*relation"): attention_loss(randn(4, 6, 1, 1, 1), m, place(4), place(4))


def test_logit_equals_loops():
    student, teacher, layer, weight = randn(3, 2, 2, 1, 2).double(), randn(3, 4, seed=1).double(), nn.Linear(2, 4).double(), torch.tensor([1.0, 0.5, 0.0])
    W, b, rows = layer.weight.tolist(), layer.bias.tolist(), []
    for video, answer in zip(student, teacher.tolist()):
        pooled = [sum(c.flatten().tolist()) / 4 for c in video]
        z = [sum(w * f for w, f in zip(W[k], pooled)) + b[k] for k in range(4)]
        rows.append(4 * plain_kl(plain_softmax([v / 2 for v in answer]), plain_softmax([v / 2 for v in z])))
    assert logit_loss(student, teacher, layer, 2.0).item() == pytest.approx(sum(rows) / 3)
    assert logit_loss(student, teacher, layer, 2.0, weight).item() == pytest.approx((rows[0] + 0.5 * rows[1]) / 3)
    assert logit_loss(student[:1], teacher[:1], layer, 2.0).item() == pytest.approx(rows[0])         # one video is enough


LOSSES = {"hint": lambda s, t, w: hint_loss(s, t, nn.Conv3d(8, 4, 1), place(5), place(5, 1, 29, 8), w), "attention": lambda s, t, w: attention_loss(s, t, place(5), place(5, 1, 29, 8), w),
          "logit": lambda s, t, w: logit_loss(s, t.mean((2, 3, 4)), nn.Linear(8, 4), 2.0, w)}

@pytest.mark.parametrize("kind", LOSSES)
def test_only_videos_that_are_taught_move_and_never_the_teacher(kind):
    a, b = randn(5, 8, 4, 3, 3).requires_grad_(), randn(5, 4, 2, 2, 2, seed=1).requires_grad_()
    LOSSES[kind](a, b, torch.tensor([0.0, 1, 0, 1, 0])).backward()
    size = a.grad.flatten(1).norm(dim=1)
    assert (size[[0, 2, 4]] == 0).all() and (size[[1, 3]] > 0).all() and b.grad is None
    with pytest.raises(ValueError, match=r"weight must have shape \(5,\)"): LOSSES[kind](a, b, torch.ones(2))


@pytest.mark.parametrize("kind", LOSSES)
def test_mixed_precision_changes_no_intermediate_loss(kind):
    a, b = randn(5, 8, 4, 3, 3), randn(5, 4, 2, 2, 2, seed=1)
    torch.manual_seed(0); plain = LOSSES[kind](a, b, None)
    with torch.autocast("cpu", dtype=torch.bfloat16): torch.manual_seed(0); mixed = LOSSES[kind](a, b, None)
    assert torch.equal(plain, mixed) and torch.isfinite(LOSSES[kind](a.bfloat16() * 0 + 1, b.bfloat16() * 0, None))     # constant and empty maps too


def test_projections_hold_what_the_loss_trains_from_a_seed_of_their_own():
    local, global_ = streams()[:2]
    before = torch.get_rng_state()
    for kind in INTERMEDIATES: assert bool(list(Projections(kind, local, global_).parameters())) == (kind in ("hint", "logit"))
    assert torch.equal(before, torch.get_rng_state())
    one, same, other = (Projections("hint", local, global_, seed=s) for s in (0, 0, 1))
    assert one.pairs == pair_stages(local.stages, global_.stages) and all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters())) and not torch.equal(one.to_local[0].weight, other.to_local[0].weight)
    assert one.to_global[0].weight.shape[:2] == (8, 12) and one.to_local[0].weight.shape[:2] == (12, 8)
    with pytest.raises(ValueError, match="local stream has no stage 'c9'; it has c1, c2, c3"): Projections("hint", local, global_, stages=[("c9", "b1")])
    with pytest.raises(ValueError, match="intermediate = 'fit'.*relation, logit, hint, attention"): Projections("fit", local, global_)


# ---- masks, teachers, weights over time

def test_masks_keep_right_teachers_and_weak_students():
    student, teacher, y = torch.tensor([[3.0, 0], [0.1, 0], [0, 3.0], [0, 3.0]]), torch.tensor([[2.0, 0], [2, 0], [2, 0], [0, 2]]), torch.zeros(4, dtype=torch.long)
    assert lesson_mask(student, teacher, y, False).tolist() == [1, 1, 1, 1] and lesson_mask(student, teacher, y).tolist() == [1, 1, 1, 0]
    assert lesson_mask(student, teacher, y, True, 0.6).tolist() == [0, 1, 1, 0] and lesson_mask(student, teacher, y, False, 0.5).tolist() == [0, 0, 1, 1]


def test_weak_students_only_in_the_loss():
    s = streams(); codes = torch.ones(6, dtype=torch.long)
    below = s[1].logits.softmax(1).gather(1, LABELS[:, None])[:, 0] < 0.2
    loss, parts = distillation_loss(*s, LABELS, codes, Distillation(only_right_teacher=False, student_below=0.2, intermediate_weight=0.0))
    loss.backward()
    assert 0 < below.sum() < 6 and torch.equal(s[1].logits.grad.norm(dim=1) > 0, below) and parts["taught_global"].item() == pytest.approx(below.float().mean().item())


class Tiny(nn.Module):
    def __init__(self): super().__init__(); self.conv, self.norm, self.top = nn.Conv3d(3, 4, 1), nn.BatchNorm3d(4), nn.Linear(4, 5)
    def forward(self, x): x = self.norm(self.conv(x)); return SimpleNamespace(logits=self.top(x.mean((2, 3, 4))), stages=OrderedDict(s=x))


def stir(stream, seed):
    "A step of training: weights, running statistics and the counter of batches change."
    with torch.no_grad():
        for i, p in enumerate(stream.parameters()): p.add_(randn(*p.shape, seed=seed + i))
    stream.train()(randn(4, 3, 2, 2, 2, seed=seed))


def test_an_averaged_teacher_equals_the_formula_and_torchs_average():
    torch.manual_seed(0); stream = Tiny(); teacher = Teacher(stream, "averaged", decay=0.9)
    swa = torch.optim.swa_utils.AveragedModel(stream, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True)
    swa.update_parameters(stream)                                                       # its first call copies
    weight = stream.conv.weight.flatten().tolist()
    for step in range(5):
        stir(stream, 10 * step)
        for averaged in (lambda: teacher.update(stream), lambda: swa.update_parameters(stream)): averaged()
        weight = [0.9 * a + 0.1 * b for a, b in zip(weight, stream.conv.weight.flatten().tolist())]
    assert teacher.copy.conv.weight.flatten().tolist() == pytest.approx(weight, rel=1e-5, abs=1e-6)
    for name, value in teacher.copy.state_dict().items():
        if "num" not in name: assert torch.allclose(value, swa.module.state_dict()[name], atol=1e-6), name
    assert teacher.copy.norm.num_batches_tracked == stream.norm.num_batches_tracked == 5


@pytest.mark.slow
def test_an_averaged_teacher_equals_timms_average_counters_and_statistics_included():
    torch.manual_seed(0); stream = Tiny(); teacher, timms = Teacher(stream, "averaged", decay=0.9), pytest.importorskip("timm.utils").ModelEmaV3(stream, decay=0.9)
    for step in range(5): stir(stream, 10 * step); teacher.update(stream); timms.update(stream)
    for name, value in teacher.copy.state_dict().items(): assert torch.allclose(value.float(), timms.module.state_dict()[name].float(), atol=1e-6), name


def test_a_frozen_teacher_stays_and_a_live_one_is_the_stream():
    torch.manual_seed(0); stream, clip = Tiny(), randn(4, 3, 2, 2, 2)
    frozen, live = Teacher(stream, temperature=torch.tensor(2.0)), Teacher(stream, "live")
    expected = copy.deepcopy(stream).eval()(clip).logits / 2
    stir(stream, 3); frozen.update(stream); live.update(stream)
    assert torch.equal(frozen(clip).logits, expected) and not any(p.requires_grad for p in frozen.parameters()) and list(live.parameters()) == []
    output = stream(clip); answer = live(clip, output)
    assert torch.equal(answer.logits, output.logits) and not answer.logits.requires_grad and not answer.stages["s"].requires_grad


def test_teachers_stay_in_evaluation_mode_and_remember_nothing_of_the_batch():
    teacher = Teacher(Tiny(), "averaged"); teacher.train()
    before = teacher.copy.norm.running_mean.clone(); teacher(randn(4, 3, 2, 2, 2))
    assert not teacher.copy.training and torch.equal(before, teacher.copy.norm.running_mean)


def test_an_averaged_teacher_continues_from_its_state():
    torch.manual_seed(0); stream = Tiny(); teacher = Teacher(stream, "averaged", decay=0.5); stir(stream, 1); teacher.update(stream)
    again = Teacher(Tiny(), "averaged", decay=0.5); again.load_state_dict(teacher.state_dict()); clip = randn(4, 3, 2, 2, 2)
    assert torch.equal(teacher(clip).logits, again(clip).logits)


def test_teachers_refuse():
    for change, words in [(dict(kind="ema"), "teacher = 'ema'.*frozen, averaged, live"), (dict(decay=1.0), "teacher_decay.*not 1.0"), (dict(temperature=0.0), "temperature")]:
        with pytest.raises(ValueError, match=words): Teacher(Tiny(), **change)
    with pytest.raises(ValueError, match="pass output"): Teacher(Tiny(), "live")(randn(4, 3, 2, 2, 2))
    with pytest.raises(ValueError, match="unwrapped"): Teacher(Tiny(), "averaged").update(nn.Sequential(Tiny()))


@pytest.mark.parametrize("fraction, warm_up, fade, expected", [(0, 0, 0, 1), (1, 0, 0, 1), (0, 0.2, 0, 0), (0.1, 0.2, 0, 0.5), (0.2, 0.2, 0.5, 1), (0.75, 0.2, 0.5, 0.5), (1, 0.2, 0.5, 0), (0.5, 0.5, 0.5, 1)])
def test_weights_warm_up_and_fade(fraction, warm_up, fade, expected): assert weight_at(fraction, warm_up, fade) == pytest.approx(expected)


def test_the_loss_follows_the_weight_and_asks_for_the_moment():
    config = Distillation(only_right_teacher=False)
    full = distillation_loss(*streams(), LABELS, CODES, config)[0]
    part, parts = distillation_loss(*streams(), LABELS, CODES, replace(config, warm_up=0.4), fraction=0.1)
    assert part.item() == pytest.approx(full.item() / 4, rel=1e-6) and parts["final_to_global"] > 0
    assert torch.equal(distillation_loss(*streams(), LABELS, CODES, config, fraction=0.1)[0], full)
    with pytest.raises(ValueError, match="fade = 0.5.*pass fraction"): distillation_loss(*streams(), LABELS, CODES, replace(config, fade=0.5))
    with pytest.raises(ValueError, match="fraction.*1.2"): distillation_loss(*streams(), LABELS, CODES, replace(config, fade=0.5), fraction=1.2)


# ---- the whole, with every intermediate loss

PLACES = place(), place(6, 12, 40, 8)

@pytest.mark.parametrize("kind", INTERMEDIATES)
def test_every_intermediate_loss_goes_through_the_same_door(kind):
    local, global_, teacher_local, teacher_global = streams()
    layers = Projections(kind, local, global_)
    config = Distillation(intermediate=kind, final_weight=0.0, intermediate_weight=2.0, only_right_teacher=False)
    loss, parts = distillation_loss(local, global_, teacher_local, teacher_global, LABELS, CODES, config, places=PLACES, projections=layers)
    to_global, to_local = directions(CODES)
    expected = 0
    for i, (l, g) in enumerate(layers.pairs):
        a, b, x, y = local.stages[l], global_.stages[g], teacher_local.stages[l], teacher_global.stages[g]
        expected += {"relation": lambda: relation_loss(b, x, to_global) + relation_loss(a, y, to_local), "attention": lambda: attention_loss(b, x, *PLACES[::-1], to_global) + attention_loss(a, y, *PLACES, to_local),
                     "hint": lambda: hint_loss(b, x, layers.to_global[i], *PLACES[::-1], to_global) + hint_loss(a, y, layers.to_local[i], *PLACES, to_local),
                     "logit": lambda: logit_loss(b, teacher_local.logits, layers.to_global[i], 2.0, to_global) + logit_loss(a, teacher_global.logits, layers.to_local[i], 2.0, to_local)}[kind]()
    assert loss.item() == pytest.approx((2 * expected / len(layers.pairs)).item(), rel=1e-5)
    loss.backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in layers.parameters())
    for stream, names, mask in ((global_, [g for _, g in layers.pairs], to_global), (local, [l for l, _ in layers.pairs], to_local)):
        for name in names: assert torch.equal(stream.stages[name].grad.flatten(1).norm(dim=1) > 0, mask > 0)
    for teacher in (teacher_local, teacher_global): assert teacher.logits.grad is None and all(m.grad is None for m in teacher.stages.values())


def test_decoupled_goes_through_the_same_door():
    s = streams(); config = Distillation(final="decoupled", other_weight=4.0, intermediate_weight=0.0, only_right_teacher=False)
    parts = distillation_loss(*s, LABELS, CODES, config)[1]
    assert parts["final_to_global"].item() == pytest.approx((decoupled_kl(s[1].logits, s[2].logits, LABELS, 2.0, 1.0, 4.0)[:2].sum() / 6).item(), rel=1e-5)


def test_what_an_intermediate_loss_lacks_is_named():
    s = streams()
    run = lambda kind, **more: distillation_loss(*s, LABELS, CODES, Distillation(intermediate=kind), **more)
    for kind, words, more in [("attention", "attention.*places", {}), ("hint", "places", {}), ("hint", "projections=Projections\\('hint'", dict(places=PLACES)), ("logit", "these are for 'hint'", dict(projections=Projections("hint", *s[:2]))),
                              ("logit", "stages = .* differ", dict(projections=Projections("logit", *s[:2]), stages=[("c1", "b2")])), ("relation", "global stream has no stage 'b7'", dict(stages=[("c1", "b7")])), ("relation", "stages is empty", dict(stages=[]))]:
        with pytest.raises(ValueError, match=words): run(kind, **more)
    with pytest.raises(ValueError, match=r"labels must have shape \(6,\)"): distillation_loss(*s, LABELS[:3], CODES)
    with pytest.raises(ValueError, match=r"group_codes must have shape \(6,\)"): distillation_loss(*s, LABELS, CODES[:3])


def test_a_batch_of_two_left_by_unreadable_videos_has_no_relations_and_goes_on():
    s = [output(seed, c, n, batch=2) for seed, c, n in ((0, 8, ["c1"]), (10, 12, ["b1"]), (20, 8, ["c1"]), (30, 12, ["b1"]))]
    loss, parts = distillation_loss(*s, torch.tensor([0, 1]), torch.tensor([1, -1]), Distillation(only_right_teacher=False))
    loss.backward()
    assert parts["intermediate_to_global"] == 0 and parts["final_to_global"] > 0 and s[1].stages["b1"].grad is None


def test_terms_carry_their_history_and_make_up_the_loss():
    config = Distillation(only_right_teacher=False)
    s = streams(); terms, taught = distillation_terms(*s, LABELS, CODES, config)
    loss, parts = distillation_loss(*s, LABELS, CODES, config)
    assert all(t.requires_grad for t in terms.values()) and torch.equal(weighted_sum(terms, config), loss) and list(parts) == [*taught, *terms]
    assert distillation_terms(*s, LABELS, CODES, replace(config, arm="none"))[0] == {} and weighted_sum({}, config) == 0


# ---- gradients of the terms

def small():
    torch.manual_seed(0); trunk, top, x, y = nn.Linear(6, 4), nn.Linear(4, 5), randn(8, 6), torch.arange(8) % 5
    stage = trunk(x).tanh(); return trunk, top, stage, top(stage), y


def test_norms_and_cosines_equal_those_of_separate_backward_passes():
    trunk, top, stage, logits, y = small(); weights = [*trunk.parameters(), *top.parameters()]
    terms = dict(labels=F.cross_entropy(logits, y), peer=soft_kl(logits, randn(8, 5, seed=3), 2.0).mean(), energy=stage.square().mean())
    report, flat = compare_gradients(terms, weights), {}
    assert all(p.grad is None for p in weights)
    for name, term in terms.items():
        for p in weights: p.grad = None
        term.backward(retain_graph=True); flat[name] = [v for p in weights for v in (torch.zeros_like(p) if p.grad is None else p.grad).double().flatten().tolist()]
    size = lambda v: math.sqrt(sum(a * a for a in v))
    for name in terms: assert report[f"norm {name}"] == pytest.approx(size(flat[name]))
    for a, b in itertools.combinations(terms, 2): assert report[f"cosine {a}, {b}"] == pytest.approx(sum(x * y for x, y in zip(flat[a], flat[b])) / size(flat[a]) / size(flat[b]))


def test_gradients_carried_on_from_ends_are_the_same():
    trunk, top, stage, logits, y = small(); weights = [*trunk.parameters(), *top.parameters()]
    ends = [(logits, logits.detach().requires_grad_()), (stage, stage.detach().requires_grad_())]
    make = lambda z, s: dict(labels=F.cross_entropy(z, y), relation=relation_loss(s[..., None, None, None], randn(8, 3, 1, 1, 1)))
    direct, carried = compare_gradients(make(logits, stage), weights), compare_gradients(make(*(e for _, e in ends)), weights, ends)
    assert direct == pytest.approx(carried, rel=1e-5) and abs(direct["cosine labels, relation"]) > 1e-3


def test_a_term_without_gradient_has_norm_zero_and_no_cosine():
    trunk, top, stage, logits, y = small()
    report = compare_gradients(dict(labels=F.cross_entropy(logits, y), none=torch.zeros(()), zero=logits.sum() * 0), list(trunk.parameters()))
    assert report["norm none"] == report["norm zero"] == 0 and math.isnan(report["cosine labels, none"]) and report["norm labels"] > 0
    for terms, weights in (({}, list(trunk.parameters())), (dict(a=logits.sum()), [])):
        with pytest.raises(ValueError, match="nothing to compare"): compare_gradients(terms, weights)


# ---- several processes, played one after another

def in_turns(loss, parts):
    "loss(part, gather) of each part: first all hand in their rows, then each gets those of all."
    handed_in = []
    for part in parts:
        try: loss(part, lambda rows: (handed_in.append(rows), (rows, 0))[1])
        except ValueError: pass                                                          # a part of two videos has no relations of its own
    gathered = torch.cat(handed_in)
    assert not gathered.requires_grad
    return [loss(part, lambda rows, first=part.start: (gathered, first)) for part in parts]


@pytest.mark.parametrize("parts", [(slice(0, 3), slice(3, 6)), (slice(0, 2), slice(2, 4), slice(4, 6))])
def test_relations_spread_over_processes_are_those_of_one_batch_and_so_are_the_gradients(parts):
    a, b, w = randn(6, 8, 2, 3, 3).double().requires_grad_(), randn(6, 5, 3, 2, 2, seed=1).double(), torch.tensor([1.0, 0, 0.5, 0, 1, 1]).double()
    whole = relation_loss(a, b, w); expected, = torch.autograd.grad(whole, a)
    split = sum(in_turns(lambda p, gather: relation_loss(a[p], b[p], w[p], gather), parts)) / len(parts); found, = torch.autograd.grad(split, a)
    assert abs(whole - split) < 1e-12 and (expected - found).abs().max() < 1e-12 and expected.abs().max() > 1e-4
    assert abs(sum(relation_loss(a[p], b[p], w[p]) for p in ((slice(0, 3), slice(3, 6)))) / 2 - whole) > 1e-3        # without it they are not


def test_processes_of_unequal_size_weigh_by_their_videos():
    a, b, parts = randn(7, 8, 1, 2, 2).double(), randn(7, 5, 1, 2, 2, seed=1).double(), (slice(0, 5), slice(5, 7))
    losses = in_turns(lambda p, gather: relation_loss(a[p], b[p], gather=gather), parts)
    assert (5 * losses[0] + 2 * losses[1]).item() / 7 == pytest.approx(relation_loss(a, b).item(), abs=1e-12)


@pytest.mark.parametrize("kind", ["relation", "logit"])
@pytest.mark.parametrize("mixed", [False, True])
def test_terms_spread_over_processes_are_those_of_one_batch_with_one_exchange_for_all_stages(kind, mixed):
    double = lambda s, grad: SimpleNamespace(logits=s.logits.detach().double().requires_grad_(grad), stages=OrderedDict((n, m.detach().double().requires_grad_(grad)) for n, m in s.stages.items()))
    local, global_, *teachers = [double(s, i < 2) for i, s in enumerate(streams())]
    config, layers = Distillation(intermediate=kind, only_right_teacher=False), Projections(kind, local, global_).double()
    others, leaves = (LABELS.roll(2), CODES.roll(2), 0.3) if mixed else None, [s.logits for s in (local, global_)] + [m for s in (local, global_) for m in s.stages.values()]
    part_of = lambda s, p: SimpleNamespace(logits=s.logits[p], stages=OrderedDict((n, m[p]) for n, m in s.stages.items()))
    def terms(p, gather=None):
        return distillation_terms(*(part_of(s, p) for s in (local, global_, *teachers)), LABELS[p], CODES[p], config, projections=layers, others=others and (others[0][p], others[1][p], 0.3), gather=gather)[0]
    exchanges = []
    def loss(p, gather): return weighted_sum(terms(p, lambda rows: (exchanges.append(rows), gather(rows))[1]), config)
    whole = weighted_sum(terms(slice(0, 6)), config); expected = torch.autograd.grad(whole, leaves, allow_unused=True)
    if kind == "logit": split = sum(loss(p, None) for p in (slice(0, 3), slice(3, 6))) / 2
    else: split = sum(in_turns(loss, (slice(0, 3), slice(3, 6)))) / 2
    for a, b in zip(expected, torch.autograd.grad(split, leaves, allow_unused=True)): assert a is b is None or (a - b).abs().max() < 1e-12
    assert abs(whole - split) < 1e-12 and len(exchanges) == (4 if kind == "relation" else 0)


def test_three_videos_are_counted_over_all_processes():
    s = [output(seed, c, n, batch=2) for seed, c, n in ((0, 8, ["c1"]), (10, 12, ["b1"]), (20, 8, ["c1"]), (30, 12, ["b1"]))]
    terms = lambda gather: distillation_terms(*s, torch.tensor([0, 1]), torch.tensor([1, -1]), Distillation(only_right_teacher=False), gather=gather)[0]["intermediate_to_global"]
    assert terms(lambda rows: (rows, 0)) == 0 and terms(lambda rows: (torch.cat([rows, randn(*rows.shape, seed=5)]), 0)) > 0
    with pytest.raises(ValueError, match="3 or more, not 2"): relation_loss(s[0].stages["c1"], s[1].stages["b1"], gather=lambda rows: (rows, 0))


# ---- mixed clips

@pytest.mark.parametrize("config", [Distillation(student_below=0.3), Distillation(final="decoupled", only_right_teacher=False), Distillation(intermediate="logit", arm="both", only_right_teacher=False), Distillation(arm="reversed", only_right_teacher=False)])
def test_terms_of_mixed_clips_are_those_of_both_labels_by_their_shares(config):
    s, y, c = streams(), LABELS.roll(1), CODES.roll(1); layers = Projections(config.intermediate, *s[:2])
    run = lambda *given, **more: distillation_terms(*s, *given, config, projections=layers, **more)
    (both, taught), (first, taught_first), (second, taught_second) = run(LABELS, CODES, others=(y, c, 0.3)), run(LABELS, CODES), run(y, c)
    for name in first: assert both[name].item() == pytest.approx(0.3 * first[name].item() + 0.7 * second[name].item(), rel=1e-5, abs=1e-7), name
    for name in taught: assert taught[name].item() == pytest.approx(0.3 * taught_first[name].item() + 0.7 * taught_second[name].item(), abs=1e-6)


def test_a_clip_mixed_of_a_local_and_a_global_class_moves_both_streams_by_share():
    s = streams(); config = Distillation(intermediate_weight=0.0, only_right_teacher=False); ones = torch.ones(6, dtype=torch.long)
    loss = lambda codes, others=None: distillation_loss(*s, LABELS, codes, config, others=others)[0]
    moved = lambda loss: torch.autograd.grad(loss, [s[0].logits, s[1].logits])
    to_local, to_global = moved(loss(ones, (LABELS, -ones, 0.25)))
    assert torch.allclose(to_global, 0.25 * moved(loss(ones))[1]) and torch.allclose(to_local, 0.75 * moved(loss(-ones))[0]) and to_local.norm() > 0


@pytest.mark.parametrize("kind", INTERMEDIATES)
def test_a_mixture_with_share_one_is_no_mixture(kind):
    s = streams(); given = dict(places=PLACES, projections=Projections(kind, *s[:2])); config = Distillation(intermediate=kind)
    plain, whole = (distillation_loss(*s, LABELS, CODES, config, others=others, **given)[0] for others in (None, (LABELS.roll(1), CODES.roll(1), 1.0)))
    assert torch.equal(plain, whole)


def test_mixed_clips_refuse_what_has_no_meaning():
    s = streams(); others = (LABELS, CODES, 0.5)
    for kind in ("hint", "attention"):
        with pytest.raises(ValueError, match=f"{kind}.*shows two videos.*mixup and cutmix off.*'relation' or 'logit'"): distillation_loss(*s, LABELS, CODES, Distillation(intermediate=kind), others=others, places=PLACES, projections=Projections(kind, *s[:2]))
    with pytest.raises(ValueError, match="share in others.*not 1.5"): distillation_loss(*s, LABELS, CODES, others=(LABELS, CODES, 1.5))
    with pytest.raises(ValueError, match=r"labels must have shape \(6,\)"): distillation_loss(*s, LABELS, CODES, others=(LABELS[:3], CODES, 0.5))


def test_an_averaged_teacher_keeps_its_kinds_of_numbers():
    torch.manual_seed(0); stream = Tiny(); stream.top.bfloat16(); teacher = Teacher(stream, "averaged", decay=0.75)
    teacher.copy.double(); before = teacher.copy.top.bias.clone()
    with torch.no_grad(): stream.top.bias += 1
    teacher.update(stream)
    assert teacher.copy.top.bias.dtype == torch.float64 and torch.allclose(teacher.copy.top.bias, 0.75 * before + 0.25 * stream.top.bias.double())


def test_a_tie_is_no_right_answer_of_a_teacher():
    "A dead teacher answers every class alike; its first choice by order is class 0."
    teacher, labels = torch.zeros(4, 3), torch.tensor([0, 1, 2, -1])
    assert lesson_mask(torch.randn(4, 3), teacher, labels).tolist() == [0., 0., 0., 1.]
    assert lesson_mask(torch.randn(4, 3), teacher + torch.eye(3)[0], labels).tolist() == [1., 0., 0., 1.]
