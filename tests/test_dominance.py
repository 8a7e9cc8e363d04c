import csv, json, math

import pytest
import torch
import torch.nn.functional as F

from mbd.dominance import DominanceMap, class_share, cross_calibrate, fit_temperature, groups, measure, share, share_interval, simulate_streams, source_folds, source_names


def calibrated(sim):
    return sim.local / fit_temperature(sim.local, sim.labels), sim.global_ / fit_temperature(sim.global_, sim.labels)


@pytest.fixture(scope="module")
def sim():
    return simulate_streams()


@pytest.fixture(scope="module")
def dominance(sim):
    return measure(*calibrated(sim), sim.labels, sim.sources, sim.classes)


@pytest.mark.parametrize("scale", [0.5, 1.0, 4.0])
def test_temperature_finds_the_scale_of_logits_whose_labels_are_drawn_from_them(scale):
    draw = torch.Generator().manual_seed(0)
    z = 2 * torch.randn(20000, 6, generator=draw)
    y = torch.multinomial(z.softmax(1), 1, generator=draw).squeeze(1)
    assert fit_temperature(scale * z, y) == pytest.approx(scale, rel=0.03)


def test_temperature_is_the_minimum_of_the_nll_on_many_videos(sim):
    big = simulate_streams(videos=40, sources=10)
    T = fit_temperature(big.local, big.labels)
    at = lambda t: F.cross_entropy(big.local.double() / t, big.labels).item()
    assert at(T) < at(T * 1.1) and at(T) < at(T / 1.1)


@pytest.mark.parametrize("n", [1, 2, 12])
def test_temperature_stays_bounded_when_all_videos_are_right_or_all_wrong(n):
    y = torch.arange(n) % 4
    right = 3 * F.one_hot(y, 4).float()
    assert 0.05 < fit_temperature(right, y) < 5
    assert fit_temperature(right, (y + 1) % 4) == pytest.approx(20, rel=1e-3)
    assert fit_temperature(torch.zeros(n, 4), y) == 1.0


@pytest.mark.parametrize("mask", [-1000., -1e4, -65504., -1e9, torch.finfo(torch.float32).min, torch.finfo(torch.float64).min])
def test_temperature_does_not_hear_a_class_that_is_masked_in_all_videos(sim, mask):
    z, low = sim.local.double(), torch.full((len(sim.labels), 1), mask, dtype=torch.float64)
    for at, labels in ((0, sim.labels + 1), (3, sim.labels + (sim.labels >= 3)), (8, sim.labels)):
        assert fit_temperature(torch.cat([z[:, :at], low, z[:, at:]], 1), labels) == fit_temperature(z, sim.labels) < 3
    assert fit_temperature(torch.cat([z, low], 1), torch.where(torch.arange(len(z)) == 5, 8, sim.labels)) > 3      # a video has it as its label: then it is an error, not a mask


