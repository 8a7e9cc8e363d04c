"""Accuracies, intervals and the blocks of a result record."""
import json

import numpy as np
import pytest
import torch

from mbd import evaluation as ev
from mbd.dominance import simulate_streams
from mbd.fusion import MeanFusion, cross_fit, fit_all


def probabilities(seed=0, n=60, k=7):
    return torch.tensor(np.random.default_rng(seed).normal(size=(n, k))).softmax(1)


# ---- is an answer right?

@pytest.mark.parametrize("k", [1, 2, 5, 7])
def test_top_k_is_membership_in_the_k_largest(k):
    p = probabilities()
    y = torch.arange(60) % 7
    expected = [int(y[i]) in p[i].topk(k).indices.tolist() for i in range(60)]
    assert ev.top_k_correct(p, y, k).tolist() == expected


def test_a_tie_is_not_right():
    assert not ev.top_k_correct(np.full((3, 4), 0.25), [0, 1, 2]).any()
    assert ev.top_k_correct(np.array([[0.5, 0.5, 0.0]]), [0], k=2).all()


@pytest.mark.parametrize("p, y, words", [
    (np.full((2, 2), np.nan), [0, 1], "not finite"),
    (np.empty((0, 3)), np.empty(0, int), "at least one video"),
    (np.array([[2.0, -1.0]]), [0], "logits"),
    (np.array([[0.5, 0.5]]), [2], "classes"),
    (np.array([[0.5, 0.5]]), [-1], "classes"),
    (np.array([[0.5, 0.5]]), [0.0], "whole numbers"),
    (np.array([[0.5, 0.5]]), [0, 1], "labels"),
])
def test_what_is_no_answer_is_an_error(p, y, words):
    with pytest.raises(ValueError, match=words):
        ev.top_k_correct(p, np.asarray(y))


def test_k_beyond_the_classes_is_an_error():
    with pytest.raises(ValueError, match="between 1 and the 7"):
        ev.top_k_correct(probabilities(), torch.zeros(60, dtype=torch.long), 8)


def test_views_are_averaged_as_probabilities():
    views = torch.tensor(np.random.default_rng(1).normal(0, 3, size=(5, 4, 6)))
    assert torch.allclose(ev.average_views(views).softmax(1), views.softmax(2).mean(1))
    assert torch.isfinite(ev.average_views(views * 500)).all()      # where float32 probabilities would be 0
    with pytest.raises(ValueError, match="N, V, K"):
        ev.average_views(views[0])


# ---- intervals

def test_interval_agrees_with_a_bootstrap_written_out():
    rng = np.random.default_rng(0)
    source = np.sort(rng.integers(12, size=90))
    values = (rng.random(90) < 0.7).astype(float)
    names, again = np.unique(source), np.random.default_rng(9)
    means = []
    for _ in range(4000):
        drawn = again.choice(names, len(names))
        means.append(np.concatenate([values[source == s] for s in drawn]).mean())
    mean, low, high = ev.interval(values, source, resamples=4000)
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.012)


def test_interval_of_identical_videos_counts_sources_not_videos():
    right = np.random.default_rng(0).random(30) < 0.6
    once = ev.interval(right, np.arange(30))
    many = ev.interval(np.repeat(right, 50), np.repeat(np.arange(30), 50))
    assert many == pytest.approx(once)
    alone = ev.interval(np.repeat(right, 50), None)
    assert alone[2] - alone[1] < 0.3 * (many[2] - many[1])


def test_interval_covers_about_as_often_as_it_says():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(200):
        of_source = rng.beta(1.6, 0.4, size=50)
        right = rng.random((50, 10)) < of_source[:, None]
        _, low, high = ev.interval(right.ravel(), np.repeat(np.arange(50), 10), resamples=300)
        hits += low <= 0.8 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_interval_is_reproducible_and_follows_seed_and_confidence():
    right, source = np.random.default_rng(0).random(80) < 0.6, np.repeat(np.arange(20), 4)
    assert ev.interval(right, source) == ev.interval(right, source)
    assert ev.interval(right, source)[1:] != ev.interval(right, source, seed=1)[1:]
    narrow, wide = ev.interval(right, source, confidence=0.5), ev.interval(right, source, confidence=0.99)
    assert wide[1] < narrow[1] < narrow[2] < wide[2]
    texts = [f"v_Diving_g{s:02d}" for s in source]
    assert ev.interval(right, texts) == ev.interval(right, source)


