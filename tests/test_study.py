"Studies: tables that survive, contrasts over seeds, verdicts, and the arms of the distillation studies."
from dataclasses import replace
from pathlib import Path
import numpy as np
import pytest
import torch
from mbd import clips, study
from mbd.distillation import Distillation
from mbd.dominance import DominanceMap
from mbd.study import Arm, Claim, Setting, Table, World, cka, claims_table, contrast, grid, read_claims, regroup, run_cells, score_arm, seeds_needed, train_arm, verdicts


def work(seed, arm): return dict(top1=.5 + .01*seed + .02*(arm == "b"))


def test_a_grid_goes_on_where_it_was_killed(tmp_path):
    calls = []
    def dies(seed, arm):
        calls.append((arm, seed))
        if len(calls) == 4: raise KeyboardInterrupt
        return work(seed, arm)
    with pytest.raises(KeyboardInterrupt): run_cells(Table(tmp_path), grid(range(4), arm="ab"), dies)
    assert len(Table(tmp_path).rows()) == 3
    assert run_cells(Table(tmp_path), grid(range(4), arm="ab"), work) == 5 and run_cells(Table(tmp_path), grid(range(4), arm="ab"), work) == 0
    rows = Table(tmp_path).rows()
    assert sorted((r["arm"], r["seed"]) for r in rows) == [(a, s) for a in "ab" for s in range(4)] and all({"cell_seconds", "commit"} <= r.keys() for r in rows)


def test_half_a_line_is_no_cell_and_is_cut_off(tmp_path):
    table = Table(tmp_path); table.add(seed=1, arm="a", top1=.25)
    with open(table.file, "ab") as out: out.write(b"1,b,0.9")
    assert [r["arm"] for r in table.rows()] == ["a"]
    table.add(seed=1, arm="b", top1=.5)
    assert [(r["arm"], r["top1"]) for r in table.rows()] == [("a", .25), ("b", .5)] and table.file.read_bytes().endswith(b"1,b,0.5\n")


def test_a_file_killed_in_its_first_line_begins_anew(tmp_path):
    table = Table(tmp_path); table.file.write_bytes(b"arm,se")
    assert table.rows() == []
    table.add(arm="a", seed=1, top1=.5)
    assert table.rows() == [dict(arm="a", seed=1, top1=.5)]


def test_shards_take_whole_seeds_and_each_cell_is_done_once(tmp_path):
    for k in range(3): run_cells(Table(tmp_path, shard=(k, 3)), grid(range(7), arm="ab"), work)
    rows = Table(tmp_path).rows()
    assert len(rows) == 14 and len({(r["arm"], r["seed"]) for r in rows}) == 14 and len(list(tmp_path.glob("cells-*of3.csv"))) == 3
    assert run_cells(Table(tmp_path), grid(range(7), arm="ab"), work) == 0            # one process alone finds them all
    for shard in ((2, 2), (-1, 1), (0, 0), (1,)):
        with pytest.raises(ValueError, match="0 <= i < n"): Table(tmp_path, shard=shard)    # it would own no seed, and end at once as if all were done


def test_other_columns_and_lines_of_another_length_are_refused_by_name(tmp_path):
    table = Table(tmp_path); table.add(arm="a", seed=1, top1=.5)
    with pytest.raises(ValueError, match="cells.csv.*top1.*loss"): table.add(arm="a", seed=2, loss=.5)
    with pytest.raises(ValueError, match="commas"): table.add(arm="a,b", seed=2, top1=.5)
    with open(table.file, "a") as out: out.write("a,2\n")
    with pytest.raises(ValueError, match="line 3: 2 values for 3 columns"): table.rows()


def rows(n=12, gain=.02, noise=.01):
    rng = np.random.default_rng(0)
    return [dict(arm=arm, seed=s, labelled=20, top1=.6 + .1*np.sin(s) + (gain if arm == "b" else 0) + rng.normal(0, noise)) for s in range(n) for arm in ("a", "b", "c")]


def test_pairing_takes_the_seeds_share_away():
    c = contrast(rows(), "top1", "b", ["a"])
    assert c.n == 12 and c.low < .02 < c.high and c.sd < .03 and c.p < .01 and c.against == "a"
    assert np.std([r["top1"] for r in rows() if r["arm"] == "a"]) > .05