@pytest.mark.parametrize("logits, labels, message", [
    (torch.tensor([[0.0, 1.0], [float("nan"), 0.0]]), torch.tensor([0, 1]), "row 1"),
    (torch.zeros(2, 3), torch.tensor([0, 3]), "0..2"),
    (torch.zeros(2, 3), torch.tensor([-1, 0]), "0..2"),
    (torch.zeros(0, 3), torch.tensor([], dtype=torch.long), "no videos"),
    (torch.zeros(2, 3), torch.tensor([0.0, 1.0]), "integers"),
    (torch.zeros(2, 3), torch.tensor([0]), "shape"),
    (torch.zeros(3), torch.tensor([0]), "shape"),
])
def test_temperature_refuses_what_it_cannot_fit(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        fit_temperature(logits, labels)


def test_share_is_the_ratio_of_probabilities_and_survives_tiny_ones():
    p, q = torch.tensor([0.9, 0.5, 0.01]), torch.tensor([0.3, 0.5, 0.99])
    assert torch.allclose(share(p.log(), q.log()), p / (p + q))
    assert share(torch.tensor([-500.0]), torch.tensor([-501.0])).item() == pytest.approx(1 / (1 + math.exp(-1)))
    assert torch.allclose(share(p.log(), q.log()) + share(q.log(), p.log()), torch.ones(3))


def test_share_refuses_probabilities_infinities_and_other_shapes():
    with pytest.raises(ValueError, match="at most 0"): share(torch.tensor([0.5]), torch.tensor([-0.5]))
    with pytest.raises(ValueError, match="log_p_global"): share(torch.tensor([-0.5]), torch.tensor([-math.inf]))
    with pytest.raises(ValueError, match="shapes"): share(torch.zeros(2), torch.zeros(3))


def test_class_share_is_the_weighted_mean_and_shrinks_to_the_reference():
    s, m, y = torch.tensor([0.9, 0.5, 0.2]), torch.tensor([1.0, 3.0, 2.0]), torch.tensor([0, 0, 1])
    free, mass, reference = class_share(s, m, y, 3, prior=0)
    assert torch.allclose(free, torch.tensor([0.6, 0.2, reference])) and mass.tolist() == [4, 2, 0]
    assert reference == pytest.approx((0.9 + 1.5 + 0.4) / 6)
    shrunk, _, _ = class_share(s, m, y, 3, prior=4)
    assert shrunk[0].item() == pytest.approx((2.4 + 4 * reference) / 8) and shrunk[2].item() == pytest.approx(reference)


def test_map_finds_the_classes_as_they_were_built(dominance):
    assert dominance.group == ["local"] * 4 + ["global"] * 4
    assert dominance.group_codes.tolist() == [1] * 4 + [-1] * 4
    assert ((dominance.low < dominance.share) & (dominance.share < dominance.high)).all()
    assert dominance.n.tolist() == [40] * 8 and dominance.num_sources.tolist() == [5] * 8
    assert 0.4 < dominance.reference < 0.6


def test_swapping_the_streams_mirrors_the_map(sim, dominance):
    l, g = calibrated(sim)
    mirrored = measure(g, l, sim.labels, sim.sources, sim.classes)
    assert torch.allclose(mirrored.share, 1 - dominance.share) and mirrored.reference == pytest.approx(1 - dominance.reference)
    assert mirrored.group == ["global"] * 4 + ["local"] * 4


def test_equal_streams_have_no_dominant_class(sim):
    same = measure(sim.local, sim.local, sim.labels, sim.sources, sim.classes)
    assert same.group == ["balanced"] * 8 and torch.allclose(same.share, torch.full((8,), 0.5, dtype=torch.float64))


def test_a_stronger_stream_does_not_own_every_class():
    sim = simulate_streams(seed=1)
    sim.local += 8 * F.one_hot(sim.labels, 8)
    m = measure(*calibrated(sim), sim.labels, sim.sources, sim.classes)
    assert m.reference > 0.55 and m.group.count("local") == 4 and m.group.count("global") >= 2


def test_measuring_on_training_videos_loses_the_local_classes(sim):
    l, g = fit_temperature(sim.local, sim.labels), fit_temperature(sim.global_, sim.labels)
    seen = simulate_streams(memory=(1.0, 3.0))
    absolute = measure(seen.local / l, seen.global_ / g, seen.labels, seen.sources, seen.classes).share
    assert (absolute < 0.55).all()


def test_videos_both_streams_fail_hardly_count():
    z_right, z_lost = torch.tensor([[0.0, 3.0]]), torch.tensor([[12.0, 0.0]])      # p(class 1): 0.95, and about 6e-6
    y = torch.tensor([1] * 6 + [0] * 6)
    local = torch.cat([z_right.repeat(5, 1), z_lost, torch.zeros(6, 2)])
    global_ = torch.cat([z_right.repeat(5, 1), z_lost + torch.tensor([[3.0, 0.0]]), torch.zeros(6, 2)])
    m = measure(local, global_, y, [str(i) for i in range(12)], ["a", "b"])
    assert m.share[1].item() == pytest.approx(0.5, abs=1e-4)


def test_class_without_videos_and_class_of_one_source(sim):
    l, g = calibrated(sim)
    keep = [i for i in range(320) if not 280 <= i and not 128 <= i < 160]          # none of class 7, one source (8 videos) of class 3
    m = measure(l[keep], g[keep], sim.labels[keep], [sim.sources[i] for i in keep], sim.classes)
    assert m.n[7] == 0 and m.share[7] == m.reference and (m.low[7], m.high[7]) == (0, 1) and m.group[7] == "balanced"
    assert m.num_sources[3] == 1 and m.high[3] - m.low[3] > 1.2 * (m.high[:3] - m.low[:3]).max()
    assert m.group[:3] == ["local"] * 3


def test_no_class_with_two_sources_means_nothing_is_known(sim):
    l, g = calibrated(sim)
    m = measure(l, g, sim.labels, [sim.classes[y] for y in sim.labels], sim.classes)
    assert m.group == ["balanced"] * 8 and (m.low == 0).all() and (m.high == 1).all()


def test_more_videos_of_the_same_source_are_not_more_evidence(sim):
    l, g = calibrated(sim)
    width = lambda sources: (lambda m: (m.high - m.low).mean().item())(measure(l, g, sim.labels, sources, sim.classes))
    assert width(sim.sources) > 1.3 * width([str(i) for i in range(320)])


def test_intervals_keep_their_promise_with_three_sources():
    draw, wrong, y = torch.Generator().manual_seed(3), 0, torch.arange(8).repeat_interleave(12)
    for t in range(50):
        s = (0.5 * torch.randn(24, generator=draw).repeat_interleave(4) + 0.5 * torch.randn(96, generator=draw)).sigmoid()
        low, high, count = share_interval(s, torch.ones(96), y, [f"{i // 4}" for i in range(96)], 8, resamples=200, seed=t)
        reference = class_share(s, torch.ones(96), y, 8)[2]
        wrong += ((low > reference) | (high < reference)).sum().item()
    assert count.tolist() == [3] * 8 and 0.005 < wrong / 400 < 0.09


def test_intervals_of_many_sources_come_from_the_class_itself():
    y, names = torch.arange(2).repeat_interleave(40), [str(i) for i in range(80)]
    s = torch.cat([torch.full((40,), 0.5), torch.linspace(0.1, 0.9, 40)])
    low, high, _ = share_interval(s, torch.ones(80), y, names, 2)
    assert high[0] - low[0] < 1e-6 and 0.1 < high[1] - low[1] < 0.2


def test_prior_narrows_the_end_near_the_reference_by_its_root_so_that_weak_evidence_is_held_back():
    y, names = torch.arange(2).repeat_interleave(20), [str(i) for i in range(40)]
    s, one, near = torch.linspace(0.2, 0.8, 40), torch.ones(40), {}
    for prior in (1e-9, 20.0):
        (centre, _, _), (low, high, _) = class_share(s, one, y, 2, prior), share_interval(s, one, y, names, 2, prior)
        near[prior] = torch.stack([high[0] - centre[0], centre[1] - low[1]])                # of the class below and the class above the reference
    assert torch.allclose(near[20.0] / near[1e-9], torch.full((2,), 0.5 ** 0.5), rtol=1e-4)


def test_same_seed_same_map_and_shuffling_the_videos_changes_no_share(sim, dominance):
    l, g = calibrated(sim)
    assert measure(l, g, sim.labels, sim.sources, sim.classes).to_dict() == dominance.to_dict()
    order = torch.randperm(320, generator=torch.Generator().manual_seed(0))
    shuffled = measure(l[order], g[order], sim.labels[order], [sim.sources[i] for i in order], sim.classes)
    assert torch.allclose(shuffled.share, dominance.share) and torch.allclose(shuffled.low, dominance.low, atol=1e-9)


@pytest.mark.parametrize("spread", [0.0, 1.5])
def test_intervals_hold_planted_shares_where_sources_are_few_and_of_unequal_size(spread):
    draw, held = torch.Generator().manual_seed(5), []
    number = lambda low, high: int(torch.randint(low, high, (1,), generator=draw))
    for t in range(40):
        centre, s, y, names = spread * torch.randn(8, generator=draw), [], [], []
        true = (centre[:, None] + 0.89 ** 0.5 * torch.randn(8, 5000, generator=draw)).sigmoid().mean(1)
        for c in range(8):
            for g in range(number(3, 9)):
                n = number(1, 9)
                s.append((centre[c] + 0.5 * torch.randn(1, generator=draw) + 0.8 * torch.randn(n, generator=draw)).sigmoid()); y += [c] * n; names += [f"{c} {g}"] * n
        low, high, _ = share_interval(torch.cat(s), torch.ones(len(y)), torch.tensor(y), names, 8, resamples=200, seed=t)
        held.append((low <= true) & (true <= high))
    assert 0.9 < torch.stack(held).double().mean() < 0.99


def test_shares_and_sources_of_different_number_are_told():
    with pytest.raises(ValueError, match="8 shares, 8 weights, 8 labels and 4 sources: give one of each for a video"): share_interval(torch.rand(8), torch.ones(8), torch.arange(8) // 4, list("aabb"), 2)


def test_the_far_end_of_an_interval_goes_where_the_class_s_own_videos_say_and_the_near_end_does_not():
    y, names = torch.arange(2).repeat_interleave(20), [str(i) for i in range(40)]
    s = torch.cat([torch.linspace(0.85, 0.95, 20), torch.linspace(0.05, 0.15, 20)])
    centre, _, reference = class_share(s, torch.ones(40), y, 2)
    low, high, _ = share_interval(s, torch.ones(40), y, names, 2)
    assert centre[0] < 0.84 and high[0] > 0.9 > 0.84 > low[0] > reference            # shrunk to 0.83, measured 0.9
    assert (high[0] - centre[0]).item() == pytest.approx((centre[0] - low[0]).item() + 0.9 - centre[0].item(), abs=5e-3)
    assert torch.allclose(low[1], 1 - high[0], atol=5e-3) and torch.allclose(high[1], 1 - low[0], atol=5e-3)


def test_a_source_that_carries_most_of_a_class_does_not_make_it_look_sure():
    "Nine videos of one source, one of another: their mean lies near the first because it is the first, not because the first is typical."
    y, names = torch.tensor([0] * 10 + [1] * 10), ["a"] * 9 + [str(i) for i in range(11)]
    low, high, _ = share_interval(torch.tensor([0.7] * 9 + [0.3] + [0.5] * 10), torch.ones(20), y, names, 2, prior=1e-9, min_sources=2)
    assert high[0] > 0.66 + 0.2 and low[0] < 0.66 - 0.2


# ---- folds and cross-fitting

def test_folds_cut_no_source_and_give_each_its_portion_of_each_class(sim):
    fold = source_folds(sim.labels, sim.sources, 5)
    assert fold.dtype == torch.int64 and sorted(fold.unique().tolist()) == list(range(5))
    assert all(len({f for f, s in zip(fold.tolist(), sim.sources) if s == name}) == 1 for name in set(sim.sources))
    assert (torch.stack([torch.bincount(sim.labels[fold == f], minlength=8) for f in range(5)]) == 8).all()
    assert torch.equal(fold, source_folds(sim.labels, sim.sources, 5)) and not torch.equal(fold, source_folds(sim.labels, sim.sources, 5, seed=1))


def test_folds_are_refused_where_there_are_none(sim):
    with pytest.raises(ValueError, match="40 sources cannot be dealt into 41"): source_folds(sim.labels, sim.sources, 41)
    for folds in (1, 2.0, True):
        with pytest.raises(ValueError, match="folds must be"): source_folds(sim.labels, sim.sources, folds)
    with pytest.raises(ValueError, match="319 sources"): source_folds(sim.labels, sim.sources[1:])


def test_a_fold_is_calibrated_by_the_others_and_never_by_itself(sim):
    fold = source_folds(sim.labels, sim.sources, 4)
    z, mine = cross_calibrate(sim.local, sim.labels, fold), fold == 2
    T = fit_temperature(sim.local[~mine], sim.labels[~mine])
    assert torch.allclose(z[mine], sim.local[mine].double() / T) and z.dtype == torch.float64
    other = torch.where(mine, (sim.labels + 1) % 8, sim.labels)                      # wrong labels in the fold ...
    changed = cross_calibrate(sim.local, other, fold)
    assert torch.equal(changed[mine], z[mine]) and not torch.allclose(changed[~mine], z[~mine])   # ... change the other folds only
    assert torch.equal(sim.local, simulate_streams().local)                          # the input is left alone


def test_cross_fitting_needs_two_folds_of_the_same_videos(sim):
    with pytest.raises(ValueError, match="one fold"): cross_calibrate(sim.local, sim.labels, torch.zeros(320))
    with pytest.raises(ValueError, match="fold must have shape"): cross_calibrate(sim.local, sim.labels, torch.arange(319))


def test_groups_need_the_interval_to_exclude_the_reference():
    assert groups(torch.tensor([0.41, 0.39, 0.1]), torch.tensor([0.9, 0.9, 0.39]), 0.4) == ["local", "balanced", "global"]


def test_csv_and_json_bring_the_same_map_back(dominance, tmp_path):
    dominance.classes[0] = 'skip, "rope"'                                           # commas and quotes survive
    dominance.to_csv(tmp_path / "dominance.csv")
    for back in (DominanceMap.from_csv(tmp_path / "dominance.csv"), DominanceMap.from_dict(json.loads(json.dumps(dominance.to_dict())))):
        assert back.to_dict() == dominance.to_dict() and torch.equal(back.logit_share, dominance.logit_share)
    rows = list(csv.DictReader(open(tmp_path / "dominance.csv", newline="")))
    assert list(rows[0])[:6] == ["class", "n", "share", "low", "high", "group"] and len(rows) == 8


def test_csv_that_is_no_map_is_named(tmp_path):
    (tmp_path / "other.csv").write_text("class,n\nrope,3\n")
    with pytest.raises(ValueError, match="other.csv.*share"): DominanceMap.from_csv(tmp_path / "other.csv")


def test_expected_logit_share_reads_the_map_by_prediction(dominance):
    assert torch.allclose(dominance.expected_logit_share(torch.eye(8)).sigmoid(), dominance.share.float())
    even = dominance.expected_logit_share(torch.full((1, 8), 1 / 8))
    assert even.item() == pytest.approx(dominance.logit_share.mean().item(), abs=1e-6)
    with pytest.raises(ValueError, match=r"\(N, 8\)"): dominance.expected_logit_share(torch.ones(2, 7))


@pytest.mark.parametrize("change, message", [
    (dict(sources=["a"]), "1 sources"), (dict(classes=["a"]), "1 class names"), (dict(classes=["a"] * 8), "repeat"),
    (dict(global_logits=torch.zeros(320, 7)), "differ|lie in"), (dict(prior=0.0), "prior"), (dict(confidence=1.0), "confidence"),
])
def test_measure_names_what_is_wrong(sim, change, message):
    good = dict(local_logits=sim.local, global_logits=sim.global_, labels=sim.labels, sources=sim.sources, classes=sim.classes)
    with pytest.raises(ValueError, match=message): measure(**(good | change))


def test_map_refuses_columns_that_do_not_fit():
    with pytest.raises(ValueError, match="low has 1"): DominanceMap(["a", "b"], [1, 1], [1, 1], [0.5, 0.5], [0.4], [0.6, 0.6], ["local", "global"], 0.5)
    with pytest.raises(ValueError, match="unknown group 'lokal'"): DominanceMap(["a"], [1], [1], [0.5], [0.4], [0.6], ["lokal"], 0.5)


def test_a_cut_table_and_wrong_bounds_are_named(tmp_path):
    whole = tmp_path/"dominance.csv"
    DominanceMap(["a", "b"], [8]*2, [4]*2, [.8, .2], [.7, .1], [.9, .3], ["local", "global"], .5).to_csv(whole)
    (tmp_path/"cut.csv").write_bytes(whole.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"cut.csv: a line of the map is cut off"): DominanceMap.from_csv(tmp_path/"cut.csv")
    for bounds in ((20, .05), (0, 20)):
        with pytest.raises(ValueError, match="bounds must be two temperatures"): fit_temperature(torch.randn(10, 3), torch.arange(10) % 3, bounds)


def test_a_map_cut_at_the_end_of_a_line_is_noticed_and_files_without_a_count_are_read(dominance, tmp_path):
    file = tmp_path/"dominance.csv"; dominance.to_csv(file); whole = file.read_bytes()
    for end in range(len(whole.splitlines(True)[0]) + 1, len(whole) - 2):              # the last is the end of a line, which may be lacking
        file.write_bytes(whole[:end])
        with pytest.raises(ValueError, match="dominance.csv: .*; take a whole copy"): DominanceMap.from_csv(file)
    file.write_bytes(b"".join(whole.splitlines(True)[:-3]))
    with pytest.raises(ValueError, match="dominance.csv: 5 of 8 classes are there; take a whole copy"): DominanceMap.from_csv(file)
    rows = [{k: v for k, v in row.items() if k != "classes"} for row in csv.DictReader(whole.decode().splitlines())]
    with open(file, "w", newline="", encoding="utf-8") as out: write = csv.DictWriter(out, rows[0]); write.writeheader(); write.writerows(rows)
    assert DominanceMap.from_csv(file).to_dict() == dominance.to_dict()


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_videos_without_a_source_are_not_taken_for_one_scene(sim, missing):
    "Lumped together, they would leave every class balanced, and nobody would teach."
    sources = list(sim.sources); sources[3] = missing
    for call in (lambda: measure(*calibrated(sim), sim.labels, sources, sim.classes), lambda: source_folds(sim.labels, sources), lambda: source_names([1, missing])):
        with pytest.raises(ValueError, match=rf"video \d of \d+ has no source \({missing}\): .* its own"): call()
    for call in (lambda: measure(*calibrated(sim), sim.labels, None, sim.classes), lambda: source_folds(sim.labels, None)):
        with pytest.raises(ValueError, match="sources are None: .* give each video its own"): call()
    assert source_names([1, "b"]) == ["1", "b"]


@pytest.mark.parametrize("change, words", [
    (dict(low=float("nan")), "shares must lie in 0..1, and in their intervals; class 'TwirlForward' has .* in .nan"), (dict(low=.999), "class 'TwirlForward'"),
    (dict(reference=float("nan")), "reference must lie in 0..1, not nan"), (dict(reference=7.), "reference must lie in 0..1, not 7"), (dict(n=-3), "counts, of 0 and more"), (dict(classes="SameHand"), "'SameHand' is there twice")])
def test_a_map_that_cannot_be_is_refused(dominance, change, words):
    values = {**dominance.to_dict(), "classes": ["TwirlForward", "SameHand", *dominance.classes[2:]]}
    for name, value in change.items(): values[name] = value if name == "reference" else [value, *values[name][1:]]
    with pytest.raises(ValueError, match=words): DominanceMap.from_dict(values)


def test_what_is_no_map_is_said_to_be_none(dominance, tmp_path):
    with pytest.raises(ValueError, match="not a dominance map: .*'colour'"): DominanceMap.from_dict(dominance.to_dict() | {"colour": 1})
    (tmp_path/"a.csv").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ValueError, match="a.csv: not a dominance map, and no text"): DominanceMap.from_csv(tmp_path/"a.csv")
    dominance.to_csv(tmp_path/"b.csv"); lines = (tmp_path/"b.csv").read_text().splitlines(keepends=True)
    (tmp_path/"b.csv").write_text("".join(lines).replace(f",{dominance.reference},", ",0.25,", 1))
    with pytest.raises(ValueError, match="b.csv: reference holds for the whole map, and 2 values"): DominanceMap.from_csv(tmp_path/"b.csv")
