"Runs beside published numbers: only complete ones, only beside their like, and every difference by the same videos."
import copy, itertools, json
import numpy as np
import pytest
from mbd import compare, evaluation
from mbd.cli import main
from mbd.compare import published, sign_flips, tables
from mbd.experiment import read_runs

SCORES = ("local", "global", "average", "best_baseline", "adaptive", "oracle")


def answers(seed, videos=60, classes=4, flaw=0.):
    rng = np.random.default_rng(seed)
    labels = np.arange(videos) % classes
    logits = [np.eye(classes)[labels]*2 + np.random.default_rng(7 + k).normal(size=(videos, classes)) for k in range(2)]
    logits[0][rng.random(videos) < flaw] = 0
    return dict(ids=np.array([f"v{i}" for i in range(videos)]), sources=np.array([f"s{i // 3}" for i in range(videos)]), labels=labels, local_logits=logits[0], global_logits=logits[1], weight=np.full(videos, .5))


def top1(a):
    p, q = (np.exp(z)/np.exp(z).sum(1, keepdims=True) for z in (a["local_logits"], a["global_logits"]))
    right = {"local": p, "global": q, "average": (p + q)/2, "adaptive": .5*p + .5*q}
    found = {n: float(evaluation.top_k_correct(x, a["labels"]).mean()) for n, x in right.items()}
    return found | {"best_baseline": found["average"], "oracle": 1.}


@pytest.fixture
def reports(tmp_path):
    "Makes a run folder with a record, and its answers."
    number = itertools.count()
    def make(status="complete", layout="ucf101", generated=True, split=1, seed=0, more=None, asked=None, scores=None, flaw=0., data=None, **rest):
        folder = tmp_path/"reports"/f"{layout}{'-generated'*generated}"/f"run{next(number)}"
        folder.mkdir(parents=True)
        a = answers(seed, flaw=flaw); np.savez(folder/"predictions.npz", **a)
        scores = top1(a) | (scores or {})
        part = dict(expected=60, found=60, unreadable=0)
        record = {"status": status, "experiment": layout, "preset": "mini", "seed": seed, "commit": "abc", "heartbeat": "2020-01-01T00:00:00+00:00", "process": {"pid": 1, "host": "elsewhere", "started": "x"},
                  "data": {"name": "miniactions" if generated else layout, "layout": layout, "split": split, "test": part, "pair": "hand"} | ({"generator": "1/x"} if generated else {}) | (data or {}),
                  "protocol": {"clips": 5, "crops": 3}, "top1": scores, "top1_interval": {n: [max(0, v - .05), min(1, v + .05)] for n, v in scores.items()},
                  "cost": {"gflops_per_view": {"local": 10., "global": 30.}, "parameters": {"local": 10**6, "global": 10**6}}} | rest
        (folder/"result.json").write_text(json.dumps(record))
        (folder/"parameters.json").write_text(json.dumps({"resolved": dict(preset="mini", seed=seed, split=split, train_videos=0, test_videos=0) | (asked or {})}))
        return folder
    make.root = tmp_path/"reports"
    return make


def parts(text): return {p.splitlines()[0].strip(): p for p in text.split("## ") if p.strip("# \n")}


def test_only_complete_runs_count_and_generated_ones_stand_apart(reports):
    reports(seed=1); reports(status="failed", seed=2); reports(status="running", seed=3); reports(generated=False, layout="ssv2", seed=4)
    found = parts(tables(read_runs(reports.root)))
    assert "not yet run" in found["UCF101"] and "hand (mini" not in found["UCF101"] and "not yet run" not in found["Something-Something V2"]
    assert found["In the layout of UCF101"].count("| hand (mini") == 1 and "Not counted: 2 run(s)" in "".join(found.values())
    assert "run1: failed" in "".join(found.values()) and "run2: interrupted" in "".join(found.values())


def test_without_any_run_all_is_said_to_be_not_yet_run(tmp_path):
    text = tables(read_runs(tmp_path))
    assert text.count("not yet run") == 4 and "No complete run yet" in text and text.count("MBD, its authors | ? | ? |") == 4


def test_three_splits_have_a_mean_and_two_have_none(reports):
    for split, value in ((1, .5), (2, .6)): reports(generated=False, split=split, scores=dict(adaptive=value))
    assert "| mean of" not in tables(read_runs(reports.root)) and tables(read_runs(reports.root)).count("| 2 of 3 splits |") == 2
    reports(generated=False, split=3, scores=dict(adaptive=.7))
    row = next(line for line in tables(read_runs(reports.root)).splitlines() if "mean of 3" in line)
    assert "| 60.0 |" in row and row.endswith("| nothing |")