def test_student_by_hand():
    r = [dict(arm=a, seed=s, m=v) for s, (x, y) in enumerate([(1., 0.), (3., 0.), (2., 0.)]) for a, v in (("x", x), ("y", y))]
    c = contrast(r, "m", "x", ["y"])
    assert (c.estimate, c.sd) == (2., 1.) and c.high == pytest.approx(2 + 4.302653/3**.5, abs=1e-4) and contrast(r, "m", "x", 2.).estimate == pytest.approx(0)


def test_better_than_the_best_means_better_than_each():
    r = rows() + [dict(arm="d", seed=s, labelled=20, top1=.9) for s in range(12)]
    c = contrast(r, "top1", "b", ["a", "d"])
    assert c.against == "d" and c.estimate < 0
    c = contrast(rows(), "top1", "b", ["a", "c"])
    assert c.p == max(contrast(rows(), "top1", "b", [n]).p for n in "ac")


def test_seeds_count_only_where_all_arms_have_them():
    r = [x for x in rows() if not (x["arm"] == "a" and x["seed"] > 4)]
    assert contrast(r, "top1", "b", ["a"]).n == 5 and contrast(r, "top1", "b", ["nobody"]) is None
    assert contrast(r, "top1", "b", ["a"], where={"labelled": 10}) is None
    with pytest.raises(ValueError, match="no column 'accuracy'"): contrast(r, "accuracy", "b", ["a"])


def test_power_by_simulation():
    n = seeds_needed(.01, .012, least=2)
    from scipy import stats
    d = np.random.default_rng(0).normal(.01, .012, (4000, n))
    assert .77 < (stats.ttest_1samp(d, 0., axis=1).pvalue < .05).mean() < .83
    with pytest.raises(ValueError, match="effect"): seeds_needed(0, .01)


CLAIM = Claim("x", "P4", "b is better", "s", "top1", "b", ["a"], "an interval below 0", 12)


def filled(folder, some):
    table = Table(folder / "s")
    for r in some: table.add(**r)
    return folder


@pytest.mark.parametrize("change, word", [({}, "holds"), (dict(seeds=13), "untested"), (dict(effect=.05), "does not hold"), (dict(arm="a", controls=["b"]), "does not hold"), (dict(where={"labelled": 10}), "untested"), (dict(study="none"), "untested")])
def test_verdicts(tmp_path, change, word):
    assert verdicts([replace(CLAIM, **change)], filled(tmp_path, rows()))[0][3] == word


def test_verdicts_are_corrected_for_their_number(tmp_path):
    filled(tmp_path, rows(n=8, gain=.012, noise=.012))
    alone = verdicts([CLAIM := replace(globals()["CLAIM"], seeds=8)], tmp_path)[0]
    many = verdicts([CLAIM] + [replace(CLAIM, id=str(k), arm="c") for k in range(6)], tmp_path)[0]
    assert many[2] == pytest.approx(min(1, 7*alone[2])) or many[2] > alone[2]
    assert "| 8 of 8 |" in claims_table([CLAIM], tmp_path)


def test_claims_are_read_and_faults_named(tmp_path):
    file = tmp_path / "claims.toml"
    entry = '[[claim]]\nid = "{}"\npaper = "P4"\nsays = "so"\nstudy = "s"\nmetric = "top1"\narm = "b"\ncontrols = ["a"]\nrefuted = "no"\nseeds = 8\n'
    file.write_text(entry.format("one") + entry.format("two")); assert [c.id for c in read_claims(file)] == ["one", "two"]
    file.write_text(entry.format("one") * 2)
    with pytest.raises(ValueError, match="claims.toml.*two claims have the id 'one'"): read_claims(file)
    file.write_text(entry.format("one") + "wish = 1\n")
    with pytest.raises(ValueError, match="claims.toml, claim 'one'.*wish"): read_claims(file)


def test_cka_knows_what_is_the_same():
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    q = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))[0]
    assert cka(x, 5*x @ q + 3) == pytest.approx(1) and cka(x, torch.randn(200, 6, generator=torch.Generator().manual_seed(2))) < .2
    with pytest.raises(ValueError, match="the same for every video"): cka(x, torch.ones(200, 2))
    with pytest.raises(ValueError, match="must be"): cka(x, x[:5])