def test_interval_does_not_depend_on_the_order_of_videos():
    right, source = np.random.default_rng(0).random(80) < 0.6, np.repeat(np.arange(20), 4)
    order = np.random.default_rng(1).permutation(80)
    assert ev.interval(right[order], source[order]) == pytest.approx(ev.interval(right, source))


@pytest.mark.parametrize("values, sources, words", [
    ([1.0, np.nan], ["a", "b"], "finite"), ([], [], "at least one"), ([1, 0], ["a", "a"], "one source"), ([1, 0], ["a"], "as many sources"),
    ([1, 0, 1], ["a", np.nan, np.nan], "video 1 of 3 has no source"), ([1, 0, 1], [None, "a", "b"], "video 0 of 3 has no source"), ([1, 0, 1], np.array([1, 2, np.nan]), "video 2 of 3 has no source"),
])
def test_interval_refuses(values, sources, words):
    with pytest.raises(ValueError, match=words):
        ev.interval(np.array(values, float), sources)


@pytest.mark.parametrize("options", [dict(confidence=95), dict(confidence=0.0), dict(resamples=0)])
def test_intervals_name_the_confidence_and_resamples_they_refuse(options):
    with pytest.raises(ValueError, match="confidence must lie between 0 and 1, and resamples be at least 1, not"):
        ev.interval([1, 0], ["a", "b"], **options)


def test_bins_refuse_missing_sources_and_lengths_that_are_no_frames():
    for bins in (lambda s: ev.by_group({"m": [1, 0]}, [0, 0], [1], s), lambda s: ev.by_length({"m": [1, 0]}, [9, 9], s)):
        with pytest.raises(ValueError, match="video 1 of 2 has no source"):
            bins(["a", np.nan])
    with pytest.raises(ValueError, match="whole number of frames"):      # two bins of seconds would both be called 1-1
        ev.by_length({"m": [1, 0]}, [1.2, 1.8], None)


def test_answers_in_half_precision_are_scored():
    p, y = torch.randn(50, 400, generator=torch.Generator().manual_seed(0)).mul(3).softmax(1), torch.arange(50)
    for q in (p.half(), p.bfloat16()):
        assert ev.top_k_correct(q, y, 5).sum() <= (q >= q.gather(1, y[:, None])).sum(1).le(5).sum() and ev.confusion(q, y).sum() == 50
        assert ev.interval(q[:, 0], None)[0] == pytest.approx(float(q[:, 0].double().mean()))


def test_paired_difference_sees_what_two_intervals_cannot():
    rng = np.random.default_rng(0)
    a = rng.random(300) < 0.7
    b = a | (rng.random(300) < 0.15)
    source = np.repeat(np.arange(60), 5)
    estimate, low, high = ev.paired_difference(b, a, source)
    assert estimate == pytest.approx(b.mean() - a.mean()) and low > 0
    assert ev.interval(a, source)[2] > ev.interval(b, source)[1]
    assert ev.paired_difference(a, a, source) == (0, 0, 0)
    with pytest.raises(ValueError, match="same"):
        ev.paired_difference(a, b[:-1], source)


# ---- choosing, confusion, groups, lengths

def test_baseline_is_the_most_accurate_then_the_better_calibrated():
    y = torch.tensor([0, 1, 1])
    right = torch.tensor([[0.8, 0.2], [0.3, 0.7], [0.4, 0.6]])
    wrong = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.9, 0.1]])
    assert ev.choose_baseline({"wrong": wrong, "right": right, "unsure": 0.2 * right + 0.4}, y) == "right"
    with pytest.raises(ValueError):
        ev.choose_baseline({}, y)


class Heart(MeanFusion):
    "Knows by heart what it was fitted on, and nothing else"
    def fit(self, p_local, p_global, labels, sources=None):
        self.known = {tuple(row): y for row, y in zip(p_local.tolist(), torch.eye(p_local.shape[1])[labels])}
        return self
    def forward(self, p_local, p_global):
        return torch.stack([self.known.get(tuple(row), torch.full_like(p_local[0], 1 / p_local.shape[1])) for row in p_local.tolist()])


def test_a_baseline_that_overfits_is_chosen_by_its_own_videos_and_not_by_cross_fitted_answers():
    s = simulate_streams(sources=3, noise=(1, 1))
    pair = s.local.softmax(1), s.global_.softmax(1)
    makes = {"average": MeanFusion, "heart": Heart}
    assert ev.choose_baseline({n: make().fit(*pair, s.labels)(*pair) for n, make in makes.items()}, s.labels) == "heart"
    assert ev.choose_baseline({n: cross_fit(make, *pair, s.labels, s.sources) for n, make in makes.items()}, s.labels) == "average"