def test_seeds_of_one_recipe_are_joined_and_other_recipes_are_not(reports):
    for seed, value in ((1, .80), (2, .82), (3, .81)): reports(seed=seed, scores=dict(adaptive=value))
    reports(seed=1, asked=dict(learning_rate=.5), scores=dict(adaptive=.1))
    rows = [line for line in tables(read_runs(reports.root)).splitlines() if line.startswith("| hand (mini")]
    assert len(rows) == 2 and "| 3 |" in rows[0] and "81.0 [78.5, 83.5]" in rows[0] and "10.0 [5.0, 15.0]" in rows[1]      # Student: 1 * 4.303 / sqrt(3)


@pytest.mark.parametrize("change, words", [
    (dict(data={"map_on_val": True}), "half of the validation list"), (dict(data={"test": dict(expected=80, found=70, unreadable=10)}), "20 of 80 videos missing"),
    (dict(asked=dict(train_videos=2000)), "a part of the lists"), (dict(), "nothing")])
def test_what_is_unequal_is_said(reports, change, words):
    reports(generated=False, layout="kinetics400", **change)
    [row] = [line for line in tables(read_runs(reports.root)).splitlines() if line.startswith("| hand (mini")]
    assert row.endswith(f"| {words} |")


def test_views_as_ours_are_marked_and_a_second_protocol_has_its_line(reports):
    reports(generated=False, layout="kinetics400", also={"10x3": {"top1": dict.fromkeys(SCORES, .77), "top1_interval": {n: [.7, .8] for n in SCORES}}})
    found = parts(tables(read_runs(reports.root)))["Kinetics-400"]
    rows = [line for line in found.splitlines() if line.startswith("| hand (mini")]
    assert ["5x3" in rows[0], "10x3" in rows[1], "77.0" in rows[1]] == [True]*3 and "| 300 |" in rows[0] and "| 600 |" in rows[1]      # (10 + 30)/2 GFLOPs x 15 and x 30
    marked = [line.split("|") for line in found.splitlines() if "| yes |" in line]
    assert marked and all(cells[5].strip().endswith(("x5x3", "x10x3")) for cells in marked)


def test_the_published_table_is_read_whole():
    rows = published()
    assert len(rows) > 90 and {r.dataset for r in rows} == {"ucf101", "hmdb51", "kinetics400", "ssv2"} and all(r.source for r in rows)
    assert [r.top1 for r in rows if r.model.startswith("MBD")] == [None]*4 and all(0 < r.top1 < 100 for r in rows if not r.model.startswith("MBD"))
    assert len({(r.model, r.pretraining, r.dataset, r.top1) for r in rows}) == len(rows)


@pytest.mark.parametrize("line, words", [("M,,ucf101,many,,,,,,,S,", "line 2: .*many"), ("M,,ucf10,80,,,,,,,S,", "line 2: .*four data sets"), ("M,,ucf101,0.8081e3,,,,,,,S,", "no percentage"), ("M,,ucf101,80,,,,,,,,", "source"), ("M,,ucf101,80,,,,,,,S,,more", "line 2: it has more or fewer cells")])
def test_a_wrong_line_ends_the_reading(tmp_path, line, words):
    head = "model,pretraining,dataset,top1,list,frames,clips,crops,gflops_per_view,parameters_m,source,note"
    (tmp_path/"p.csv").write_text(f"{head}\n{line}\n")
    with pytest.raises(ValueError, match=f"p.csv.*{words}"): published(tmp_path/"p.csv")
    (tmp_path/"p.csv").write_text("model,top1\n")
    with pytest.raises(ValueError, match="lacks the column"): published(tmp_path/"p.csv")


def test_a_paired_difference_is_that_of_the_videos(reports):
    first, second = reports(seed=1), reports(seed=1, flaw=.4, asked=dict(x=1))
    runs = [r | {"folder": r["folder"]} for r in read_runs(reports.root)]
    found = compare.paired(runs[0], runs[1], "local")
    a, b = (compare.answers(r)[2]["local"].astype(float) for r in runs)
    assert found["difference"][0] == pytest.approx(a.mean() - b.mean()) and found["videos"] == 60 and found["difference"][1] < found["difference"][0] < found["difference"][2]
    assert found["p"] < .05 and compare.paired(runs[0], runs[0])["p"] == 1.
    assert "| run0 | run1 | 60 |" in compare.paired_table(runs, "local")


def test_answers_that_do_not_belong_to_the_record_are_refused(reports):
    reports(seed=1, scores=dict(adaptive=.2))
    with pytest.raises(ValueError, match="run0: predictions.npz gives adaptive .* the record says 0.2000"): compare.answers(read_runs(reports.root)[0])


@pytest.mark.parametrize("change", [dict(data={"generator": "1/y"}), dict(generated=False), dict(generated=False, split=2)])
def test_runs_on_other_videos_are_not_paired(reports, change):
    reports(seed=1); reports(seed=1, **change)
    runs = sorted(read_runs(reports.root), key=lambda r: r["folder"].name)
    with pytest.raises(ValueError, match="tested on different videos"): compare.paired(*runs)
    assert "No two complete runs" in compare.paired_table(runs)