def a_map(): return DominanceMap(list("abcd"), [8]*4, [4]*4, [.8, .55, .45, .2], [.1]*4, [.9]*4, ["balanced"]*4, .5)


def test_groups_by_point_and_dealt_out_anew():
    assert regroup(a_map(), "map").group == ["balanced"]*4 and regroup(a_map(), "point").group == ["local", "local", "global", "global"]
    dealt = [tuple(regroup(a_map(), "scrambled", s).group) for s in range(20)]
    assert tuple(regroup(a_map(), "point").group) not in dealt      # the measured map is no control of itself
    assert all(sorted(g) == sorted(["local", "local", "global", "global"]) for g in dealt) and len(set(dealt)) > 3
    with pytest.raises(ValueError, match="map, point or scrambled"): regroup(a_map(), "guess")


TINY = Setting(classes=("PushUpsSlow", "PushUpsFast", "SameHand", "OtherHand"), sources=8, test_sources=4, labelled=6, warm_up=4, steps=4, batch_size=8, local=clips.View(8, 2, 16), global_=clips.View(4, 6, 16))


@pytest.fixture(scope="module")
def world(tmp_path_factory): return World(TINY, 3, tmp_path_factory.mktemp("worlds"))


def test_labels_are_within_the_budget_and_no_source_is_on_two_sides(world):
    parts = world.parts
    assert len(parts["fit"]) + len(parts["held"]) == 6*4 and {r.label for r in parts["unlabelled"]} == {-1}
    source = lambda part: {r.source for r in parts[part]}
    assert not source("held") & (source("fit") | source("unlabelled"))      # a stream taught on a held-out scene would look better there than it is
    assert not {r.id for r in parts["test"]} & {r.id for p in ("fit", "held", "unlabelled") for r in parts[p]}
    assert len({r.id for p in parts.values() for r in p}) == sum(map(len, parts.values())) == 8*4*2 - len(parts["held"]) + 4*4*2


def test_warm_up_is_trained_once(world, monkeypatch):
    first = world.warm()
    monkeypatch.setattr(study.training.Trainer, "step", lambda *a, **k: pytest.fail("trained again"))
    again = World(TINY, 3, world.folder).warm()
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values())) and again.map.group == first.map.group


def test_arms_differ_and_the_same_arm_gives_the_same_row(world):
    directed = Arm(Distillation(intermediate_weight=0., only_right_teacher=False), groups="point")
    a, b, none = (score_arm(world, train_arm(world, arm)) for arm in (directed, directed, Arm()))
    assert a == b and a != none and a.keys() == none.keys()
    assert all(0 <= a[k] <= 1 for k in ("local", "global", "adaptive", "oracle", "best_baseline", "disagreement", "cka")) and a["oracle"] >= max(a["local"], a["global"])


def test_too_many_labels_are_refused(world):
    with pytest.raises(ValueError, match="labelled = 9.*8 sources"): World(replace(TINY, labelled=9), 3, world.folder)


def test_readme_shows_the_claims_as_the_committed_cells_decide_them():
    root = Path(__file__).parents[1]
    text = (root / "README.md").read_text(encoding="utf-8")
    shown = text.partition("<!-- claims -->\n")[2].partition("\n<!-- end of claims -->")[0]
    assert shown == claims_table(read_claims(root / "reports/claims.toml"), root / "reports", "reports/")


def test_claims_that_are_committed_name_studies_settings_and_arms_that_exist():
    root = Path(__file__).parents[1]
    for claim in read_claims(root / "reports/claims.toml"):
        if claim.study == "study_fusion":
            assert claim.where["setting"] in study.DAMAGE
            continue
        known = study.STUDIES[claim.study]
        controls = claim.controls if isinstance(claim.controls, list) else []
        names = known.arms if claim.by == "arm" else known.settings
        assert {claim.arm, *controls} <= set(names) and set(claim.where) <= {"setting", "arm"}
        assert claim.where.get("setting", next(iter(known.settings))) in known.settings and claim.where.get("arm", next(iter(known.arms))) in known.arms
