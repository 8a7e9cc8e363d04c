"The worlds, arms and rows of the distillation studies."
from dataclasses import replace
from pathlib import Path
import pytest
import torch
from mbd import clips, worlds
from mbd.distillation import Distillation
from mbd.dominance import DominanceMap
from mbd.study import Table, read_claims
from mbd.worlds import Arm, Setting, World, cka, regroup, score_arm, train_arm


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
    monkeypatch.setattr(worlds.training.Trainer, "step", lambda *a, **k: pytest.fail("trained again"))
    again = World(TINY, 3, world.folder).warm()
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values())) and again.map.group == first.map.group


def test_arms_differ_and_the_same_arm_gives_the_same_row(world):
    directed = Arm(Distillation(intermediate_weight=0., only_right_teacher=False), groups="point")
    a, b, none = (worlds._cell(world, arm) for arm in (directed, directed, Arm()))
    assert a == b and a != none and a.keys() == none.keys() and a["knobs"] != none["knobs"]
    assert a["taught_local"] + a["taught_global"] == pytest.approx(1) and none["taught_local"] == none["taught_global"] == 0      # by the point groups each video is a lesson for one of them
    assert all(0 <= a[k] <= 1 for k in ("local", "global", "adaptive", "oracle", "best_baseline", "disagreement", "cka")) and a["oracle"] >= max(a["local"], a["global"])


def test_arms_in_which_nobody_speaks_are_one_training_and_say_so(world):
    never = Distillation(intermediate_weight=0., only_right_teacher=False, sure_above=.999)
    one, two = (worlds._cell(world, Arm(replace(never, arm=arm), groups="point")) for arm in ("directed", "both"))
    assert one["taught_local"] == one["taught_global"] == 0 and {**one, "knobs": ""} == {**two, "knobs": ""}


def test_a_round_begins_where_the_one_before_has_ended(world, monkeypatch):
    "Its map, and its teachers: the streams as they have become."
    directed, begun, train = Arm(Distillation(intermediate_weight=0., only_right_teacher=False), groups="point"), [], worlds.training.train
    def spied(model, data, settings, stage, *more):
        begun.append((settings.seed, model.map.share.clone(), {k: v.clone() for k, v in model.state_dict().items()}))
        return train(model, data, settings, stage, *more)
    one = train_arm(world, directed)
    two = World(replace(TINY, rounds=2), 3, world.folder); two.warm()            # the same warm-up: rounds come after it
    monkeypatch.setattr(worlds.training, "train", lambda *a, **k: train(*a, **k) if "checkpoints" in k else spied(*a))
    train_arm(two, directed)
    assert [seed for seed, *_ in begun] == [4, 1004] and torch.equal(begun[1][1], one.map.share) and not torch.equal(begun[0][1], begun[1][1])
    assert all(torch.equal(begun[1][2][k], v) for k, v in one.state_dict().items())


def test_too_many_labels_are_refused(world):
    with pytest.raises(ValueError, match="labelled = 9.*8 sources"): World(replace(TINY, labelled=9), 3, world.folder)


def test_claims_that_are_committed_name_studies_settings_and_arms_that_exist():
    root = Path(__file__).parents[1]
    for claim in read_claims(root / "reports/claims.toml"):
        if claim.study == "study_fusion":
            assert claim.where["setting"] in worlds.DAMAGE
            continue
        known = worlds.STUDIES[claim.study]
        controls = claim.controls if isinstance(claim.controls, list) else []
        names = known.arms if claim.by == "arm" else known.settings
        assert {claim.arm, *controls} <= set(names) and set(claim.where) <= {"setting", "arm"}
        assert claim.where.get("setting", next(iter(known.settings))) in known.settings and claim.where.get("arm", next(iter(known.arms))) in known.arms


def test_a_table_is_of_one_set_of_numbers(tmp_path):
    study, files = worlds.Study("tiny", "", {"tiny": TINY}, {"none": Arm()}), lambda: (tmp_path/"tiny/cells.csv").read_bytes()
    rows = worlds.run_study(study, (3,), tmp_path, tmp_path/"worlds"); before = files()
    with pytest.raises(ValueError, match="tiny: seed 3, tiny, 'none' was made by other numbers.*a name of its own"):
        worlds.run_study(replace(study, settings={"tiny": replace(TINY, arm_learning_rate=5e-4)}), (3, 4), tmp_path, tmp_path/"worlds")
    assert files() == before and worlds.run_study(study, (3,), tmp_path, tmp_path/"worlds") == rows


def test_committed_tables_are_of_the_numbers_that_the_studies_have_now():
    for study in worlds.STUDIES.values():
        rows = Table(Path(__file__).parents[1]/"reports"/study.name).rows()
        assert rows; worlds._check_knobs(study, rows)