def test_sign_flips_against_all_of_them_by_hand():
    difference, sources = np.array([1, 1, 0, -1, 1, 1.]), np.array(list("aabbcd"))
    sums = [2, -1, 1, 1]
    every = [abs(sum(s*x for s, x in zip(signs, sums))) >= abs(sum(sums)) for signs in itertools.product((-1, 1), repeat=4)]
    assert sign_flips(difference, sources) == pytest.approx(np.mean(every))


def test_sign_flips_are_wrong_as_often_as_they_say():
    rng, below = np.random.default_rng(0), 0
    for trial in range(200):
        per_source = rng.normal(size=20)
        below += sign_flips(np.repeat(per_source, 5) + rng.normal(size=100)*.1, np.repeat(np.arange(20), 5), flips=400, seed=trial) < .05
    assert 2 <= below <= 20      # 10 expected


def test_holm_by_hand():
    assert evaluation.holm([.01, .04, .03, .005]) == pytest.approx([.03, .06, .06, .02]) and evaluation.holm([]) == [] and evaluation.holm([.9, .8]) == [1, 1]


def test_the_command_prints_and_writes_the_tables(reports, tmp_path, capsys):
    reports(seed=1)
    assert main(["compare", "--reports", str(reports.root), "--output", str(tmp_path/"c.md")]) == 0
    out = capsys.readouterr().out
    assert "## Generated data" in out and "## Runs on the same videos" in out and (tmp_path/"c.md").read_text().strip() == out.strip()
    assert main(["compare", "--reports", str(tmp_path/"nowhere")]) == 2 and "is no folder" in capsys.readouterr().err


def test_missing_videos_of_any_seed_are_said(reports):
    for seed, found in ((1, 60), (2, 55)): reports(generated=False, layout="ssv2", seed=seed, data={"test": dict(expected=60, found=found, unreadable=0)})
    [row] = [line for line in tables(read_runs(reports.root)).splitlines() if line.startswith("| hand")]
    assert row.endswith("| 5 of 60 videos missing |") and "55 of 60" in row      # one list, whatever the seeds


def test_a_run_made_again_is_no_second_seed(reports):
    reports(seed=1, started="2026-01-01", scores=dict(adaptive=.5)); reports(seed=1, started="2026-01-02", scores=dict(adaptive=.6))
    [row] = [line for line in tables(read_runs(reports.root)).splitlines() if line.startswith("| hand (mini")]
    assert "| 1 |" in row and "60.0" in row


def test_a_complete_record_with_holes_is_named_and_breaks_nothing(reports):
    folder = reports(seed=1)
    record = json.loads((folder/"result.json").read_text()); del record["cost"]; (folder/"result.json").write_text(json.dumps(record))
    assert "run0: complete, but its record has holes" in tables(read_runs(reports.root))


def test_files_that_do_not_belong_together_are_named_among_the_pairs(reports):
    reports(seed=1); reports(seed=1, asked=dict(x=1), scores=dict(adaptive=.2))
    assert "Left out: run1: predictions.npz gives adaptive" in compare.paired_table(read_runs(reports.root))


def test_a_run_on_stored_features_names_its_backbones_and_what_they_have_seen(reports):
    side = lambda name: dict(backbone=name, weights="kinetics400", digest="x", seen=["kinetics400/train"], protocol="1x3", augmented=0)
    reports(generated=False, data={"pair": None, "features": {"local": side("r3d_18"), "global": side("swin3d_t")}})
    found = parts(tables(read_runs(reports.root)))["UCF101"]
    assert "stored features of r3d_18 kinetics400 + swin3d_t kinetics400, from kinetics400/train (mini" in found and "frozen backbones, whose cost is left out" in found


FEW, FUSIONS = dict(study="study_few_labels", arm="directed", control="reversed", setting="50 labels"), dict(study="study_fusion", arm="adaptive", control="gate", setting="noise in local")

@pytest.mark.parametrize("right, old, new, near", [(FEW, "arm", "directd", "directed"), (FEW, "setting", "50 lables", "50 labels"), (FUSIONS, "control", "gaet", "gate"), (FUSIONS, "setting", "noise in locl", "noise in local")])
def test_a_claim_that_names_what_its_study_does_not_have_is_refused_before_its_first_cell(tmp_path, right, old, new, near):
    def write(study, arm, control, setting): (tmp_path/"claims.toml").write_text(f'[[claim]]\nid = "c"\npaper = "P3"\nsays = "so"\nstudy = "{study}"\nmetric = "adaptive"\narm = "{arm}"\ncontrols = ["{control}"]\nwhere = {{ setting = "{setting}" }}\nrefuted = "no"\nseeds = 8\n')
    write(**right); assert "**untested**" in compare.claims(tmp_path)
    write(**right | {old: new})
    with pytest.raises(ValueError, match=f"claim 'c': {right['study']} has no {'setting' if old == 'setting' else 'arm'} '{new}'; did you mean '{near}'"): compare.claims(tmp_path)