def test_confusion_counts_rows_by_true_class():
    p = torch.tensor([[0.9, 0.1, 0], [0.2, 0.8, 0], [0.1, 0.2, 0.7]])
    assert ev.confusion(p, torch.tensor([0, 0, 2])).tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]


def test_oracle_and_agreement():
    a, b = torch.tensor([1, 1, 0, 0, 1]).bool(), torch.tensor([1, 0, 1, 0, 1]).bool()
    assert ev.oracle(a, b).tolist() == [True, True, True, False, True]
    assert ev.agreement(a, b) == {"both": 0.4, "local_only": 0.2, "global_only": 0.2, "neither": 0.2}


def test_by_group_goes_by_the_true_class():
    right = {"local": np.array([1, 1, 0, 0, 1, 0]), "global": np.array([0, 1, 1, 1, 1, 1])}
    groups = ev.by_group(right, torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([1, -1, 0]), list("abcdef"))
    assert {g: (e["videos"], e["classes"], e["top1"]["local"]) for g, e in groups.items()} == {
        "local": (2, 1, 1.0), "balanced": (2, 1, 0.5), "global": (2, 1, 0.0)}
    with pytest.raises(ValueError, match="group_codes"):
        ev.by_group(right, torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([2, -1, 0]), None)
    with pytest.raises(ValueError, match="one of the 2 classes as its label: found -1"): ev.by_group({"a": [1, 0, 1]}, [-1, 0, 1], [1, -1], None)


def test_by_length_cuts_every_video_into_one_bin():
    lengths = np.arange(30, 120)
    bins = ev.by_length({"local": lengths > 60}, lengths, None)
    assert sum(e["videos"] for e in bins.values()) == 90 and len(bins) == 4
    assert list(bins)[0] == "30-52" and bins["30-52"]["top1"]["local"] == 0
    assert list(ev.by_length({"local": np.ones(4)}, [32] * 4, None)) == ["32-32"]
    with pytest.raises(ValueError, match="positive"):
        ev.by_length({"local": np.ones(2)}, [0, 3], None)


@pytest.mark.parametrize("clips", [1, 2, 3, 4, 5, 10])
def test_fewer_clips_lie_within_all_and_spread(clips):
    found = ev.fewer_clips(clips)
    assert list(found)[-1] == clips and found[clips].tolist() == list(range(clips))
    for count, at in found.items():
        assert len(set(at.tolist())) == count and set(at.tolist()) <= set(range(clips))
        if count > 1: assert at[0] == 0 and at[-1] == clips - 1
    assert abs(found[1][0] - (clips - 1)/2) <= .5


def test_one_source_in_a_bin_gives_a_number_without_interval():
    groups = ev.by_group({"local": np.ones(4)}, [0, 0, 1, 1], [1, -1], ["a", "a", "b", "c"])
    assert "top1_interval" not in groups["local"] and "top1_interval" in groups["global"]


