"""Parameters, the run folder, and what a record may claim."""
import csv
import importlib.util
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mbd import experiment as ex, pairs

NOTEBOOKS = Path(__file__).resolve().parents[1] / "nbs"


def settings(folder, **changes):
    return SimpleNamespace(**{**dict(file=None, data={}, annotations={}, reports=Path(folder), device="cpu", precision="float32", workers=0), **changes})


@pytest.fixture
def start(tmp_path, capsys):
    def begin(heartbeat=30.0, **given):
        return ex.start("ucf101", {"preset": "smoke", **given}, settings=settings(tmp_path), heartbeat=heartbeat)
    yield begin
    if ex._current is not None:
        ex._current.fail("the test ended")
        ex._current.stop.set()


def result(**changes):
    part = {"expected": 10, "found": 9, "unreadable": 1}
    top1, view = dict.fromkeys(ex.METHODS, 0.9), {"frames": 16, "stride": 1, "size": 56}
    return {**dict(data=dict(layout="ucf101", split=1, generator="1/00ff", fit=part, map=part, gate=part, test=part),
                   protocol={"clips": 1, "crops": 1, "local": view, "global": view}, top1=top1, top5=top1, top1_interval={m: [0.8, 1.0] for m in ex.METHODS},
                   baselines={"average": 0.9}, adaptive_minus_best_baseline=[0.0, -0.1, 0.1], by_group={}, by_length={},
                   control={"kind": "equal steps", "top1": {"adaptive": 0.9}}, stages=[{"name": "warm-up", "epochs": 1, "seconds": 0.5, "flops": 0}],
                   cost={"parameters": {"local": 1}, "gflops_per_view": {"local": 0.1}, "train_clips_per_second": 5.0}), **changes}


def written(run):
    return json.loads((run.folder / "result.json").read_text())


# ---- parameters

def test_misspelt_names_and_impossible_values_are_all_named_with_a_remedy():
    with pytest.raises(ex.ParameterError) as caught:
        ex.check_parameters({"epocs": 3, "sed": 1, "batch_size": 2.5, "learning_rate": -1, "arm": "direct", "control": 1}, "ucf101")
    words = str(caught.value)
    for expected in ("'epocs'", "'warm_up_epochs'", "'sed'", "did you mean 'seed'", "batch_size must be a whole number, not 2.5",
                     "learning_rate = -1 is out of range", "did you mean 'directed'", "control must be True or False"):
        assert expected in words


@pytest.mark.parametrize("name", [p.name for p in ex.COMMON])
def test_a_letter_left_out_leads_to_the_right_name(name):
    assert name in ex.nearest(name[:2] + name[3:], [p.name for p in ex.COMMON])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "3", True, 2**40, -1, [3]])
def test_what_a_whole_number_cannot_be(value):
    with pytest.raises(ex.ParameterError, match="seed"):
        ex.check_parameters({"seed": value}, "ucf101")


def test_values_are_cast_and_the_rest_is_by_default():
    values = ex.check_parameters({"seed": 3.0, "learning_rate": 1, "warm_up_epochs": None}, "ucf101")
    assert (values["seed"], type(values["seed"]), type(values["learning_rate"])) == (3, int, float)
    assert values["warm_up_epochs"] is None and set(values) == {p.name for p in ex.COMMON}
    with pytest.raises(ex.ParameterError, match="seed must be a whole number, not None"):
        ex.check_parameters({"seed": None}, "ucf101")


def test_an_unknown_experiment_names_the_nearest():
    with pytest.raises(ex.ParameterError, match="'ucf101'"):
        ex.check_parameters({}, "ucf10")


def test_every_preset_gives_every_open_value_a_possible_one(tmp_path):
    assert {"ucf101", "hmdb51", "kinetics400", "ssv2", "features"} == set(ex.EXPERIMENTS)
    for e in ex.EXPERIMENTS.values():
        declared = {p.name: p for p in e.parameters}
        assert all(ex.value_problem(p, p.default) is None for p in e.parameters)
        for preset, values in e.presets.items():
            assert not [ex.value_problem(declared[n], v) for n, v in values.items() if ex.value_problem(declared[n], v)]
            folder = {e.data_name: tmp_path} if preset == "full" else {}
            chosen, _ = ex.resolve(ex.check_parameters({"preset": preset}, e), e, settings(tmp_path, data=folder), gpu=False)
            assert None not in vars(chosen).values()


