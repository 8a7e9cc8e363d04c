import copy, math, os, signal, threading
from dataclasses import replace
from pathlib import Path
import numpy as np, pytest, torch
from mbd import training
from mbd.checkpoints import Checkpoints
from mbd.clips import ClipDataset, View
from mbd.datasets import Record
from mbd.distillation import Distillation
from mbd.dominance import DominanceMap
from mbd.fusion import AdaptiveFusion, MeanFusion
from mbd.global_stream import GlobalStream
from mbd.local_stream import LocalStream, StreamOutput
from mbd.model import MBD
from mbd.recipes import Mixing
from mbd.training import Training, calibrate, fit_fusions, measure_map, optimiser, predict, train

CLASSES = ["red", "green", "blue"]
VIEWS = View(6, 1, 16), View(3, 2, 8)
TEACH = Distillation(only_right_teacher=False)


def videos(count=24, seed=0):
    "Noise with a tint: easy."
    rng, records, frames = np.random.default_rng(seed), [], {}
    for i in range(count):
        label, name = i % 3, f"v{i:02d}"
        picture = rng.integers(60, 160, (8, 20, 20, 3))
        picture[..., label] += 90
        frames[name] = picture.astype(np.uint8)
        records.append(Record(name, Path(name), label, f"{CLASSES[label]}_g{i // 6:02d}"))
    return records, frames


def data(train=True, **more): return ClipDataset(*videos(**{k: more.pop(k) for k in ("count",) if k in more}), *VIEWS, train=train, **more)


def make(seed=0, mapped=True):
    torch.manual_seed(seed)
    model = MBD(LocalStream(3, (4, 6), (3, 3)), GlobalStream(3, frames=3, width=12, depth=1, heads=3, grid=2), CLASSES, *VIEWS)
    if mapped: model.map = DominanceMap(CLASSES, [8] * 3, [4] * 3, [.8, .5, .2], [.7, .4, .1], [.9, .6, .3], ["local", "balanced", "global"], .5)
    return model


def weights(module): return {n: v.clone() for n, v in module.state_dict().items()}


def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@torch.no_grad()
def distance(a, b, stream):
    "Largest difference between the logits of one stream of two models. Zero gradients added on the way may change the last digits."
    a, b = (predict(m, data(False)) for m in (a, b))
    return (getattr(a, stream) - getattr(b, stream)).abs().max().item()


def trained(settings=Training(epochs=1, batch_size=8), distillation=None, seed=0, change=None, **more):
    model = make(seed)
    if change: change(model)
    rows = train(model, data(), settings, distillation=distillation, **more)
    return model, rows


# ---- what a stage does

def test_losses_fall_and_both_streams_learn():
    model, rows = trained(Training(epochs=6, batch_size=8, learning_rate=1e-2))
    for stream in ("local", "global"):
        loss = [r["loss"] for r in rows if r["stream"] == stream]
        assert loss[-1] < .6 * loss[0] and [r for r in rows if r["stream"] == stream][-1]["accuracy"] > .8
    answers = predict(model, data(False))
    for z in (answers.local, answers.global_): assert (z.mean(1).argmax(1) == answers.labels).float().mean() > .8


def test_rows_tell_stage_epoch_and_stream():
    logged, steps = [], []
    _, rows = trained(Training(epochs=2, batch_size=10), TEACH, stage="distil", log=logged.append, progress=lambda *x: steps.append(x))
    assert logged == rows and [(r["stage"], r["epoch"], r["stream"]) for r in rows] == [("distil", e, s) for e in (1, 2) for s in ("local", "global")]
    assert steps == [(i, 4) for i in range(1, 5)]      # 24 clips: two batches of ten an epoch
    for r in rows:
        assert 0 <= r["accuracy"] <= 1 and r["loss"] > 0 and r["seconds"] > 0 and {"taught_global", "taught_local", "final_to_global", "intermediate_to_local"} <= set(r)
        assert abs(r["taught_global"] - 1 / 3) < .15 and abs(r["taught_local"] - 1 / 3) < .15