def test_rank_correlation_with_ties():
    assert ev.rank_correlation([1, 2, 3, 4], [1, 4, 9, 16]) == pytest.approx(1)
    assert ev.rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert ev.rank_correlation([1, 1, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    for bad in ([1, 1, 1], [1, 2], [1, 2, np.nan]):
        with pytest.raises(ValueError):
            ev.rank_correlation(bad, [1, 2, 3])


# ---- the record's blocks

def streams(n=400, k=8):
    rng = np.random.default_rng(3)
    y = rng.integers(k, size=n)

    def logits(mine):
        z = rng.normal(size=(n, k))
        z[np.arange(n), y] += np.where(np.isin(y, mine), 4, 0.5)
        return torch.tensor(z, dtype=torch.float32)

    local, global_ = logits(range(4)), logits(range(4, 8))
    pl, pg = local.softmax(1), global_.softmax(1)
    w = ((pl + pg) / 2)[:, :4].sum(1, keepdim=True)
    fused = {"adaptive": w * pl + (1 - w) * pg, "scalar": 0.7 * pl + 0.3 * pg}
    return local, global_, torch.tensor(y), rng.integers(50, size=n), fused


def test_evaluate_gives_the_blocks_of_the_record():
    local, global_, y, source, fused = streams()
    codes = torch.tensor([1] * 4 + [-1] * 4)
    r = ev.evaluate(local, global_, y, source, fused, "scalar", group_codes=codes, lengths=[32] * 400, resamples=300)
    json.dumps(r, allow_nan=False)
    assert set(r["top1"]) == {"local", "global", "average", "best_baseline", "adaptive", "oracle"} == set(r["top1_interval"]) == set(r["top5"])
    assert r["best_baseline"] == "scalar" and set(r["baselines"]) == {"average", "scalar"}
    right = {n: ev.top_k_correct(p, y) for n, p in fused.items()}
    average = ev.top_k_correct((local.double().softmax(1) + global_.double().softmax(1)) / 2, y)
    assert r["top1"]["best_baseline"] == r["baselines"]["scalar"] == pytest.approx(right["scalar"].mean())
    assert r["top1"]["average"] == pytest.approx(average.mean())
    assert r["adaptive_minus_best_baseline"] == pytest.approx(list(ev.paired_difference(right["adaptive"], right["scalar"], source, 300)))
    assert r["adaptive_minus_average"] == pytest.approx(list(ev.paired_difference(right["adaptive"], average, source, 300)))
    for name, (low, high) in r["top1_interval"].items():
        assert low <= r["top1"][name] <= high <= 1
        assert r["top5"][name] >= r["top1"][name]
    assert r["top1"]["oracle"] == pytest.approx(1 - r["agreement"]["neither"])
    assert r["by_group"]["local"]["top1"]["local"] > 0.9 > r["by_group"]["local"]["top1"]["global"]
    assert r["by_length"]["32-32"]["top1"] == pytest.approx(r["top1"])


def test_evaluate_takes_every_fusion_as_a_baseline():
    s, test = simulate_streams(sources=3, seed=1), simulate_streams(sources=4, seed=2)
    pair, features = (lambda t: (t.local.softmax(1), t.global_.softmax(1))), lambda t: (t.local, t.global_)
    fusions, held_out = fit_all(*pair(s), s.labels, s.sources, torch.linspace(1, -1, 8), features(s), folds=2)
    fused = {n: f(*(features if n == "features" else pair)(test)) for n, f in fusions.items()}
    for best in [ev.choose_baseline({n: p for n, p in held_out.items() if n != "adaptive"}, s.labels), "features", "stacking", "class", "global"]:
        r = ev.evaluate(test.local, test.global_, test.labels, test.sources, fused, best, resamples=50)
        assert set(r["baselines"]) == set(fusions) - {"adaptive"}
        assert r["best_baseline"] == best and r["top1"]["best_baseline"] == pytest.approx(r["baselines"].get(best, r["top1"]["global"]))
        assert r["baselines"]["gate"] == pytest.approx(ev.top_k_correct(fused["gate"], test.labels).mean())


def test_evaluate_without_groups_and_with_few_classes():
    local, global_ = torch.randn(40, 3), torch.randn(40, 3)
    r = ev.evaluate(local, global_, torch.arange(40) % 3, None, {"adaptive": local.softmax(1)}, "local", resamples=200)
    assert r["by_group"] == {} == r["by_length"] and r["top5"]["local"] == 1
    assert r["adaptive_minus_best_baseline"] == [0, 0, 0]


@pytest.mark.parametrize("change, words", [
    (dict(best_baseline="adaptive"), "best_baseline"), (dict(best_baseline="stacking"), "best_baseline"), (dict(adaptive="gate"), "no 'gate'"),
])
def test_evaluate_refuses_names_that_are_not_there(change, words):
    local, global_, y, source, fused = streams(60)
    with pytest.raises(ValueError, match=words):
        ev.evaluate(local, global_, y, source, fused, **(dict(best_baseline="scalar") | change))


def test_evaluate_refuses_an_average_that_is_none_and_nan():
    local, global_, y, source, fused = streams(60)
    with pytest.raises(ValueError, match="not what the name says"):
        ev.evaluate(local, global_, y, source, fused | {"average": local.softmax(1)}, "scalar")
    with pytest.raises(ValueError, match="finite"):
        ev.evaluate(local * float("nan"), global_, y, source, fused, "scalar")
    with pytest.raises(ValueError, match="differ in shape"):
        ev.evaluate(local[:, :3], global_, y, source, fused, "scalar")


def test_protocol_in_words():
    view = {"frames": 16, "stride": 2, "size": 56}
    words = ev.describe_protocol({"clips": 1, "crops": 3, "local": view, "global": view | {"stride": 1}})
    assert words.startswith("1 clip x 3 crops") and "16 frames at a stride of 2, 56 px" in words and "in a row" in words