@pytest.mark.parametrize("name, given, words", [
    ("ucf101", {"map_on_val": True}, "map_on_val = True, but ucf101 has no validation list"),
    ("kinetics400", {"preset": "full", "map_on_val": False}, "have seen the training list of kinetics400.*set map_on_val = True"),
    ("kinetics400", {"preset": "smoke", "test_videos": 50}, "test_videos = 50: with map_on_val.*at least 60"),
    ("ssv2", {"preset": "full", "also": "2x3"}, "also = '2x3' is the protocol itself"),
])
def test_a_map_that_cannot_be_measured_is_refused_at_the_start(tmp_path, name, given, words):
    with pytest.raises(ex.ParameterError, match=words):
        ex.resolve(ex.check_parameters({"preset": "mini"} | given, name), name, settings(tmp_path, data={name: tmp_path}), gpu=False)


def test_kinetics_takes_a_pair_that_has_seen_nothing_with_its_map_on_the_training_list(tmp_path):
    given = {"preset": "full", "map_on_val": False, "pair": "unseen"}
    chosen, _ = ex.resolve(ex.check_parameters(given, "kinetics400"), "kinetics400", settings(tmp_path, data={"kinetics400": tmp_path}), gpu=False)
    assert (chosen.map_on_val, chosen.protocol, chosen.also) == (False, "10x3", "5x3")


# ---- how a run teaches

def test_every_field_of_the_distillation_is_a_parameter_of_a_run_but_for_the_two_weights_inside_the_decoupled_loss(tmp_path):
    from dataclasses import fields
    from mbd.distillation import Distillation
    named = {p.name.removeprefix("teach_") for p in ex.TEACHING}
    assert {f.name for f in fields(Distillation)} - named == {"target_weight", "other_weight"} and named <= {f.name for f in fields(Distillation)}
    for e in ("ucf101", "features"):
        chosen, _ = ex.resolve(ex.check_parameters({"preset": "smoke"}, e), e, settings(tmp_path), gpu=False)
        assert ex.teaching(chosen) == Distillation()
        given = {"preset": "smoke", "arm": "both", "final": "decoupled", "intermediate": "logit", "teacher": "averaged", "teacher_decay": 0.99, "only_right_teacher": False, "student_below": 0.6, "teach_warm_up": 0.1, "teach_fade": 0.3}
        chosen, _ = ex.resolve(ex.check_parameters(given, e), e, settings(tmp_path), gpu=False)
        assert ex.teaching(chosen) == Distillation("both", final="decoupled", intermediate="logit", teacher="averaged", teacher_decay=0.99, only_right_teacher=False, student_below=0.6, warm_up=0.1, fade=0.3)


