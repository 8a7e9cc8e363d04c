"Studies: tables that survive, contrasts over seeds, and verdicts."
from dataclasses import replace
from pathlib import Path
import json
import numpy as np
import pytest
from mbd.study import Claim, Table, claims_table, contrast, grid, read_claims, run_cells, seeds_needed, verdicts


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


def test_seeds_that_are_all_alike_are_no_proof_beyond_their_number():
    r = [dict(arm="x", seed=s, m=.956183) for s in range(8)]
    c = contrast(r, "m", "x", .5)
    assert c.p == 1/128 and c.low == c.estimate == c.high and contrast(r, "m", "x", .956183).p == 1      # Student's statistic would be infinite


@pytest.mark.parametrize("change, words", [(dict(controls="none"), "controls is 'none'; it must be a list"), (dict(where={"settin": "x"}), "has no column 'settin'"), (dict(by="arms"), "has no column 'arms'")])
def test_a_claim_that_could_never_be_tested_is_refused(tmp_path, change, words):
    (tmp_path/"s").mkdir(); (tmp_path/"s/cells.csv").write_text("seed,setting,arm,m\n1,x,a,0.1\n")
    claim = Claim(**dict(id="c", paper="P2", says="", study="s", metric="m", arm="a", controls=["b"], refuted="", seeds=8) | change)
    with pytest.raises(ValueError, match=f"claim 'c': .*{words}"): verdicts([claim], tmp_path)


@pytest.mark.parametrize("change", [dict(arm="bb"), dict(controls=["a", "bb"])])
def test_a_misspelt_arm_is_refused_and_one_to_come_is_untested(tmp_path, change):
    claim, known = replace(CLAIM, **change), {"s": {"arm": ("a", "b", "bb", "c"), "setting": ("x",)}}
    assert verdicts([claim], tmp_path)[0][3] == "untested"                # nothing is known of the study yet
    filled(tmp_path, rows())
    for given in (None, known): assert "**untested**" in claims_table([claim], tmp_path, known=given)
    with pytest.raises(ValueError, match="claim 'x': s has no arm 'bbb'; .*valid: a, b, bb, c$"): verdicts([replace(CLAIM, arm="bbb")], tmp_path, known)


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


@pytest.mark.parametrize("asked, words", [(dict(by="arms"), "no column 'arms'; columns are arm, seed"), (dict(where={"labeled": 20}), "no column 'labeled'"), (dict(controls="a"), "controls is 'a'; it must be a list of names"),
                                          (dict(controls=[]), r"controls is \[\]; it must be"), (dict(controls=None), "controls is None"), (dict(metric="arm"), "arm of 'b' is b for seed 0")])
def test_a_contrast_that_compares_nothing_is_refused(asked, words):
    with pytest.raises(ValueError, match=words): contrast(**dict(rows=rows(), metric="top1", arm="b", controls=["a"]) | asked)
    assert contrast(rows(), "top1", "b", np.float32(.5)).n == 12


@pytest.mark.parametrize("asked", [dict(power=80), dict(alpha=5), dict(power=1.)])
def test_percentages_are_no_probabilities(asked):
    with pytest.raises(ValueError, match="probabilities"): seeds_needed(.01, .02, **asked)


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
    for text, words in ((entry.format("one").replace("= 8", "= '8'"), "claim 'one': seeds is '8'; it must be a whole number, without quotes"), (entry.format("one").replace("[[claim]]", "[claim]"), r"has claim; write \[\[claim\]\], in two brackets"),
                        (entry.format("one").replace("claim", "clam"), r"has clam; write \[\[claim\]\]"), ("[[claim]]\nid = \n", "is no TOML: .*line 2"), ("id = 'é'", "is no TOML: .*0xe9")):
        file.write_bytes(text.encode("latin1"))
        with pytest.raises(ValueError, match=f"claims.toml.*{words}"): read_claims(file)


def test_cells_with_numbers_for_names_are_found_again(tmp_path):
    table, cells = Table(tmp_path, ("seed", "weight")), grid((1, 2), weight=(.1, 1., 1/3, 10.))
    assert [run_cells(table, cells, lambda seed, weight: dict(top1=.5)) for _ in range(3)] == [8, 0, 0] and len(table.rows()) == 8
    table = Table(tmp_path / "b", ("seed", "arm", "sure"))
    for seed in (1, 2, 3): [table.add(seed=seed, arm=arm, sure=True, top1=.5 + .1*(arm == "b")*seed) for arm in "ab"]
    assert contrast(table.rows(), "top1", "b", ["a"], where={"sure": True}).n == 3
    table, cells = Table(tmp_path / "c", ("seed", "weight")), grid((1, 2), weight=("0.10", "1_0", "007", "10"))      # texts that Python reads as numbers
    assert [run_cells(table, cells, lambda seed, weight: dict(top1=.5)) for _ in range(2)] == [8, 0]
    assert contrast(table.rows(), "top1", "0.10", ["1_0", "007"], by="weight").n == 2


def test_a_contrast_refuses_rows_that_would_be_overwritten_and_values_that_are_none():
    r = [dict(seed=s, arm=a, labelled=n, m=.1*s + .01*n*(a == "x")) for s in (1, 2, 3) for a in "xy" for n in (5, 10)]
    with pytest.raises(ValueError, match="'x' has several rows of seed 1"): contrast(r, "m", "x", ["y"])
    assert contrast(r, "m", "x", ["y"], where={"labelled": 10}).estimate == pytest.approx(.1)
    r = [q | {"m": float("nan")} if (q["seed"], q["arm"]) == (2, "y") else q for q in r if q["labelled"] == 5]
    with pytest.raises(ValueError, match="m of 'y' is nan for seed 2"): contrast(r, "m", "x", ["y"])


def test_the_interval_against_several_controls_keeps_its_promise():
    "Eight equally good controls: the smallest of their upper ends must not fall below the truth more often than one end of an interval may."
    rng, below, above = np.random.default_rng(0), 0, 0
    for _ in range(600):
        arms = {"x": rng.normal(.01, .01, 10)} | {f"c{k}": rng.normal(0, .01, 10) for k in range(8)}
        c = contrast([dict(seed=s, arm=a, m=float(v[s])) for a, v in arms.items() for s in range(10)], "m", "x", [a for a in arms if a != "x"])
        below, above = below + (c.high < .01), above + (c.low > .01)
    assert below <= 25 and above <= 25                    # 2.5 % are 15


def test_readme_shows_the_claims_as_the_committed_cells_decide_them():
    root = Path(__file__).parents[1]
    text = (root / "README.md").read_text(encoding="utf-8")
    shown = text.partition("<!-- claims -->\n")[2].partition("\n<!-- end of claims -->")[0]
    assert shown == claims_table(read_claims(root / "reports/claims.toml"), root / "reports", "reports/")


@pytest.mark.parametrize("name, folder", [("study_distillation", "study_few_labels"), ("study_fusion", "study_fusion")])
def test_a_study_notebook_shows_the_table_that_is_committed(name, folder):
    root = Path(__file__).parents[1]
    if not (root/"nbs").is_dir(): pytest.skip("an installed package has no notebooks")
    shown = "".join("".join(o.get("text", "")) for c in json.loads((root/f"nbs/{name}.ipynb").read_text(encoding="utf-8"))["cells"] for o in c.get("outputs", []))
    rows = Table(root/"reports"/folder).rows()
    assert shown.startswith(f"{len(rows)} ") and sorted(shown.partition("commits ")[2].split("\n")[0].split(", ")) == sorted({r["commit"] for r in rows})