def test_loss_and_accuracy_of_a_row_are_means_over_the_clips():
    model = make()
    reference, part = copy.deepcopy(model).train(), data()
    rows = train(model, part, Training(epochs=1, batch_size=24, seed=3))
    part.seed, part.epoch = 3, 0
    [batch] = training.batches(part, 24)
    logits = reference.local(batch["local"]).logits
    assert rows[0]["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, batch["label"]).item(), abs=1e-5)
    assert rows[0]["accuracy"] == pytest.approx((logits.argmax(1) == batch["label"]).float().mean().item())


def test_the_same_seed_gives_identical_weights():
    first, again, other = trained(distillation=TEACH)[0], trained(distillation=TEACH)[0], trained(replace(Training(epochs=1, batch_size=8), seed=1), TEACH)[0]
    assert equal(weights(first), weights(again)) and not equal(weights(first), weights(other))


def test_a_stage_does_not_depend_on_what_its_data_served_before():
    used = data()
    train(make(5), used, Training(epochs=3, batch_size=4, seed=9))
    a, b = make(), make()
    train(a, used, Training(epochs=1, batch_size=8)); train(b, data(), Training(epochs=1, batch_size=8))
    assert equal(weights(a), weights(b))


def test_no_epochs_change_nothing():
    model = make()
    before = weights(model)
    assert train(model, data(), Training(epochs=0), distillation=TEACH) == [] and equal(before, weights(model))


def test_fewer_videos_than_a_batch():
    model = make()
    rows = train(model, data(count=6), Training(epochs=1, batch_size=16), distillation=TEACH)
    assert len(rows) == 2 and all(math.isfinite(r["loss"]) for r in rows)


def test_a_trained_model_is_left_ready_to_answer(): assert not trained()[0].training


# ---- side by side

def test_both_at_once_gives_what_each_alone_gives():
    both = trained()[0]
    for name, stream in (("local", "local"), ("global", "global_")):
        alone = trained(only=name)[0]
        assert equal(weights(getattr(both, stream)), weights(getattr(alone, stream)))


def test_side_by_side_runs_at_once_and_keeps_the_callers_gradient_switch():
    barrier, whole = threading.Barrier(2, timeout=20), torch.get_num_threads()
    def meet(name):
        barrier.wait()      # passes only if the other is there at the same time
        return name, torch.is_grad_enabled(), torch.get_num_threads()
    with torch.no_grad(), training.side_by_side() as each: met = each(meet, ("b", "a"))
    assert list(met) == ["b", "a"] and all(met[n] == (n, False, max(1, whole // 2)) for n in met)
    with training.side_by_side() as each: assert all(grad for _, grad, _ in each(meet, "ab").values())
    assert torch.get_num_threads() == whole


def test_an_error_in_one_of_them_is_raised_and_the_threads_are_given_back():
    whole = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with pytest.raises(ZeroDivisionError), training.side_by_side() as each: each(lambda name: 1 / name, (1, 0))
        assert torch.get_num_threads() == 4
    finally: torch.set_num_threads(whole)


# ---- what is given

@pytest.mark.parametrize("wrong, kind, problem", [
    (dict(data=lambda: data(False)), ValueError, "build the ClipDataset with train=True"),
    (dict(data=lambda: ClipDataset(*videos(), train=True)), ValueError, r"the local clips are cut with frames = 16, stride = 2, size = 56, and the model's local view has frames = 6, stride = 1, size = 16: build the ClipDataset with model\.local_view"),
    (dict(data=lambda: ClipDataset(*videos(), VIEWS[0], replace(VIEWS[1], mean=.4), train=True)), ValueError, r"the global clips are cut with mean = 0\.4, and the model's global view has mean = 0\.45"),
    (dict(data=lambda: ClipDataset([replace(r, label=r.label + 1) for r in videos()[0]], videos()[1], *VIEWS, train=True)), ValueError, "label 3 is none of the model's 3 classes"),
    (dict(stage=TEACH), TypeError, "stage is a Distillation; the order is"),      # which would teach nothing
    (dict(settings={"epochs": 1}), TypeError, "settings is a dict"), (dict(distillation="directed"), TypeError, "distillation is a str")])
def test_a_stage_looks_at_what_it_is_given_before_it_begins(wrong, kind, problem):
    model, given = make(), dict(data=data, settings=Training(epochs=1, batch_size=8), stage="warm-up", distillation=None) | wrong
    before = weights(model)
    with pytest.raises(kind, match=problem): train(model, given["data"](), *(given[name] for name in ("settings", "stage", "distillation")))
    assert equal(before, weights(model)) and model.map is not None


def test_answers_are_asked_for_in_the_views_of_the_model():
    for ask in (predict, measure_map, fit_fusions):
        with pytest.raises(ValueError, match="the global clips are cut with frames = 6, stride = 1, size = 16"): ask(make(), ClipDataset(*videos(), VIEWS[0], VIEWS[0]))
    rows = train(make(), data(), Training(epochs=1, batch_size=8), validate=data(False))      # whose views are those of the model, and not of the hand-built streams
    assert all(0 <= row["validation"] <= 1 for row in rows)


def test_a_stream_that_returns_its_logits_alone_is_named_wherever_it_is_asked():
    class Bare(torch.nn.Module):
        def __init__(self): super().__init__(); self.head = torch.nn.Linear(3, 3)
        def forward(self, x): return self.head(x.mean((2, 3, 4)))
    model = make(); model.local = Bare()
    clips = next(iter(training.batches(data(False), 4)))
    for ask in (lambda: model(clips["local"], clips["global_"]), lambda: train(model, data(), Training(epochs=1, batch_size=8)), lambda: predict(model, data(False))):
        with pytest.raises(TypeError, match="Bare returned a Tensor without logits, embedding, stages; a stream returns StreamOutput"): ask()


# ---- teaching

def test_directed_teaching_differs_from_none_and_arms_from_each_other():
    by_arm = {arm: weights(trained(distillation=replace(TEACH, arm=arm))[0]) for arm in ("directed", "both", "reversed", "none")}
    for arm, w in by_arm.items(): assert all(equal(w, other) == (arm == name) for name, other in by_arm.items())


def test_arm_none_takes_exactly_the_steps_of_the_control():
    control, rows = trained(Training(epochs=2, batch_size=8))
    none, same = trained(Training(epochs=2, batch_size=8), replace(TEACH, arm="none"))
    assert equal(weights(control), weights(none)) and [r["loss"] for r in rows] == [r["loss"] for r in same]
    assert equal(weights(trained(change=lambda m: setattr(m, "map", None), distillation=replace(TEACH, arm="none"))[0]), weights(trained()[0]))      # which needs no map


def test_teaching_with_no_weight_is_the_control_too():
    assert equal(weights(trained(distillation=replace(TEACH, final_weight=0., intermediate_weight=0.))[0]), weights(trained()[0]))


@pytest.mark.parametrize("group, taught", [("local", "global_"), ("global", "local")])
def test_the_dominant_stream_teaches_the_other_and_is_left_alone(group, taught):
    def one_way(model): model.map.group = [group] * 3
    plain, directed = trained()[0], trained(distillation=replace(TEACH, final_weight=5.), change=one_way)[0]
    left_alone, = {"local", "global_"} - {taught}
    assert distance(plain, directed, left_alone) < 1e-4 < .01 < distance(plain, directed, taught)


def test_balanced_classes_are_not_taught():
    def balanced(model): model.map.group = ["balanced"] * 3
    taught, plain = trained(distillation=TEACH, change=balanced)[0], trained()[0]
    assert max(distance(taught, plain, stream) for stream in ("local", "global_")) < 1e-4


def schools(monkeypatch):
    "What `train` sets up to teach, as it is set up."
    kept, inner = [], training._Teaching
    monkeypatch.setattr(training, "_Teaching", lambda *given: kept.append(inner(*given)) or kept[-1])
    return kept


def test_teachers_stay_as_they_were_and_get_no_gradient(monkeypatch):
    kept, start = schools(monkeypatch), make()
    model, _ = trained(Training(epochs=2, batch_size=8), TEACH)
    for teacher, begun, student in zip(kept[0].teachers.values(), (start.local, start.global_), (model.local, model.global_)):
        assert equal(weights(teacher.copy), weights(begun)) and not teacher.copy.training
        assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
        assert not equal(weights(teacher.copy), weights(student)) and all(p.requires_grad for p in student.parameters())


def test_averaged_teachers_follow_their_streams(monkeypatch):
    kept, start = schools(monkeypatch), make()
    model, _ = trained(Training(epochs=1, batch_size=24), replace(TEACH, teacher="averaged", teacher_decay=.75))      # one step
    for teacher, begun, student in zip(kept[0].teachers.values(), (start.local, start.global_), (model.local, model.global_)):
        for name, value in weights(teacher.copy).items():
            if value.is_floating_point(): assert torch.allclose(value, .75 * weights(begun)[name] + .25 * weights(student)[name], atol=1e-6)


def test_live_teachers_are_no_copies_and_teach_otherwise(monkeypatch):
    kept = schools(monkeypatch)
    live, rows = trained(distillation=replace(TEACH, teacher="live"))
    assert all(t.copy is None for t in kept[0].teachers.values()) and rows[-1]["final_to_global"] > 0
    assert not equal(weights(live), weights(trained(distillation=TEACH)[0]))


@pytest.mark.parametrize("intermediate", ["relation", "logit", "hint", "attention"])
def test_every_intermediate_loss_teaches_and_only_projections_are_added(intermediate, monkeypatch):
    kept, off = schools(monkeypatch), trained(distillation=replace(TEACH, intermediate_weight=0.))[0]
    model, rows = trained(Training(epochs=2, batch_size=8), replace(TEACH, intermediate=intermediate, intermediate_weight=2.))
    assert rows[-1]["intermediate_to_local"] > 0 and not equal(weights(model), weights(off))
    layers = {} if kept[1].layers is None else dict(kept[1].layers.named_parameters())
    assert bool(layers) == (intermediate in ("logit", "hint"))
    untrained = dict(training.Projections(intermediate, *(getattr(model, n)(data()[0][n][None]) for n in ("local", "global_")), seed=0).named_parameters())
    assert all(not torch.equal(value, untrained[name]) for name, value in layers.items() if "weight" in name)      # they learn


def test_projections_clip_their_gradients_apart(monkeypatch):
    seen, inner = [], torch.nn.utils.clip_grad_norm_
    def spy(parameters, norm):
        parameters = list(parameters)
        total = inner(parameters, norm)
        seen.append((len(parameters), torch.stack([p.grad.norm() for p in parameters]).norm().item()))
        return total
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    model, _ = trained(Training(epochs=1, batch_size=24, clip_norm=.01), replace(TEACH, arm="both", intermediate="hint", intermediate_weight=50.))
    assert len(seen) == 4 and all(norm <= .01 + 1e-5 for _, norm in seen)      # two streams, two sides of projections


def test_the_log_tells_how_the_terms_pull():
    _, rows = trained(Training(epochs=2, batch_size=8), replace(TEACH, arm="both"))
    for row in rows:
        assert row["norm labels"] > 0 and row["norm final"] > 0 and row["norm intermediate"] > 0
        assert all(-1 - 1e-6 <= row[name] <= 1 + 1e-6 for name in ("cosine labels, final", "cosine labels, intermediate", "cosine final, intermediate"))
    assert not any(name.startswith(("norm", "cosine")) for row in trained()[1] for name in row)


def test_pulls_are_logged_where_a_step_has_pieces_and_looked_at_once_an_epoch(monkeypatch):
    seen, inner = [], training._pulls
    monkeypatch.setattr(training, "_pulls", lambda name, *given: seen.append(name) or inner(name, *given))
    _, rows = trained(Training(epochs=1, batch_size=6, accumulate=2), replace(TEACH, arm="both"))
    assert all(row["norm labels"] > 0 and -1.01 < row["cosine labels, final"] < 1.01 for row in rows) and seen == ["local", "global"]


def test_looking_at_the_gradients_changes_nothing(monkeypatch):
    with_look = trained(distillation=TEACH)[0]
    monkeypatch.setattr(training, "_pulls", lambda *given: {})
    assert equal(weights(with_look), weights(trained(distillation=TEACH)[0]))


def test_weights_of_teaching_rise_and_fall():
    "With warm_up = 1 the first step of a stage has no lesson: a stage of one step is the control."
    one = Training(epochs=1, batch_size=24)
    rising, plain = trained(one, replace(TEACH, warm_up=1.))[0], trained(one)[0]
    assert max(distance(rising, plain, stream) for stream in ("local", "global_")) < 1e-4 < distance(trained(one, replace(TEACH, final_weight=5.))[0], plain, "global_")
    assert not equal(weights(trained(distillation=replace(TEACH, fade=.5))[0]), weights(trained(distillation=TEACH)[0]))


def test_relations_need_three_clips():
    with pytest.raises(ValueError, match="batch_size = 2.*need 3.*logit"): trained(Training(epochs=1, batch_size=2), TEACH)
    trained(Training(epochs=1, batch_size=2), replace(TEACH, intermediate="logit"))


def test_teachers_are_calibrated():
    def hot(model): model.temperature.copy_(torch.tensor([5., .2]))
    assert not equal(weights(trained(distillation=TEACH, change=hot)[0]), weights(trained(distillation=TEACH)[0]))
    assert trained(distillation=TEACH, change=hot)[0].temperature.tolist() == pytest.approx([5., .2])      # measured anew by measure_map only


def test_pulls_are_the_same_at_any_scale_of_the_loss():
    torch.manual_seed(0)
    stream, clip = torch.nn.Linear(3, 4), torch.randn(5, 3)
    output = StreamOutput(stream(clip), stream(clip), {"early": stream(clip)}); end = training._ends(output)
    labels, taught = end.logits.square().sum(), {"final_to_local": end.logits.sum(), "stage_to_local": end.stages["early"].exp().sum(), "final_to_global": end.logits.sum()}
    one, scaled = (training._pulls("local", stream, labels, taught, output, end, s) for s in (1., 1024.))
    assert one == pytest.approx(scaled) and {"norm labels", "norm final", "norm stage", "cosine labels, final"} <= set(one) and one["norm labels"] > 0


def test_teaching_pulls_the_student_to_its_teacher():
    def one_way(model): model.map.group = ["local"] * 3
    _, rows = trained(Training(epochs=4, batch_size=8, learning_rate=5e-3), replace(TEACH, final_weight=20.), change=one_way)
    assert rows[-1]["final_to_global"] < .6 * rows[0]["final_to_global"]


def partly(hidden, **more):
    "The videos of `data`, some of them without their label."
    records, frames = videos()
    return ClipDataset([replace(r, label=-1) if hidden(i) else r for i, r in enumerate(records)], frames, *VIEWS, train=True, **more)


def test_videos_without_a_label_are_learnt_from_their_teacher_only():
    model, alone = make(), make()
    rows = train(alone, partly(lambda i: True), Training(epochs=1, batch_size=8))
    assert all(torch.equal(a, b) for a, b in zip(make().parameters(), alone.parameters()) if a.ndim == 1) and rows[0]["loss"] == 0      # nothing but decay moves
    before = copy.deepcopy(model)
    train(model, partly(lambda i: True), Training(epochs=1, batch_size=8), distillation=replace(TEACH, arm="to_global"))
    moved = lambda name: any(not torch.equal(a, b) for a, b in zip(getattr(before, name).parameters(), getattr(model, name).parameters()) if a.ndim == 1)
    assert moved("global_") and not moved("local")


def test_rows_count_accuracy_over_the_labelled_clips():
    settings = Training(epochs=12, batch_size=8, learning_rate=5e-3)
    rows = train(make(), partly(lambda i: i >= 12), settings)
    assert all(r["labelled"] == .5 for r in rows) and rows[-2]["accuracy"] > .6        # not halved by those without a label
    assert "labelled" not in train(make(), data(), replace(settings, epochs=1))[0]


def test_directions_of_videos_without_a_label_come_from_the_teachers(monkeypatch):
    seen = []
    genuine = training.distillation_terms
    monkeypatch.setattr(training, "distillation_terms", lambda *a, **k: seen.append((a[4], a[5])) or genuine(*a, **k))
    def sure_of(model, c):
        for stream in (model.local, model.global_): stream.head.weight.data.zero_(); stream.head.bias.data.copy_(torch.nn.functional.one_hot(torch.tensor(c), 3) * 5.)
    model = make(); sure_of(model, 2)                                                                # both teachers say blue, a global class
    train(model, partly(lambda i: i % 2 == 0), Training(epochs=1, batch_size=8), distillation=TEACH)
    codes = model.map.group_codes
    for labels, groups in seen: assert all(g == (codes[2] if y < 0 else codes[y]) for y, g in zip(labels.tolist(), groups.tolist()))


@pytest.mark.parametrize("lesson", ("self", "fused", "dominant"))
def test_lessons_of_oneself_and_of_the_fusion_teach_too(lesson):
    plain = replace(TEACH, intermediate_weight=0., arm="both")
    other, mine, none = (trained(distillation=d)[0] for d in (plain, replace(plain, lesson=lesson), None))
    for a in (other, none): assert distance(a, mine, "local") > 1e-6 and distance(a, mine, "global_") > 1e-6


def test_lessons_of_the_dominant_stream_are_for_both_and_for_whole_clips():
    with pytest.raises(ValueError, match="lesson='dominant' is heard by both streams.*set it to 'both'"): Distillation(lesson="dominant", intermediate_weight=0.)
    with pytest.raises(ValueError, match="follows one label of a video"): train(make(), data(), Training(epochs=1, batch_size=8, mixing=Mixing(mixup=.4)), distillation=replace(TEACH, intermediate_weight=0., arm="both", lesson="dominant"))


def test_mixed_clips_need_labels():
    with pytest.raises(ValueError, match="mixup and cutmix"): train(make(), partly(lambda i: True), Training(epochs=1, batch_size=8, mixing=Mixing(mixup=.4)))


def test_teaching_without_a_map_is_refused_before_anything_happens():
    model = make(mapped=False)
    before = weights(model)
    with pytest.raises(ValueError, match="dominance map.*measure_map"): train(model, data(), distillation=TEACH)
    assert equal(before, weights(model))


# ---- steps

def spike(model): model.global_.head.weight.data.mul_(1e4)


@pytest.mark.parametrize("teach", [None, replace(TEACH, arm="none")])
def test_a_spike_in_one_stream_does_not_change_the_steps_of_the_other(teach):
    calm, wild = trained(distillation=teach)[0], trained(distillation=teach, change=spike)[0]
    assert equal(weights(calm.local), weights(wild.local)) and not equal(weights(calm.global_.stem), weights(wild.global_.stem))


def test_a_spike_in_one_stream_does_not_change_the_steps_of_the_other_while_it_teaches():
    def one_way(model): model.map.group = ["local"] * 3      # only the global stream is taught
    assert equal(weights(trained(distillation=TEACH, change=one_way)[0].local), weights(trained(distillation=TEACH, change=lambda m: (one_way(m), spike(m)))[0].local))


def test_gradients_of_each_stream_are_clipped(monkeypatch):
    norms, inner = [], torch.optim.AdamW.step
    def spy(self, *given, **more):
        for stream in ("local.", "global."): norms.append(torch.stack([p.grad.norm() for g in self.param_groups for n, p in zip(g["names"], g["params"]) if n.startswith(stream)]).norm().item())
        return inner(self, *given, **more)
    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    trained(Training(epochs=1, batch_size=8, clip_norm=.01), change=spike)
    assert len(norms) == 6 and max(norms) <= .01 + 1e-5 and min(norms) > .005


class Spoilt:
    "Training data of which some steps' local clips are NaN."
    def __init__(self, inner, steps, key="local"): self.__dict__.update(inner.__dict__, steps=steps, key=key, inner=inner)
    def __len__(self): return len(self.inner)
    def batches(self, batch_size, shuffle):
        self.inner.seed, self.inner.epoch, self.count = self.seed, self.epoch, getattr(self, "count", 0)
        outer = self
        class Loader:
            def all(self, first=0):
                for batch in training.batches(outer.inner, batch_size, shuffle):
                    outer.count += 1
                    yield batch | {outer.key: batch[outer.key]*float("nan")} if outer.count in outer.steps else batch
        return Loader()


@pytest.mark.parametrize("key", ["local", "global_"])
@pytest.mark.parametrize("teach", [None, TEACH])
def test_a_step_that_is_not_finite_is_skipped_and_counted(key, teach):
    "Four steps of which the second is spoilt move the weights as the other three do, but for the rate's schedule."
    model = make()
    rows = train(model, Spoilt(data(), {2, 5}, key), Training(epochs=2, batch_size=8), distillation=teach, stage="distil")
    assert [r["skipped"] for r in rows] == [1, 1, 1, 1] and all(math.isfinite(r["loss"]) and math.isfinite(r["accuracy"]) for r in rows)
    assert all(torch.isfinite(v).all() for v in weights(model).values()) and not equal(weights(model), weights(make()))


def test_a_skipped_step_leaves_everything_as_it_was(monkeypatch):
    model = make()
    with training.Trainer(model, 10, Training(batch_size=8, average=.5), TEACH) as trainer:
        good = next(iter(training.batches(data(), 8, shuffle=True)))
        trainer.step([good])
        before = {n: v.clone() for n, v in training._tensors(trainer).items()}
        assert trainer.step([good | {"global_": good["global_"]*float("inf")}]) == ({}, {}) and (trainer.skipped, trainer.in_a_row, trainer.done) == (1, 1, 2)
        assert equal(before, training._tensors(trainer))      # weights, running statistics, moments, averages
        trainer.step([good])
        assert trainer.in_a_row == 0 and not equal(before, training._tensors(trainer))


@pytest.mark.parametrize("stream", ["local", "global_"])
def test_too_many_skipped_steps_end_the_stage_with_its_name_and_a_remedy(stream):
    def broken(model): getattr(model, stream).head.bias.data.fill_(float("nan"))
    model = make(); broken(model)
    before = weights(model)
    with pytest.raises(FloatingPointError, match=r"distil, epoch 1, step 5: the gradient was not finite in 5 steps in a row; lower learning_rate.*max_skipped = 4"):
        train(model, data(), Training(epochs=3, batch_size=4, max_skipped=4), stage="distil")
    assert all(torch.equal(v, before[n]) or v.isnan().any() for n, v in weights(model).items())
    with pytest.raises(FloatingPointError, match=r"warm-up, epoch 1: the gradient was finite in none of 3 steps"): train(model, data(), Training(epochs=1, batch_size=8))


def test_biases_norms_and_positions_are_spared_from_decay():
    model = make()
    adam = optimiser({"local": model.local, "global": model.global_}, Training(learning_rate=1e-2, weight_decay=.3))
    named = {f"{s}.{n}": p for s, stream in (("local", model.local), ("global", model.global_)) for n, p in stream.named_parameters()}
    groups = {}
    for g in adam.param_groups:
        assert all(named[n] is p for n, p in zip(g["names"], g["params"], strict=True))
        groups.setdefault(g["weight_decay"], set()).update(g["names"])
    assert set(groups) == {.3, 0.} and groups[.3] | groups[0.] == set(named) and {"local.head.weight", "global.head.weight"} <= groups[.3]
    assert all(n.endswith("bias") or "norm" in n or n.rsplit(".")[-1] in ("moment", "place") or named[n].ndim == 1 for n in groups[0.])


def test_the_rate_rises_and_falls_along_the_steps(monkeypatch):
    rates, inner = [], torch.optim.AdamW.step
    def spy(self, *given, **more): rates.append(self.param_groups[0]["lr"]); return inner(self, *given, **more)
    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    trained(Training(epochs=4, batch_size=8, learning_rate=1e-2, warm_up=.25))
    assert len(rates) == 12 and max(rates) == pytest.approx(1e-2, rel=.05) and rates.index(max(rates)) in (2, 3) and rates[0] < .5*max(rates) and rates[-1] < .1*max(rates)
    assert rates[3:] == sorted(rates[3:], reverse=True)


def test_the_rate_of_the_global_stream_alone_decays_from_layer_to_layer():
    model = make()
    groups = optimiser({"local": model.local, "global": model.global_}, Training(layer_decay=.5)).param_groups
    rate = {n: g["peak"] for g in groups for n in g["names"]}
    assert {r for n, r in rate.items() if n.startswith("local.")} == {2e-3} and rate["global.head.weight"] == 2e-3
    assert min(r for n, r in rate.items() if "stem" in n) < rate["global.head.weight"]/2


# ---- the recipe

@pytest.mark.parametrize("teach", [None, replace(TEACH, intermediate="logit")])
def test_a_step_in_pieces_is_the_step_as_a_whole(teach):
    "SGD, float64, frozen normalisation: what is left of the difference is rounding."
    def double(model): model.double(); model.map.reference
    settings = Training(epochs=2, batch_size=8, optimiser="sgd", learning_rate=.05, batch_norm="frozen")
    whole, pieces = trained(settings, teach, change=double)[0], trained(replace(settings, accumulate=4), teach, change=double)[0]
    assert all(torch.allclose(v.double(), weights(pieces)[n].double(), atol=1e-12, rtol=0) for n, v in weights(whole).items()) and not equal(weights(whole), weights(make().double()))


def test_averaged_weights_are_what_a_stage_ends_with():
    last, averaged = trained(Training(epochs=4, batch_size=8, learning_rate=1e-2))[0], trained(Training(epochs=4, batch_size=8, learning_rate=1e-2, average=.9))[0]
    start, name = make(), "head.weight"
    a, b, c = (m.local.state_dict()[name] for m in (last, averaged, start))
    assert not torch.equal(a, b) and (b - c).norm() < (a - c).norm()      # it lags behind


def test_frozen_normalisation_keeps_its_statistics():
    moved, kept = trained()[0], trained(Training(epochs=1, batch_size=8, batch_norm="frozen"))[0]
    mean = next(n for n in weights(moved) if n.endswith("running_mean"))
    assert torch.equal(weights(kept)[mean], weights(make())[mean]) and not torch.equal(weights(moved)[mean], weights(make())[mean])


def test_mixed_clips_train_and_teach():
    mixed = Training(epochs=6, batch_size=8, learning_rate=1e-2, mixing=Mixing(mixup=.3))
    model, rows = trained(mixed, TEACH)
    assert not equal(weights(model), weights(trained(replace(mixed, mixing=Mixing()), TEACH)[0]))
    answers = predict(model, data(False))
    for z in (answers.local, answers.global_): assert (z.mean(1).argmax(1) == answers.labels).float().mean() > .7
    with pytest.raises(ValueError, match="two videos.*relation"): trained(mixed, replace(TEACH, intermediate="hint"))


def test_streams_that_draw_give_the_same_weights_again_and_keep_the_callers_generator():
    def drops(model): model.local.head = torch.nn.Sequential(torch.nn.Dropout(.5), model.local.head); model.global_.head = torch.nn.Sequential(torch.nn.Dropout(.5), model.global_.head)
    torch.manual_seed(7); state = torch.get_rng_state()
    first, again, other = trained(change=drops)[0], trained(change=drops)[0], trained(replace(Training(epochs=1, batch_size=8), seed=1), change=drops)[0]
    assert equal(weights(first), weights(again)) and not equal(weights(first), weights(other))
    torch.manual_seed(7); model = make(); torch.manual_seed(7); train(model, data(), Training(epochs=1, batch_size=8))
    assert torch.equal(torch.get_rng_state(), state)


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ValueError, match="batch_size = 9 .*multiple of 2"): trained(Training(epochs=1, batch_size=9, accumulate=2))
    with pytest.raises(ValueError, match="24 videos"): trained(Training(epochs=1, batch_size=48, accumulate=2))
    with pytest.raises(ValueError, match="'synced' joins the statistics of several GPUs"): trained(Training(epochs=1, batch_size=8, batch_norm="synced"))
    with pytest.raises(ValueError, match="float16 needs a CUDA"): trained(Training(epochs=1, batch_size=8, precision="float16"))


@pytest.mark.parametrize("teach", [None, TEACH])
def test_bfloat16_stays_finite_and_near(teach):
    half, rows = trained(Training(epochs=2, batch_size=8, precision="bfloat16"), teach)
    _, full = trained(Training(epochs=2, batch_size=8), teach)
    assert all(v.dtype == w.dtype and torch.isfinite(v).all() for v, w in zip(weights(half).values(), weights(make()).values()))
    assert [r["loss"] for r in rows] == pytest.approx([r["loss"] for r in full], rel=.1) and [r["loss"] for r in rows] != [r["loss"] for r in full]


@pytest.mark.parametrize("change, words", [(dict(epochs=-1), "epochs"), (dict(epochs=1.5), "epochs"), (dict(batch_size=1), "batch_size must be a whole number of at least 2"), (dict(precision="half"), "precision must be float32, bfloat16 or float16, not 'half'"), (dict(optimiser="adam"), "optimiser must be adamw or sgd"), (dict(average=1.), "average must be at least 0 and below 1"),
                                           (dict(layer_decay=0), "layer_decay"), (dict(accumulate=0), "accumulate"), (dict(batch_norm="off"), "batch_norm must be"),
                                           (dict(learning_rate=0), "learning_rate must be above 0"), (dict(learning_rate=float("nan")), "learning_rate"), (dict(clip_norm=-1), "clip_norm"), (dict(learning_rate="1e-3"), "learning_rate must be above 0, not '1e-3'"), (dict(weight_decay=-1.), "weight_decay"), (dict(seed=-1), "seed"), (dict(warm_up=None), "warm_up")])
def test_impossible_settings(change, words):
    with pytest.raises(ValueError, match=words): Training(**change)


# ---- predictions, map, fusions

@pytest.mark.parametrize("clips, batch", [(1, 50), (3, 5)])
def test_predictions_cover_each_video_once(clips, batch):
    model, part, seen = make().train(), data(False, clips=clips), []
    answers = predict(model, part, batch, progress=lambda *x: seen.append(x))
    assert answers.ids == [r.id for r in part.records] == sorted(set(answers.ids)) and answers.labels.tolist() == [r.label for r in part.records] and answers.sources == part.sources
    assert answers.local.shape == answers.global_.shape == (24, clips, 3) and seen[-1] == (24 * clips, 24 * clips) and not answers.local.requires_grad
    with torch.no_grad(): one = model(part[7 * clips + clips - 1]["local"][None], part[7 * clips + clips - 1]["global_"][None])
    assert torch.allclose(answers.local[7, -1], one.local.logits[0], atol=1e-5) and torch.allclose(answers.global_[7, -1], one.global_.logits[0], atol=1e-5)


def test_views_are_averaged_as_calibrated_probabilities():
    answers = predict(make(), data(False))
    for temperature in ([2., .5], np.array([2., .5])): assert all(map(torch.equal, calibrate(answers, temperature), calibrate(answers, torch.tensor([2., .5]))))
    answers = predict(make(), data(False, clips=3))
    for z, raw, t in zip(calibrate(answers, torch.tensor([2., .5])), (answers.local, answers.global_), (2., .5)):
        assert z.shape == (24, 3) and z.dtype == torch.float64 and torch.allclose(z.exp(), (raw.double() / t).softmax(2).mean(1)) and torch.allclose(z.exp().sum(1), torch.ones(24).double())


def test_random_cuts_are_no_test():
    with pytest.raises(ValueError, match="train=False"): predict(make(), data(True))
    steps = []
    with pytest.raises(ValueError, match="train=False"): trained(validate=data(True), progress=lambda *at: steps.append(at))
    assert not steps                                          # before the first epoch, not after it


@pytest.mark.parametrize("intermediate", ["logit", "hint"])
def test_projections_learn_beside_a_model_in_bfloat16(intermediate):
    rows = trained(distillation=replace(TEACH, intermediate=intermediate, arm="both"), change=lambda model: model.bfloat16())[1]
    assert all(math.isfinite(r["loss"]) and r["skipped"] == 0 and r["intermediate_to_local"] > 0 for r in rows)


def test_the_map_is_measured_and_the_temperatures_with_it():
    model, _ = trained(Training(epochs=3, batch_size=8))
    model.map = None
    before, part = weights(model), data(False, clips=2)
    answers = measure_map(model, part, seed=4)
    assert model.map.classes == CLASSES and model.map.n.tolist() == [8, 8, 8] and model.map.num_sources.tolist() == [4, 4, 4] and (model.temperature != 1).all()
    assert torch.equal(answers.local, predict(model, part).local)
    assert all(torch.equal(v, before[n]) for n, v in weights(model).items() if n != "temperature")
    again = copy.deepcopy(model)
    measure_map(again, part, seed=4)
    assert again.map.to_dict() == model.map.to_dict() and torch.equal(again.temperature, model.temperature)
    measure_map(again, part, seed=5)
    assert torch.equal(again.map.share, model.map.share)      # the seed is of the intervals only
    assert not torch.equal(again.map.low, model.map.low)


def test_a_better_local_stream_has_the_larger_share():
    model = make(mapped=False)
    model.local, model.global_ = trained(Training(epochs=6, batch_size=8, learning_rate=1e-2))[0].local, make(9).global_
    measure_map(model, data(False))
    assert model.map.reference > .6


def test_fusions_are_fitted_on_the_gate_and_the_adaptive_one_is_set():
    model, _ = trained(Training(epochs=3, batch_size=8))
    measure_map(model, data(False))
    before, map_before = weights(model.local) | weights(model.global_), model.map.to_dict()
    fusions, best = fit_fusions(model, data(False))
    assert {"average", "scalar", "class", "entropy", "stacking", "gate", "features", "adaptive"} == set(fusions) and best in ({"local", "global"} | set(fusions)) - {"adaptive"}
    assert model.fusion is fusions["adaptive"] and isinstance(model.fusion, AdaptiveFusion) and torch.allclose(model.fusion.logit_share.double(), model.map.logit_share, atol=1e-6)
    assert (float(model.fusion.slope), float(model.fusion.bias)) != (1., 0.) and float(fusions["scalar"].bias) != 0
    assert equal(before, weights(model.local) | weights(model.global_)) and model.map.to_dict() == map_before
    pair = [z.exp() for z in calibrate(predict(model, data(False)), model.temperature)]
    with torch.no_grad(): out = model(*(torch.stack([data(False)[i][k] for i in range(24)]) for k in ("local", "global_")))
    assert torch.allclose(out.fused.double(), fusions["adaptive"](*pair).double(), atol=1e-4)      # a model answers as its evaluation does


def test_the_baseline_is_chosen_on_videos_its_fusion_was_not_fitted_on(monkeypatch):
    model, chosen = make(), {}
    def spy(candidates, labels):
        chosen.update(candidates)
        return "average"
    monkeypatch.setattr(training, "choose_baseline", spy)
    fusions, _ = fit_fusions(model, data(False))
    pair = [z.exp() for z in calibrate(predict(model, data(False)), model.temperature)]
    assert set(chosen) == ({"local", "global"} | set(fusions)) - {"adaptive"} and torch.allclose(chosen["local"], pair[0])
    assert not torch.allclose(chosen["scalar"].double(), fusions["scalar"](*pair).double(), atol=1e-6)


def test_all_fusions_answer_to_what_they_take():
    model = make()
    fusions, _ = fit_fusions(model, data(False))
    answers = predict(model, data(False))
    fused, pair = training.fuse_all(fusions, answers, model.temperature), [z.exp() for z in calibrate(answers, model.temperature)]
    assert fused.keys() == fusions.keys() and all(p.shape == (24, 3) and torch.allclose(p.sum(1), torch.ones(24, dtype=p.dtype), atol=1e-5) for p in fused.values())
    assert torch.allclose(fused["average"], (pair[0] + pair[1]) / 2) and torch.equal(fused["features"], fusions["features"](*answers.embeddings))


@pytest.mark.parametrize("clips", [1, 3])
def test_embeddings_are_averaged_over_the_views(clips):
    model, part = make().eval(), data(False, clips=clips)
    answers = predict(model, part, 5)
    assert [e.shape for e in answers.embeddings] == [(24, 6), (24, 12)]
    with torch.no_grad(): views = torch.stack([model.local(part[5 * clips + v]["local"][None]).embedding[0] for v in range(clips)])
    assert torch.allclose(answers.embeddings[0][5], views.mean(0), atol=1e-5)


def test_fusions_without_a_map_are_refused():
    model = make(mapped=False)
    with pytest.raises(ValueError, match="dominance map.*measure_map"): fit_fusions(model, data(False))
    assert isinstance(model.fusion, MeanFusion)


def test_the_whole_schedule_then_save_and_load(tmp_path):
    model, _ = trained(Training(epochs=2, batch_size=8))
    measure_map(model, data(False)); train(model, data(), Training(epochs=1, batch_size=8), "distil", TEACH)
    measure_map(model, data(False)); fit_fusions(model, data(False))
    again = MBD.load(model.save(tmp_path / "m"))
    a, b = (predict(m, data(False)) for m in (model, again))
    assert torch.equal(a.local, b.local) and torch.equal(a.global_, b.global_) and torch.equal(model.temperature, again.temperature)
    continued = [weights((train(m, data(), Training(epochs=1, batch_size=8), "distil", TEACH), m)[1]) for m in (model, again)]
    assert equal(*continued)


def test_projections_need_a_batch_that_shows_their_shapes():
    with pytest.raises(ValueError, match="intermediate = 'logit'.*example"): training.Trainer(make(), 1, Training(batch_size=8), Distillation(intermediate="logit"))


# ---- videos that cannot be read

def test_an_unreadable_video_is_left_out_of_answers_and_counted(tmp_path):
    pytest.importorskip("av")
    from mbd.video import write_video
    rng, views = np.random.default_rng(0), (View(8, 1, 16), View(4, 2, 8))
    records = [Record(f"v{i}", write_video(tmp_path / f"v{i}.mp4", rng.integers(0, 256, (16, 32, 32, 3)).astype(np.uint8)), i % 3, f"s{i}") for i in range(6)]
    (tmp_path / "v2.mp4").write_bytes(b"no video")
    model = MBD(LocalStream(3), GlobalStream(3, frames=4), ["a", "b", "c"], *views)
    data, sound = (ClipDataset(some, None, *views, clips=2, crops=3, max_failures=.2) for some in (records, [r for r in records if r.id != "v2"]))
    answers, wanted = training.predict(model, data, batch_size=7), training.predict(model, sound)
    assert answers.ids == ["v0", "v1", "v3", "v4", "v5"] and answers.sources == ["s0", "s1", "s3", "s4", "s5"] and answers.labels.tolist() == [0, 1, 0, 1, 2]
    assert answers.local.shape == (5, 6, 3) and torch.allclose(answers.local, wanted.local, atol=1e-5) and torch.allclose(answers.global_, wanted.global_, atol=1e-5)
    assert list(data.failures) == ["v2"] and not sound.failures


def test_kept_answers_are_those_of_the_files_that_are_there(tmp_path):
    pytest.importorskip("av")
    from mbd.video import write_video
    rng, views, kept = np.random.default_rng(0), (View(8, 1, 16), View(4, 2, 8)), Checkpoints(tmp_path/"kept", every=0)
    film = lambda i: write_video(tmp_path/f"v{i}.mp4", rng.integers(0, 256, (16, 32, 32, 3)).astype(np.uint8))
    records = [Record(f"v{i}", film(i), i % 3, f"s{i}") for i in range(4)]
    sound = records[2].path.read_bytes(); records[2].path.write_bytes(b"no video")
    model = MBD(LocalStream(3), GlobalStream(3, frames=4), ["a", "b", "c"], *views)
    def ask(**more):
        data = ClipDataset(records, None, *views, max_failures=.5)
        return training.predict(model, data, **more), list(data.failures)
    assert ask(checkpoints=kept)[1] == ask(checkpoints=kept)[1] == ["v2"]
    records[2].path.write_bytes(sound); film(1)                      # one is mended, one replaced
    (answers, failed), (wanted, _) = ask(checkpoints=kept), ask()
    assert not failed and answers.ids == wanted.ids == ["v0", "v1", "v2", "v3"] and torch.equal(answers.local, wanted.local)
    for path in tmp_path.glob("v*.mp4"): os.utime(path, ns=(os.stat(path).st_atime_ns, os.stat(path).st_mtime_ns))
    assert torch.equal(ask(checkpoints=kept)[0].local, wanted.local)


def test_a_prediction_that_saves_nothing_can_be_stopped_too():
    def ask(done, clips): signal.raise_signal(signal.SIGTERM)
    with pytest.raises(training.Stopped, match=r"stopped at batch 1 of \d+$"): training.predict(make(), data(False), batch_size=5, progress=ask)


def test_a_stage_reads_its_videos_in_workers_with_the_same_result():
    assert equal(weights(trained(workers=2)[0]), weights(trained()[0]))


@pytest.mark.parametrize("fit", [measure_map, fit_fusions])
def test_nothing_is_fitted_on_videos_that_pretrained_weights_have_seen(fit):
    "Confidence on them is memory: neither the map nor the fusion may be measured there."
    part, model = data(False), make()
    part.records = [replace(r, origin="kinetics400/train") for r in part.records]
    model.global_.seen = frozenset(["imagenet1k", "kinetics400/train"])
    with pytest.raises(ValueError, match=r"kinetics400/train.*global stream.*half of the validation list"): fit(model, part)
    part.records = [replace(r, origin="kinetics400/validation") for r in part.records]
    fit(model, part)


def test_channels_last_changes_the_layout_and_not_the_step():
    from mbd.pairs import find_pair
    from mbd.speed import random_clips, random_model
    after = {}
    for layout in (False, True):
        torch.manual_seed(0)
        model = random_model(find_pair("miniactions", "hand"))
        local, global_ = random_clips(model, 4)
        batch = {"local": local, "global_": global_, "label": torch.arange(4), "index": torch.arange(4), "view": torch.zeros(4, dtype=torch.long)}
        with training.Trainer(model, 4, training.Training(batch_size=4, optimiser="sgd", channels_last=layout, warm_up=0.), TEACH) as trainer: trainer.step([batch])
        after[layout] = model.state_dict()
        kernels = [p for p in model.parameters() if p.ndim == 5 and p.shape[1] > 1 and p[0, 0].numel() > 1]
        assert kernels and all(p.is_contiguous(memory_format=torch.channels_last_3d) == layout for p in kernels)
    assert all(torch.allclose(after[False][n].double(), after[True][n].double(), atol=1e-4) for n in after[False])


@pytest.mark.slow
def test_compiled_streams_of_different_sizes_take_the_same_steps():
    "Both are wrapped alike: the compiler must not take their two sizes for one that varies."
    settings = Training(epochs=1, batch_size=8)
    (plain, _), (compiled, rows) = trained(settings), trained(replace(settings, compile=True))
    assert all(distance(plain, compiled, name) < 1e-2 for name in ("local", "global_")) and rows[0]["skipped"] == 0
