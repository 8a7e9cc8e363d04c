"What a run will take: counted as training counts, tried without a trace, and refused where it cannot fit."
import os, subprocess, sys
from pathlib import Path
from types import SimpleNamespace
import pytest, torch
from mbd import datasets, experiment, miniactions, plan
from mbd.experiment import ParameterError
from mbd.schedule import Schedule
from mbd.settings import Settings


@pytest.fixture(scope="module")
def videos(tmp_path_factory): return tmp_path_factory.mktemp("videos")


@pytest.fixture
def schedule(tmp_path, videos):
    def begin(name="ucf101", **more):
        asked = dict(preset="smoke", train_videos=40, test_videos=20, resamples=200) | more
        return Schedule(experiment.start(name, asked, Settings(data={"miniactions": videos}, reports=tmp_path/"reports"))).find().build()
    return begin


def test_the_steps_are_those_that_are_taken(schedule):
    s = schedule(distil_epochs=2, warm_up_epochs=3)
    steps = s.plan().planned.steps
    record = s.read().warm_up().distil().fuse() and s.result() and s.record()
    rows = (s.run.folder/"log.csv").read_text().splitlines()
    assert steps["warm-up"] == 3*(len(s.parts["fit"])//8) and steps["distil"] == steps["control"] == 2*(len(s.parts["fit"])//8)
    assert len(rows) == 1 + 2*(3 + 2 + 2) and record["plan"]["seconds"] > 0 and record["plan"]["memory_gib"] > 0


@pytest.mark.parametrize("more", [dict(), dict(protocol="2x3", also="1x3", control=False), dict(validate=True, lesson="fused", intermediate_weight=0.)])
def test_the_clips_are_those_that_are_answered(schedule, monkeypatch, more):
    from mbd import training
    s, answered, inner = schedule(**more), [], training.predict
    planned = s.plan().planned.views
    monkeypatch.setattr(training, "predict", lambda model, data, *given, **rest: answered.append(len(data)) or inner(model, data, *given, **rest))
    s.read().warm_up().distil().fuse()
    assert sum(answered) == planned


def test_trying_leaves_weights_and_random_numbers_as_they_were(schedule):
    s = schedule()
    before, state = {n: v.clone() for n, v in s.model.state_dict().items()}, torch.get_rng_state()
    s.plan()
    assert all(torch.equal(v, before[n]) for n, v in s.model.state_dict().items()) and torch.equal(state, torch.get_rng_state())


def test_a_batch_beyond_memory_is_refused_before_it_is_tried(schedule, monkeypatch):
    monkeypatch.setattr(plan, "free_memory", lambda device: 150*2**20)
    tried = []
    monkeypatch.setattr(plan, "try_step", lambda *given: tried.append(given) or (.1, 0))
    with pytest.raises(ParameterError, match="batch_size = 512: a step would take about .* of memory are free; lower batch_size, raise accumulate.*checkpointing"): schedule(batch_size=512).plan()
    assert not tried
    made = schedule(batch_size=512, accumulate=128).plan().planned
    assert len(tried) == 1 and made.memory > made.frames      # what the system does not say is counted


def test_what_a_step_takes_is_about_what_was_counted():
    "In a process of its own, after a small step: the first one also loads libraries, and a process takes memory that it has given back only to itself."
    code = """if True:
        from mbd import pairs, plan, speed, training
        model = speed.random_model(pairs.find_pair("miniactions"))
        plan.try_step(model, training.Training(batch_size=2), 2)
        print(64*plan.kept_bytes(model), plan.try_step(model, training.Training(batch_size=64), 64)[1])"""
    counted, measured = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}).stdout.split()
    assert measured == "None" or float(counted)/2 < float(measured) < 3*float(counted), (counted, measured)


def test_a_gpu_that_is_too_small_is_named(schedule, monkeypatch):
    def full(*given): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    monkeypatch.setattr(plan, "try_step", full); monkeypatch.setattr(plan, "free_memory", lambda device: None)
    with pytest.raises(ParameterError, match="batch_size = 8: a step does not fit into the memory of cpu.*lower batch_size"): schedule().plan()


def test_videos_that_memory_cannot_hold_are_refused(schedule):
    s = schedule()
    with pytest.raises(ParameterError, match="read = 'memory': the decoded videos would take about .* set read = 'files'"):
        plan.make_plan(s.parts, s.model, s.p, s.run.folder, s._kept(), limit=1e-4)


def test_a_disk_that_is_too_small_is_refused(schedule, monkeypatch):
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**6))
    with pytest.raises(ParameterError, match="reports: checkpoints and answers may take .* and 0.954 MiB are free"): schedule().plan()


def test_the_disk_holds_what_the_plan_said(schedule):
    s = schedule(checkpoint_minutes=0.)
    s.plan().read().warm_up().distil()
    written = sum(f.stat().st_size for f in s.run.checkpoints.rglob("*") if f.is_file())
    assert 0 < written <= s.planned.disk


def test_the_answers_to_a_large_test_list_are_counted_too(schedule):
    s = schedule()
    needed = lambda **more: plan._disk_needed(s.model, s.p, plan.count_views({"fit": 8, "map": 4, "gate": 4, "test": 20_000}, SimpleNamespace(**vars(s.p) | more)))
    assert needed(protocol="10x3") - needed(protocol="1x1") == 8*len(s.classes)*29*((20_000 + 4)*2 + 4*3)      # the control answers too, and a map is measured three times


def test_unreadable_videos_do_not_stop_the_plan(schedule):
    s = schedule()
    broken = [r._replace(path=s.run.folder/"result.json") if hasattr(r, "_replace") else datasets.Record(r.id, s.run.folder/"result.json", r.label, r.source, r.subset) for r in s.parts["fit"]]
    made = plan.make_plan(s.parts | {"fit": broken}, s.model, s.p, s.run.folder, s._kept())
    assert made.frames == 0 and made.seconds > 0


def test_memory_of_a_container_counts_what_its_cache_gives_back(tmp_path, monkeypatch):
    from pathlib import Path
    for name, text in (("memory.max", "1000000"), ("memory.current", "900000"), ("memory.stat", "anon 5\ninactive_file 300000\n")): (tmp_path/name).write_text(text)
    monkeypatch.setattr(plan, "Path", lambda path: tmp_path if path == "/sys/fs/cgroup" else Path(path))
    assert plan.free_memory("cpu") == 400000
    (tmp_path/"memory.max").write_text("max")
    assert plan.free_memory("cpu") is None or plan.free_memory("cpu") > 400000