@pytest.mark.parametrize("given, words", [
    ({"teach_warm_up": 0.7, "teach_fade": 0.6}, "more than the whole stage"), ({"batch_size": 2}, "batch_size = 2.*intermediate = logit"),
    ({"accumulate": 4}, "batch_size = 8.*needs 3"), ({"accumulate": 3, "intermediate": "logit"}, "choose a multiple of 3"), ({"accumulate": 8, "intermediate": "logit"}, "leaves one clip each"),
])
def test_values_that_do_not_go_together_are_refused_before_a_folder_is_made(tmp_path, given, words):
    with pytest.raises(ex.ParameterError, match=words): ex.start("ucf101", {"preset": "smoke", **given}, settings(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_display_that_is_not_installed_is_refused_before_a_folder_is_made(tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "tensorboard" else found(name, *more))
    with pytest.raises(ex.ParameterError, match="tensorboard = True.*pip install tensorboard"): ex.start("ucf101", {"preset": "smoke", "tensorboard": True}, settings(tmp_path))
    assert not list(tmp_path.iterdir())


def test_heads_on_stored_features_are_checked_too(tmp_path):
    with pytest.raises(ex.ParameterError, match="batch_size = 2"): ex.resolve(ex.check_parameters({"preset": "smoke", "batch_size": 2}, "features"), "features", settings(tmp_path), gpu=False)


def test_stored_vectors_have_no_cells_to_compare():
    with pytest.raises(ex.ParameterError, match="intermediate = 'hint' is not one of relation | logit"): ex.check_parameters({"intermediate": "hint"}, "features")


# ---- auto

COMPLETE = ex.Experiment("ucf101", "ucf101", presets={**ex.PRESETS, "full": ex.PRESETS["mini"]})


def test_full_is_refused_where_an_experiment_has_none(tmp_path):
    s, small = settings(tmp_path, data={"ucf101": tmp_path}, device="cuda"), ex.Experiment("ucf101", "ucf101", presets={n: ex.PRESETS[n] for n in ("smoke", "mini")})
    with pytest.raises(ex.ParameterError, match="has no preset 'full'.*data = 'real'"):
        ex.resolve(ex.check_parameters({"preset": "full"}, small), small, s, gpu=True)
    assert ex.resolve(ex.check_parameters({}, small), small, s, gpu=True)[0].preset == "mini"


def test_full_takes_the_pair_of_the_data_set_and_its_own_views(tmp_path):
    chosen, _ = ex.resolve(ex.check_parameters({"preset": "full"}, "ucf101"), "ucf101", settings(tmp_path, data={"ucf101": tmp_path}), gpu=False)
    assert (chosen.frames, chosen.size, chosen.read, chosen.protocol) == (0, 0, "files", "5x3")
    assert chosen.pair == pairs.find_pair("ucf101").name != "hand"


@pytest.mark.parametrize("given, real, gpu, device, expected", [
    ({}, True, True, "cuda", ("full", "real", "cuda")),
    ({}, True, False, "cpu", ("mini", "generated", "cpu")),
    ({}, False, True, "cuda", ("mini", "generated", "cuda")),
    ({"device": "cpu"}, True, True, "cuda", ("mini", "generated", "cpu")),
    ({"data": "generated"}, True, True, "cuda", ("mini", "generated", "cuda")),
    ({"data": "real"}, True, False, "cpu", ("mini", "real", "cpu")),
    ({"preset": "full"}, True, False, "cpu", ("full", "real", "cpu")),
    ({"preset": "smoke"}, True, True, "cuda", ("smoke", "generated", "cuda")),
])
def test_auto(tmp_path, given, real, gpu, device, expected):
    s = settings(tmp_path, data={"ucf101": tmp_path} if real else {}, device=device)
    chosen, why = ex.resolve(ex.check_parameters(given, COMPLETE), COMPLETE, s, gpu=gpu)
    assert (chosen.preset, chosen.data, chosen.device) == expected and "real data" in why


@pytest.mark.parametrize("given, words", [({}, "does not exist"), ({"preset": "smoke"}, "does not exist"), ({"data": "real"}, "does not exist")])
def test_a_configured_folder_that_is_missing_is_never_passed_over(tmp_path, given, words):
    for s in (settings(tmp_path, data={"ucf101": tmp_path / "gone"}), settings(tmp_path, data={"ucf101": tmp_path}, annotations={"ucf101": tmp_path / "gone"})):
        with pytest.raises(ex.ParameterError, match=words):
            ex.resolve(ex.check_parameters(given, COMPLETE), COMPLETE, s, gpu=False)
        generated, _ = ex.resolve(ex.check_parameters({"data": "generated"}, COMPLETE), COMPLETE, s, gpu=False)
        assert generated.data == "generated"


@pytest.mark.parametrize("given, words", [
    ({"preset": "full"}, "no folder is configured"), ({"data": "real"}, "no folder is configured"), ({"preset": "full", "data": "generated"}, "real data"),
    ({"train_videos": 20}, "at least 30"), ({"train_videos": 0}, "at least 30"), ({"test_videos": 0}, "a test video"), ({"train_videos": 10**6}, "99 groups"),
    ({"device": "cuda:1"}, "no GPU"), ({"split": 2}, "split 1 only"), ({"frames": 2}, "at least 4, or 0"), ({"size": 8}, "at least 16, or 0"),
    ({"pair": "swaped"}, "pair = 'swaped'.*swapped"), ({"local_weights": "no/such.pth"}, "local_weights = 'no/such.pth': no such file"),
])
def test_contradictions(tmp_path, given, words):
    with pytest.raises(ex.ParameterError, match=words):
        ex.resolve(ex.check_parameters(given, COMPLETE), COMPLETE, settings(tmp_path), gpu=False)


def test_a_given_value_wins_over_the_preset(tmp_path):
    chosen, _ = ex.resolve(ex.check_parameters({"preset": "smoke", "warm_up_epochs": 7}, "ucf101"), "ucf101", settings(tmp_path), gpu=False)
    assert chosen.warm_up_epochs == 7 and chosen.distil_epochs == ex.PRESETS["smoke"]["distil_epochs"]


# ---- the notebook's names

def test_names_of_a_notebook():
    space = {"seed": 1, "epocs": 3, "np": np, "f": len, "In": [], "Out": {}, "_": 3, "_i": "x", "__name__": "__main__", "exit": 1, "array": np.ones(3)}
    assert ex.given_parameters(space, "ucf101") == {"seed": 1, "epocs": 3}


def test_a_parameter_hidden_by_something_else_is_not_passed_over():
    with pytest.raises(ex.ParameterError, match="data must be a text"):
        ex.check_parameters(ex.given_parameters({"data": np}, "ucf101"), "ucf101")


def test_running_the_first_cell_again_looks_at_the_parameters_cell_only():
    space = {"seed": 1, "best": 2, ex._STARTED: True, "In": ["", "seed = 1", "best = 2"]}
    assert ex.given_parameters(space, "ucf101") == {"seed": 1}
    space |= {"epocs": 3, "In": [*space["In"], "%matplotlib inline", "seed = 1\nepocs = 3"]}
    assert ex.given_parameters(space, "ucf101") == {"seed": 1, "epocs": 3}


def test_a_script_that_starts_twice_is_checked_twice(start, tmp_path):
    given = {"preset": "smoke"}
    ex.start("ucf101", given, settings=settings(tmp_path))
    with pytest.raises(ex.ParameterError, match="epocs"):
        ex.start("ucf101", {**given, "epocs": 1}, settings=settings(tmp_path))


def notebook(path, cell, tags=("parameters",)):
    path.write_text(json.dumps({"cells": [{"cell_type": "code", "metadata": {"tags": list(tags)}, "source": cell}]}))
    return path


def test_the_written_parameters_cell_agrees_with_the_declaration(tmp_path):
    cell = ex.parameters_cell("ucf101")
    ex.check_notebook(notebook(tmp_path / "a.ipynb", cell), "ucf101")
    for wrong, words in ((cell.replace("seed = 0", "seed = 1", 1), "seed"), (cell + "\nepocs = 3  # x", "epocs"), (cell.partition("\n")[2], "preset"),
                         (cell + "\nimport os", "only assign"), ("seed = 0", "no comment")):
        with pytest.raises(ex.ParameterError, match=words):
            ex.check_notebook(notebook(tmp_path / "a.ipynb", wrong), "ucf101")
    with pytest.raises(ex.ParameterError, match="found 0"):
        ex.check_notebook(notebook(tmp_path / "a.ipynb", cell, tags=()), "ucf101")


@pytest.mark.parametrize("name", sorted(ex.EXPERIMENTS))
def test_run_notebooks_agree_with_the_declaration(name):
    path = NOTEBOOKS / f"run_{name}.ipynb"
    if not NOTEBOOKS.is_dir():
        pytest.skip("no folder nbs (an installed package has no notebooks)")
    ex.check_notebook(path, name)
    assert ex.parameters_cell(name) in ["".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]


# ---- files

def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = ex.write_json(tmp_path / "a.json", {"x": 1})

    def breaks(file):
        file.write(b"{")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ex.write_atomic(path, breaks)
    assert json.loads(path.read_text()) == {"x": 1} and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("value, place", [({"a": [0.0, float("nan")]}, r"record\.a\[1\]"), ({"b": torch.tensor(float("inf"))}, r"record\.b"), ({"c": object()}, r"record\.c")])
def test_a_record_never_holds_what_is_no_number(tmp_path, value, place):
    with pytest.raises(ex.RecordError, match=place):
        ex.write_json(tmp_path / "a.json", value)
    assert not (tmp_path / "a.json").exists()


def test_many_runs_at_the_same_second_get_folders_of_their_own(tmp_path):
    made, threads = [], []
    for _ in range(16):
        threads.append(threading.Thread(target=lambda: made.append(ex.new_folder(tmp_path / "reports", "same"))))
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(set(made)) == 16 and all(p.is_dir() for p in made)


def test_log_keeps_all_columns_and_lines(start):
    run = start()
    run.log(stage="warm-up", epoch=1, stream="local", loss=1.23456789, accuracy=0.5)
    run.log(stage="distil", epoch=1, stream="local", loss=torch.tensor(0.5).item(), taught=0.2)
    rows = list(csv.DictReader(open(run.folder / "log.csv")))
    assert [r["stage"] for r in rows] == ["warm-up", "distil"]
    assert rows[0]["taught"] == "" and rows[1]["taught"] == "0.2" and float(rows[0]["loss"]) == pytest.approx(1.23457)


def test_predictions_are_arrays_and_never_pickles(start):
    run = start()
    arrays = dict(ids=["a", "b"], sources=["s", "t"], labels=torch.tensor([0, 1]), local_logits=torch.zeros(2, 3, requires_grad=True), global_logits=np.zeros((2, 3)), weight=[0.5, 0.5])
    path = run.save_predictions(**arrays, classes=["x", "y", "z"])
    stored = ex.load_predictions(path)
    assert stored["ids"].tolist() == ["a", "b"] and stored["local_logits"].shape == (2, 3) and stored["classes"].tolist() == ["x", "y", "z"]
    for change, words in ((dict(ids=["a", None]), "objects"), (dict(weight=[0.5, np.nan]), "not finite"), (dict(labels=[0]), "labels has 1")):
        with pytest.raises(ValueError, match=words):
            run.save_predictions(**(arrays | change))
    np.savez(run.folder / "evil.npz", a=np.array([{}], dtype=object))
    with pytest.raises(ValueError):
        ex.load_predictions(run.folder / "evil.npz")


def test_figures_and_the_map_are_filed(start):
    from matplotlib.figure import Figure
    run = start()
    assert run.save_figure("curves", Figure()).read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="figure's name"):
        run.save_figure("../curves", Figure())
    run.save_dominance(SimpleNamespace(to_csv=lambda path: Path(path).write_text("class,n\n")))
    assert (run.folder / "dominance.csv").read_text() == "class,n\n" and not list(run.folder.glob(".*"))


# ---- the life of a run

def test_a_run_is_running_from_the_first_moment_and_complete_at_the_end(start, tmp_path):
    run = start(seed=5)
    assert run.folder.parent == tmp_path / "ucf101-generated" and "smoke-seed5" in run.folder.name and run.banner == "generated data"
    record = written(run)
    assert record["status"] == "running" == ex.effective_status(record)
    parameters = json.loads((run.folder / "parameters.json").read_text())
    assert parameters["given"] == {"preset": "smoke", "seed": 5} and parameters["resolved"]["batch_size"] == ex.PRESETS["smoke"]["batch_size"]
    run.complete(**result())
    record = written(run)
    assert record["status"] == "complete" == ex.effective_status(record)
    assert record["data"]["name"] == "miniactions" and record["seed"] == 5 and record["schema"] == 1
    assert record["cost"]["seconds"] > 0 and record["cost"]["peak_memory_gib"] > 0.05
    assert "process" not in record and str(tmp_path) not in json.dumps([record, parameters])
    run.fail("too late")
    assert written(run)["status"] == "complete"


def change(path, value):
    block = result()
    here = block
    for key in path[:-1]:
        here[key] = dict(here[key])
        here = here[key]
    if value is None:
        del here[path[-1]]
    else:
        here[path[-1]] = value
    return block


@pytest.mark.parametrize("path, value, words", [
    (("top1", "oracle"), None, "top1.oracle is missing"), (("protocol",), None, "protocol is missing"), (("data", "generator"), None, "data.generator"),
    (("data", "gate"), {"expected": 3}, "data.gate.found is missing"), (("stages",), [], r"stages\[0\].name is missing"), (("cost", "gflops_per_view"), None, "gflops_per_view"),
    (("top1", "adaptive"), 93.0, "top1.adaptive = 93.0 is not a fraction"), (("top1_interval", "local"), [0.91, 1.0], "does not hold"),
    (("adaptive_minus_best_baseline",), [0.5, 0.0, 0.1], "estimate, low, high"), (("adaptive_minus_best_baseline",), [0.5], "estimate, low, high"),
    (("top5", "local"), float("nan"), "top5.local is nan"), (("top1",), 0.9, "not a table"), (("data", "name"), "ucf101", "generated data"),
])
def test_a_record_with_a_hole_is_not_complete(start, path, value, words):
    run = start()
    with pytest.raises(ex.RecordError, match=words):
        run.complete(**change(path, value))
    assert written(run)["status"] == "running"


def test_check_record_names_all_holes_at_once():
    with pytest.raises(ex.RecordError) as caught:
        ex.check_record({"top1": {}})
    assert all(words in str(caught.value) for words in ("seed is missing", "hardware is missing", "top1.local is missing"))


def test_an_exception_in_a_with_block_fails_the_run(start):
    with pytest.raises(ZeroDivisionError):
        with start() as run:
            1 / 0
    assert written(run)["status"] == "failed" and written(run)["reason"].startswith("ZeroDivisionError")
    with start() as run:
        assert written(run)["status"] == "running"
    assert written(run)["status"] == "failed" and "before run.complete()" in written(run)["reason"]


def test_a_second_run_in_the_process_ends_the_first(start):
    first, second = start(), start()
    assert written(first)["status"] == "failed" and "another run" in written(first)["reason"]
    assert written(second)["status"] == "running" and first.folder != second.folder


def test_stages_are_timed(start):
    run = start()
    with run.stage("warm-up", epochs=2) as stage:
        time.sleep(0.02)
        stage["flops"] = 7
    assert written(run)["stages"] == [{"name": "warm-up", "epochs": 2, "seconds": pytest.approx(0.02, abs=0.5), "flops": 7}] and run.stages[0]["seconds"] >= 0.02


def test_the_heartbeat_is_renewed_and_stops_with_the_run(start, tmp_path):
    run = ex.start("ucf101", {"preset": "smoke"}, settings=settings(tmp_path), heartbeat=0.02)
    run.record["heartbeat"] = "2000-01-01T00:00:00+00:00"
    time.sleep(0.3)
    assert written(run)["heartbeat"] > "2020"
    run.complete(**result())
    before = (run.folder / "result.json").stat().st_mtime_ns
    time.sleep(0.1)
    assert (run.folder / "result.json").stat().st_mtime_ns == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_worker_does_not_touch_the_record(start):
    run = start()
    child = os.fork()
    if child == 0:
        try:
            run.fail("from the worker")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert written(run)["status"] == "running"


# ---- what a reader concludes

def running(**process):
    here = {"pid": os.getpid(), "host": ex.socket.gethostname(), "started": ex.process_start(os.getpid())}
    return {"status": "running", "process": {**here, **process}, "heartbeat": "2026-01-01T00:00:00+00:00"}


def test_status_by_process_on_this_machine():
    assert ex.effective_status(running()) == "running"
    assert ex.effective_status(running(started="another time")) == "interrupted"      # the number was used again
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    time.sleep(0.3)      # a zombie until it is waited for
    assert ex.effective_status(running(pid=child.pid, started="x")) == "interrupted" and ex.process_start(child.pid) == ""
    child.wait()
    assert ex.effective_status(running(pid=child.pid, started="x")) == "interrupted"


def test_status_by_heartbeat_from_another_machine():
    record, begin = running(host="elsewhere"), 1767225600      # 2026-01-01
    assert ex.effective_status(record, now=begin + 60) == "running"
    assert ex.effective_status(record, now=begin + ex.STALE + 1) == "interrupted"


def test_a_stage_is_timed_while_it_runs_and_when_it_fails(start):
    run = start(heartbeat=0.05)
    with pytest.raises(ZeroDivisionError), run.stage("warm-up", epochs=3):
        time.sleep(0.4)
        (entry,) = written(run)["stages"]      # what a kill would leave
        assert entry["name"] == "warm-up" and 0.1 < entry["seconds"] <= 0.5
        1 / 0
    with run.stage("warm-up", epochs=3):      # begun again: both times count
        time.sleep(0.1)
    (entry,) = written(run)["stages"]
    assert 0.5 <= entry["seconds"] < 3 and entry["epochs"] == 3


SCRIPT = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from mbd import experiment
settings = SimpleNamespace(file=None, data={{}}, annotations={{}}, reports=Path({reports!r}), device="cpu", precision="float32", workers=0)
run = experiment.start("ucf101", {{"preset": "smoke"}}, settings=settings, heartbeat=0.05)
print("ready", flush=True)
{then}
"""


def script(tmp_path, then, before=""):
    code = before + SCRIPT.format(reports=str(tmp_path), then=then)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_kill_9_leaves_an_interrupted_run_and_the_next_one_a_folder_of_its_own(tmp_path, start):
    process = script(tmp_path, "time.sleep(60)")
    while "ready" not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()
    [record] = ex.read_runs(tmp_path)
    assert record["status"] == "running"
    process.kill()
    process.communicate()
    [record] = ex.read_runs(tmp_path)
    assert record["status"] == "interrupted" and json.loads((record["folder"] / "result.json").read_text())["status"] == "running"
    assert start().folder != record["folder"] and ex.comparable(ex.read_runs(tmp_path), generated=True) == []


def test_a_script_that_ends_early_has_failed(tmp_path):
    # the notebook's tools and the decoders are absent here: none of them is needed
    before = "import sys\nfor name in ('IPython', 'papermill', 'av', 'decord', 'nbdev'): sys.modules[name] = None\n"
    cases = {"raises": ("raise RuntimeError('no more memory')", "RuntimeError: no more memory"), "ends": ("", "ended before run.complete()")}
    processes = {name: script(tmp_path / name, then, before) for name, (then, _) in cases.items()}
    for name, process in processes.items():
        _, errors = process.communicate(timeout=60)
        [record] = ex.read_runs(tmp_path / name)
        assert record["status"] == "failed" and cases[name][1] in record["reason"], errors


def test_runs_are_listed_with_the_status_that_holds_and_compared_by_kind(start, tmp_path):
    start().complete(**result())
    with pytest.raises(RuntimeError), start():
        raise RuntimeError
    (tmp_path / "ucf101-generated" / "broken").mkdir()
    (tmp_path / "ucf101-generated" / "broken" / "result.json").write_text('{"status": "comp')
    (tmp_path / "report").mkdir(); (tmp_path / "report/result.json").write_text('{"kind": "analysis", "schema": 1}')      # no run
    runs = ex.read_runs(tmp_path)
    assert sorted(r["status"] for r in runs) == ["complete", "failed", "unreadable"]
    assert [r["folder"].name for r in ex.comparable(runs, generated=True)] == [r["folder"].name for r in runs if r["status"] == "complete"]
    assert ex.comparable(runs, generated=False) == [] and ex.read_runs(tmp_path / "nowhere") == []


def test_summary_says_what_the_numbers_come_from(start):
    words = ex.summary(start().complete(**result()))
    assert words.startswith("ucf101, GENERATED DATA, miniactions, split 1, 9 of 10 test videos")
    assert all(w in words for w in ("90.0  [80.0, 100.0]", "control (equal steps): adaptive 90.0", "protocol: 1 clip x 1 crop", "seed 0, commit"))


def test_a_run_without_a_control_has_a_summary(start):
    for control in (None, {"kind": "none"}): assert "control" not in ex.summary(start().complete(**result() | {"control": control}))


def test_runs_on_stored_features_ask_for_the_data_set_they_name(tmp_path):
    chosen, _, _ = ex.parameters_of("features", {"preset": "full", "dataset": "hmdb51", "local_store": "a", "global_store": "b", "features": "f"}, settings(tmp_path, data={"hmdb51": tmp_path}))
    assert (chosen.data, chosen.dataset) == ("real", "hmdb51")
    with pytest.raises(ex.ParameterError, match="no folder is configured for hmdb51"): ex.parameters_of("features", {"preset": "full", "dataset": "hmdb51"}, settings(tmp_path, data={"ucf101": tmp_path}))


@pytest.mark.parametrize("name,given,words", [("ucf101", dict(final_weight=0., intermediate_weight=0.), "nothing would be taught.*arm = none"), ("ucf101", dict(teach_warm_up=.7, teach_fade=.7), "teach_warm_up = 0.7 and teach_fade"),
                                              ("features", dict(batch_size=2), "raise batch_size, or set intermediate")])
def test_what_teaches_nothing_or_names_no_parameter_is_refused(tmp_path, name, given, words):
    with pytest.raises(ex.ParameterError, match=words): ex.parameters_of(name, {"preset": "smoke"} | given, settings(tmp_path))


def test_who_is_taught_nothing_needs_no_clips_to_compare(tmp_path):
    assert ex.parameters_of("ucf101", {"preset": "smoke", "arm": "none", "batch_size": 2}, settings(tmp_path))[0].batch_size == 2


def test_real_videos_are_read_from_their_files_unless_asked_otherwise_and_home_is_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path)), monkeypatch.setenv("USERPROFILE", str(tmp_path))
    of = lambda **given: ex.parameters_of("ucf101", {"preset": "mini"} | given, settings(tmp_path, data={"ucf101": tmp_path}))[0]
    assert [of(data=data).read for data in ("generated", "real")] == ["memory", "files"] and of(data="real", read="memory").read == "memory"
    assert of(reports="~/runs").reports == str(tmp_path / "runs")
    assert of(reports="").reports == of().reports != ""      # as in settings.ini: not the folder one happens to be in


# ---- a notebook under papermill

def execute(tmp_path, cells, parameters=None):
    nbformat, papermill = pytest.importorskip("nbformat"), pytest.importorskip("papermill")
    make = nbformat.v4
    first = make.new_code_cell(ex.parameters_cell("ucf101"), metadata={"tags": ["parameters"]})
    begin = make.new_code_cell("from mbd import experiment\nrun = experiment.start('ucf101', globals())")
    nb = make.new_notebook(cells=[first, begin, *map(make.new_code_cell, cells)])
    nb.metadata["kernelspec"] = {"display_name": "python3", "language": "python", "name": "python3"}
    nbformat.write(nb, tmp_path / "in.ipynb")
    given = {"preset": "smoke", "data": "generated", "reports": str(tmp_path / "reports"), **(parameters or {})}
    papermill.execute_notebook(str(tmp_path / "in.ipynb"), str(tmp_path / "out.ipynb"), parameters=given, progress_bar=False, cwd=str(tmp_path))


needs_kernel = pytest.mark.skipif(importlib.util.find_spec("ipykernel") is None or importlib.util.find_spec("papermill") is None, reason="needs papermill and ipykernel")


@needs_kernel
def test_a_misspelt_parameter_ends_the_notebook_at_its_first_cell(tmp_path):
    with pytest.raises(Exception) as caught:
        execute(tmp_path, ["open('went_on', 'w').close()"], {"epocs": 3})
    assert "unknown parameter 'epocs'" in str(caught.value) and "warm_up_epochs" in str(caught.value)
    assert not (tmp_path / "went_on").exists() and not (tmp_path / "reports").exists()


def test_an_exception_in_a_later_cell_fails_the_run(tmp_path, monkeypatch, capsys):
    interactiveshell = pytest.importorskip("IPython.core.interactiveshell")
    monkeypatch.setattr(ex, "_current", None)
    shell = interactiveshell.InteractiveShell.instance(colors="nocolor")

    def run(cell):
        shell.run_cell(cell, store_history=True)      # as a kernel does

    try:
        shell.user_ns["toy"] = settings(tmp_path)
        run("preset = 'smoke'\nseed = 2")
        run("from mbd import experiment\nrun = experiment.start('ucf101', globals(), settings=toy)")
        [record] = ex.read_runs(tmp_path)
        assert record["status"] == "running" and record["seed"] == 2
        run("raise IndexError('no such frame')")
        [record] = ex.read_runs(tmp_path)
        assert record["status"] == "failed" and record["reason"] == "IndexError: no such frame"
        run("epocs = 3\nseed = 2")
        run("run = experiment.start('ucf101', globals(), settings=toy)")
        printed = capsys.readouterr().out
        assert "ParameterError: unknown parameter 'epocs'" in printed and "Traceback" not in printed.partition("ParameterError")[2]
        assert len(ex.read_runs(tmp_path)) == 1
    finally:
        shell.events.unregister("post_run_cell", ex._after_cell)
        interactiveshell.InteractiveShell.clear_instance()


# ---- where it came from

def test_commit_is_that_of_the_code_or_unknown(tmp_path):
    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path), *words], check=True, capture_output=True)

    (tmp_path / "__init__.py").write_text("")
    assert ex.commit(tmp_path) == "unknown"
    git("init", "-q")
    assert ex.commit(tmp_path) == "unknown"      # in a repository, but not of it: an installed package
    git("add", ".")
    git("commit", "-q", "-m", "x")
    clean = ex.commit(tmp_path)
    assert len(clean) == 12 and int(clean, 16) >= 0
    (tmp_path / "__init__.py").write_text("x = 1")
    assert ex.commit(tmp_path) == clean + "-dirty"


# ---- progress

def lines(n, seconds, step):
    printed, clock = [], iter(np.arange(0, 10_000, step))
    show = ex.Progress("epoch 1", "batches", mode="lines", seconds=seconds, write=printed.append, clock=lambda: next(clock))
    for i in range(n):
        show.note(f"loss {i}")
        show(i + 1, n)
    return printed


def test_progress_writes_a_line_now_and_then_and_one_at_the_end():
    assert len(lines(1000, seconds=1e9, step=1.0)) == 1
    some = lines(100, seconds=50.0, step=1.0)
    assert 2 <= len(some) <= 4 and "left" in some[0] and some[-1].startswith("epoch 1: 100 of 100 batches") and some[-1].endswith("loss 99")


def test_progress_can_be_silent():
    show = ex.Progress("epoch 1", mode="none", write=pytest.fail)
    show(1, 1)
    assert show.bar is None


def test_progress_shows_a_bar_at_a_terminal(capfd):
    show = ex.Progress("epoch 1", mode="bar")
    for i in range(3):
        show(i + 1, 3)
    err = capfd.readouterr().err
    assert "epoch 1" in err and "3/3" in err


def test_the_environment_decides_how_progress_is_shown(monkeypatch):
    monkeypatch.setenv("MBD_PROGRESS", "none")
    assert ex.progress_mode() == "none"
    monkeypatch.setenv("MBD_PROGRESS", "")
    assert ex.progress_mode() in ("bar", "lines")


def test_times_in_words():
    assert [ex.seconds_in_words(s) for s in (0.4, 59.6, 3599.7, 7260)] == ["0 s", "1 min 0 s", "1 h 0 min", "2 h 1 min"]


def test_parts_count_missing_videos_those_a_check_left_out_and_those_that_fail_now():
    records = [SimpleNamespace(id=str(n), subset="train" if n < 15 else "test") for n in range(20)]
    lists = {"train": SimpleNamespace(expected=30, found=25, records=records[:15]), "test": SimpleNamespace(expected=5, found=5, records=records[15:])}
    counts = ex.count_parts({"fit": records[:12], "map": records[12:15], "test": records[15:]}, lists, {"3": "cut off"})
    assert counts == {"fit": {"expected": 24, "found": 20, "unreadable": 9}, "map": {"expected": 6, "found": 5, "unreadable": 2}, "test": {"expected": 5, "found": 5, "unreadable": 0}}
    assert sum(c["unreadable"] for n, c in counts.items() if n != "test") == 25 - 15 + 1
    halves = ex.count_parts({"fit": records[:15], "map": records[15:17], "gate": [], "test": records[17:]}, lists, {})      # map_on_val
    assert [halves[n]["expected"] for n in ("fit", "map", "gate", "test")] == [30, 2, 0, 3]
