"The steps of a run, without a notebook: a run is found again and goes on, and only what is asked for changes it."
import json, os, signal, subprocess, sys
from dataclasses import replace
from types import SimpleNamespace
import pytest, torch
from mbd import clips, compare, experiment, miniactions, training
from mbd.checkpoints import digest
from mbd.cli import main
from mbd.experiment import ParameterError
from mbd.schedule import Schedule
from mbd.settings import Settings

ASKED = dict(preset="smoke", train_videos=40, test_videos=20, resamples=200, checkpoint_minutes=0.)


@pytest.fixture(scope="module")
def videos(tmp_path_factory): return tmp_path_factory.mktemp("videos")


@pytest.fixture
def settings(tmp_path, videos): return Settings(data={"miniactions": videos}, reports=tmp_path/"reports")


def go(settings, **more): return Schedule(experiment.start("ucf101", ASKED | more, settings))


def test_a_run_begun_again_in_the_same_notebook_goes_on_and_remembers_its_memory(settings, monkeypatch, capsys):
    first = go(settings, seed=8, control=False).find().build().plan().read().warm_up()
    monkeypatch.setattr(experiment, "_peaks", lambda: {"peak_memory_gib": 99.})
    again = go(settings, seed=8, control=False)
    monkeypatch.setattr(experiment, "_peaks", lambda: {"peak_memory_gib": 1.})      # a new process has not trained
    assert again.run.folder == first.run.folder and "goes on" in capsys.readouterr().out
    record = again.carry_out()
    assert record["cost"]["peak_memory_gib"] == 99. and "peaks" not in record
    fit = record["data"]["fit"]["found"]
    assert record["stages"][[s["name"] for s in record["stages"]].index("warm-up")]["flops"] == experiment.training_flops(again.cost, fit//8*8)


@pytest.mark.parametrize("name", ["ssv2", "kinetics400"])
def test_a_split_that_is_not_there_is_refused_before_a_folder_is_made(settings, name, tmp_path):
    real = replace(settings, data={**settings.data, name: tmp_path})
    with pytest.raises(ParameterError, match=f"split = 2: {name} has one split only"): experiment.start(name, dict(preset="smoke", data="real", split=2), real)
    assert not settings.reports.exists()


def test_a_run_that_ended_early_goes_on_and_ends_as_if_it_had_not(settings, monkeypatch, capsys):
    whole = go(settings, seed=1, resume=False).carry_out()
    first = go(settings, seed=1, control=True)
    monkeypatch.setattr(Schedule, "fuse", lambda self: 1/0)
    with pytest.raises(ZeroDivisionError): first.carry_out()
    first.run.fail("a power cut")
    monkeypatch.undo()
    again = go(settings, seed=1)
    assert "which goes on: it was failed" in capsys.readouterr().out and again.run.folder == first.run.folder
    trained, inner = [], training._one_step      # of a stage; the plan tries steps of its own
    monkeypatch.setattr(training, "_one_step", lambda *given, **more: trained.append(1) or inner(*given, **more))
    record = again.carry_out()
    assert not trained and record["top1"] == whole["top1"] and record["sessions"][0]["reason"] == "a power cut"
    end = digest(again.model), digest(again.control)      # a cell run twice changes nothing
    assert again.warm_up() is again.distil() is again and again.record() is record and not trained and (digest(again.model), digest(again.control)) == end
    assert len((again.run.folder/"log.csv").read_text().splitlines()) == 1 + 3*2 and [s["name"] for s in record["stages"]].count("warm-up") == 1
    card = (again.run.folder/"checkpoints/model/README.md").read_text(encoding="utf-8")      # whoever gets the model knows what came out
    assert f"| adaptive | {100*record['top1']['adaptive']:.1f} |" in card and "generated figure videos" in card and f"test: expected {record['data']['test']['expected']}" in card
    other, log = (next(f for f in settings.reports.glob("*/*") if f != again.run.folder)/"log.csv"), again.run.folder/"log.csv"
    assert [line.split(",")[:5] for line in other.read_text().splitlines()] == [line.split(",")[:5] for line in log.read_text().splitlines()]


def test_a_step_before_the_one_it_needs_is_refused_by_name_and_does_nothing(settings):
    s = go(settings, seed=5)
    for step, needed in [("build", "find"), ("plan", "build"), ("read", "build"), ("warm_up", "read"), ("distil", "warm_up"), ("fuse", "distil"), ("result", "fuse"), ("record", "result")]:
        with pytest.raises(RuntimeError, match=rf"{step}\(\) needs what {needed}\(\) makes: call {needed}\(\) first \(taken so far: no step\)"): getattr(s, step)()
    s.find().build().read()
    for step in (s.distil, s.fuse):      # all that they touch is there: without the rule they would train, or read the test list
        with pytest.raises(RuntimeError, match="taken so far: find, build, read"): step()
    assert not list(s.run.checkpoints.glob("stages/*")) and s.model.map is None


@pytest.mark.parametrize("where, words", [("build", "stopped after the step"), ("map", "map-warm-up: stopped at batch 1")])
def test_a_signal_between_trainings_saves_and_leaves_too(settings, monkeypatch, where, words):
    run, build, inner = go(settings, seed=4), Schedule.build, training._room
    ask = lambda: os.kill(os.getpid(), signal.SIGTERM)
    if where == "build": monkeypatch.setattr(Schedule, "build", lambda self: ask() or build(self))
    else: monkeypatch.setattr(training, "_room", lambda *given: ask() or inner(*given))
    with pytest.raises(training.Stopped, match=words): run.carry_out()
    assert (where == "map") == any(run.run.checkpoints.glob("stages/map-warm-up.*"))


@pytest.mark.parametrize("change", [dict(seed=3), dict(smoothing=.1), dict(distil_epochs=2), dict(resume=False)])
def test_a_run_with_another_parameter_begins_anew(settings, change):
    first = go(settings, seed=2); first.find().build().read()
    (first.run.checkpoints/"stages"/"x").touch(); first.run.fail("stopped")
    assert go(settings, seed=2, workers=1, checkpoint_minutes=5., tensorboard=False).run.folder == first.run.folder
    experiment._current.fail("stopped")
    assert go(settings, **{"seed": 2} | change).run.folder != first.run.folder


@pytest.mark.parametrize("what, value, words", [("code", "0123456789abcdef", "the code of mbd has changed"), ("versions", {"torch": "9.9", "python": "3"}, "other versions: ")])
def test_a_run_of_other_code_or_versions_begins_anew_and_says_so(settings, monkeypatch, capsys, what, value, words):
    first = go(settings); (first.run.checkpoints/"x").touch(); first.run.fail("stopped")
    with monkeypatch.context() as now:
        now.setattr(experiment, what, lambda: value)
        assert go(settings).run.folder != first.run.folder
    said = capsys.readouterr().out
    assert f"passed over: {first.run.folder.name} is failed" in said and words in said
    experiment._current.fail("stopped")
    monkeypatch.setattr(experiment, "commit", lambda: "0123456789ab")      # a commit that changes no module, such as one of the README
    assert go(settings).run.folder == first.run.folder


def test_a_job_that_the_queue_starts_again_on_another_machine_goes_on(settings, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    first = go(settings); (first.run.checkpoints/"x").touch()
    monkeypatch.setattr(experiment, "_current", None)      # killed there, not ended here
    monkeypatch.setattr(experiment.socket, "gethostname", lambda: "the next machine")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert go(settings).run.folder == first.run.folder      # its heartbeat is seconds old
    assert "goes on: it was interrupted" in capsys.readouterr().out
    monkeypatch.setattr(experiment, "_current", None)
    monkeypatch.setenv("SLURM_JOB_ID", "78")                # another job, and process, leaves it alone, and says why
    with pytest.raises(ParameterError, match="is running with the same parameters: process"): go(settings)


def test_seconds_and_clips_of_a_killed_session_count(settings, monkeypatch):
    whole = go(settings, seed=6); monkeypatch.setattr(Schedule, "distil", lambda self: 1/0)
    with pytest.raises(ZeroDivisionError): whole.carry_out()
    whole.run.fail("stopped"); monkeypatch.undo()
    before = {s["name"]: s["seconds"] for s in json.loads((whole.run.folder/"result.json").read_text())["stages"]}
    again = go(settings, seed=6); record = again.carry_out()
    after, epochs = {s["name"]: s["seconds"] for s in record["stages"]}, [r for r in again.rows if r["stream"] == "local"]
    assert again.run.folder == whole.run.folder and after["warm-up"] >= before["warm-up"] > 0
    assert record["cost"]["train_clips_per_second"] == pytest.approx(len(epochs)*(len(again.data["fit"])//again.p.batch_size*again.p.batch_size)/sum(r["seconds"] for r in epochs)) and {r["stage"] for r in epochs} == {"warm-up", "distil", "control"}


def test_a_running_run_is_not_taken_over(settings):
    script = f"from mbd import experiment, settings; from pathlib import Path\nrun = experiment.start('ucf101', {ASKED!r}, settings.Settings(data={{'miniactions': Path('x')}}, reports=Path({str(settings.reports)!r})))\n(run.checkpoints/'x').touch(); print('ready', flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        while "ready" not in child.stdout.readline(): assert child.poll() is None
        (theirs,) = settings.reports.glob("*/*")
        with pytest.raises(ParameterError, match=rf"{theirs.name} is running with the same parameters: process {child.pid} of .*resume = False"): go(settings)
        assert [theirs] == list(settings.reports.glob("*/*")) and go(settings, resume=False).run.folder != theirs
    finally: child.kill(); child.wait()
    experiment._current.fail("stopped")
    assert experiment.unfinished(theirs.parent, experiment.resolve(experiment.check_parameters(ASKED, "ucf101"), "ucf101", settings)[0])[0] is not None


@pytest.mark.parametrize("saved", [True, False])
def test_a_run_alive_on_another_machine_is_neither_taken_over_nor_begun_anew(settings, saved):
    first = experiment.start("ucf101", ASKED | dict(seed=7), settings); first.fail("stopped")
    if saved: (first.checkpoints/"x").touch()
    file = first.folder/"result.json"
    alive = json.loads(file.read_text()) | {"status": "running"}; alive["process"]["host"] = "another machine"
    file.write_text(json.dumps(alive | {"heartbeat": experiment._now()}))
    with pytest.raises(ParameterError, match=f"{first.folder.name} is running .*another machine.*5 minutes.*resume = False"): go(settings, seed=7)
    assert [first.folder] == list(settings.reports.glob("*/*")) and json.loads(file.read_text())["status"] == "running"
    file.write_text(json.dumps(alive | {"heartbeat": "2026-01-01T00:00:00+00:00"}))      # nobody is left there
    assert (go(settings, seed=7).run.folder == first.folder) == saved


def test_synced_statistics_without_several_gpus_are_refused_before_a_folder_is_made(settings, monkeypatch):
    with pytest.raises(ParameterError, match="batch_norm = 'synced' joins the statistics of several GPUs, and here 1 process.* compute on cpu"): go(settings, batch_norm="synced")
    assert not settings.reports.exists()
    with monkeypatch.context() as gpus:
        gpus.setattr(experiment, "_synchronise", lambda *given: None)
        first = go(settings, batch_norm="synced"); (first.run.checkpoints/"x").touch(); first.run.fail("stopped")
    assert go(settings, batch_norm="synced").run.folder == first.run.folder      # what several GPUs have trained may be looked at


def test_one_broken_video_in_a_small_part_is_one_of_all_videos_of_the_run(settings, tmp_path):
    folder = miniactions.generate(tmp_path/"set", classes=miniactions.CLASSES[:4], train_groups=8, test_groups=3, clips=1)
    s = Schedule(experiment.start("ucf101", ASKED | dict(data="real", train_videos=0, test_videos=0, max_failures=.03), replace(settings, data={"ucf101": folder})))
    s.find().build().read()
    assert len(s.records) == 44 and len(s.parts["gate"]) < 10 and s.p.read == "files"
    s.parts["gate"][0].path.write_bytes(b"no video at all")
    list(clips.batches(s.data["gate"], 4))
    assert {name: c["unreadable"] for name, c in s.counts().items()} == {"fit": 0, "map": 0, "gate": 1, "test": 0}
    s.parts["test"][0].path.write_bytes(b"no video at all")
    with pytest.raises(RuntimeError, match="2 of 44 videos could not be read, and max_failures = 0.03 allows 1"): list(clips.batches(s._data(s.parts["test"]), 4))


def test_the_recipe_of_a_run_is_that_of_its_stages(settings):
    p = experiment.start("ucf101", ASKED | dict(optimiser="sgd", mixup=.2, average=.9, accumulate=2, rate_warm_up=.3), settings).parameters
    made = experiment.recipe(p, epochs=3, learning_rate=.1, seed=4)
    assert (made.optimiser, made.mixing.mixup, made.average, made.accumulate, made.warm_up, made.epochs, made.batch_size) == ("sgd", .2, .9, 2, .3, 3, 8)
    fields = set(training.Training.__dataclass_fields__) - {"epochs", "seed", "mixing", "warm_up", "clip_norm"}
    assert fields <= set(vars(p))      # every other field is a parameter of the same name
    with pytest.raises(ParameterError, match="optimiser"): experiment.start("ucf101", ASKED | dict(optimiser="adam"), settings)


def test_parts_cannot_be_computed_again_where_a_stream_cannot(settings):
    with pytest.raises(ParameterError, match="checkpointing = True, but hand_cnn cannot"): go(settings, checkpointing=True).find().build()


def test_the_log_for_tensorboard_holds_the_lines_of_the_log(settings):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    run = experiment.start("ucf101", ASKED | {"tensorboard": True}, settings)
    for epoch in (1, 2): run.log(stage="warm-up", epoch=epoch, stream="local", loss=1/epoch, accuracy=.5)
    run.board.flush()
    events = EventAccumulator(str(run.folder/"tensorboard")); events.Reload()
    assert [(e.step, round(e.value, 3)) for e in events.Scalars("warm-up/loss/local")] == [(1, 1.), (2, .5)]


def test_the_command_trains_and_its_mistakes_are_one_line(tmp_path, videos, monkeypatch, capsys):
    monkeypatch.setenv("MBD_REPORTS", str(tmp_path/"reports")); monkeypatch.setenv("MBD_DATA_MINIACTIONS", str(videos)); monkeypatch.setenv("MBD_PROGRESS", "none"); monkeypatch.setenv("MBD_DEVICE", "cpu")
    words = ["train", "ucf101", *(w for n, v in ASKED.items() for w in ("-p", n, str(v)))]
    assert main([*words, "-p", "control", "False", "-p", "data", "generated"]) == 0
    (file,) = (tmp_path/"reports").glob("*/*/result.json")
    record, first = json.loads(file.read_text()), capsys.readouterr().out
    assert record["status"] == "complete" and record["processes"] == 1 and record["skipped_steps"] == 0 and record["notebook"] is False and record["control"] is None
    assert [s["name"] for s in record["stages"]] == ["generate", "decode", "warm-up", "map", "distil", "fuse and test"] and all(s["seconds"] >= 0 for s in record["stages"])
    assert all(0 <= part <= 1 for part in record["lessons"]["taught"].values()) and all(t > 0 for t in record["lessons"]["temperature"].values()) and list(record["lessons"]["taught"]) == ["local", "global"]
    assert record["data"]["test"] == {"expected": 20, "found": 20, "unreadable": 0} and record["data"]["layout"] == "ucf101" and {"rank_correlation", "wrong_side", "by_kind"} == set(record["construction"])
    assert {"dominance.csv", "log.csv", "parameters.json", "predictions.npz", "result.json"} <= {f.name for f in file.parent.iterdir()}
    assert "adaptive minus best baseline" in first and "goes on" not in first
    settings = Settings(data={"miniactions": videos}, reports=tmp_path/"reports")
    with monkeypatch.context() as looking:      # a notebook opens it to draw its figures, and one of them fails
        looking.setattr(experiment, "_shell", lambda: SimpleNamespace(events=SimpleNamespace(register=lambda *given: None)))
        looked = go(settings, control=False).run
        assert looked.folder == file.parent and looked.status == "running"
        assert json.loads(file.read_text()) == record      # killed here, it is still what it was
        looked.fail("a figure could not be drawn")
        assert json.loads(file.read_text()) == record
        looking.setattr(experiment, "hardware", lambda: "the notebook's machine")
        drawn = go(settings, control=False).carry_out()      # to its end: now it has been looked at; all else is of those who trained it
        assert drawn == json.loads(file.read_text()) == record | {"notebook": True}
    assert go(settings, control=False).run.folder != file.parent      # a complete run is left alone
    assert main([*words, "-p", "epocs", "3"]) == 2
    with pytest.raises(SystemExit, match="2"): main(["train", "ucf102"])
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "warm_up_epochs" in said[0] and "ucf101" in said[1]


@pytest.mark.slow
def test_accelerate_launches_the_command_in_two_processes(tmp_path, videos):
    environ = {**os.environ, "MBD_REPORTS": str(tmp_path/"reports"), "MBD_DATA_MINIACTIONS": str(videos), "MBD_PROGRESS": "lines", "OMP_NUM_THREADS": "1", "MBD_DEVICE": "cpu"}
    words = [w for n, v in (ASKED | dict(data="generated", checkpoint_minutes=10., train_videos=60)).items() for w in ("-p", n, str(v))]
    done = subprocess.run([sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "mbd.cli", "train", "ucf101", *words],
                          env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (record,) = (tmp_path/"reports").glob("*/*/result.json")
    record = json.loads(record.read_text())
    assert record["status"] == "complete" and record["processes"] == 2 and record["data"]["test"]["found"] == 20
    assert done.stdout.count("run folder:") == 1 and done.stdout.count("warm-up: 5 of 5 steps") == 1      # one of them speaks


LABELS = dict(preset="smoke", train_videos=60, test_videos=20, resamples=200, checkpoint_minutes=0., labelled=4, arm="both", sure_above=.1, max_failures=.1)


def test_videos_beyond_the_labelled_ones_are_taught_without_their_label(settings, monkeypatch):
    seen, inner, load = {}, training._one_step, clips.load_frames
    def step(trainer, place, read, data, stage):
        seen.setdefault(stage, []).extend(y for piece in read for y in piece["label"].tolist())
        return inner(trainer, place, read, data, stage)
    def broken(records, **more):      # the first training video turns out unreadable: it may stand in the two lists a different number of times
        frames, unreadable = load(records, **more)
        bad = s.parts["fit"][0].id; frames.pop(bad)
        return frames, unreadable | {bad: "cut off"}
    monkeypatch.setattr(training, "_one_step", step); monkeypatch.setattr(clips, "load_frames", broken)
    s = Schedule(experiment.start("ucf101", LABELS, settings))
    record, counts = s.carry_out(), s.counts()
    assert record["data"]["labelled"] == 4 and record["data"]["left_out"] + sum(len(s.parts[n]) for n in s.parts if n != "test") == 60 and sum(len(s.parts[n]) for n in ("fit", "map", "gate")) == 40
    assert counts["unlabelled"]["found"] == len(s.parts["unlabelled"]) > 0 and counts["fit"]["unreadable"] == 1
    assert {r.label for r in s.parts["unlabelled"]} == {-1} and not {r.source for r in s.parts["unlabelled"]} & {r.source for part in ("map", "gate") for r in s.parts[part]}
    assert -1 not in seen["warm-up"] + seen["control"] and -1 in seen["distil"] and len(seen["distil"]) == len(seen["control"]) > len(seen["warm-up"])
    assert max(record["lessons"]["taught"].values()) > 0      # of ten classes the first choice has a tenth at least: nobody is too unsure to speak
    flops = {stage["name"]: stage["flops"] for stage in record["stages"]}
    assert flops["control"] > flops["warm-up"]      # the list is longer than the labelled part
    assert "4 labels a class" in experiment.summary(record) and record["control"]["kind"] == "equal steps, labelled videos only"
    assert "smoke, 4 labels a class" in compare.tables([record | {"folder": s.run.folder}], [])


def test_without_teaching_videos_without_a_label_are_not_read(settings):
    s = Schedule(experiment.start("ucf101", LABELS | dict(arm="none"), settings)); s.find().build().read()
    assert training.lessons([{"stage": "distil", "stream": "local"}], (1., 1.)) is None      # nothing was to be taught
    assert "unlabelled" not in s.parts and len(s.frames) == 40 + 20 and s._clips("distil") is s._clips("control") is s.data["fit"]


def test_labels_are_spread_over_scenes_and_depend_on_the_seed():
    from mbd.datasets import Record
    from mbd.schedule import _labelled
    train = [Record(f"{c}{s}{n}", None, c, f"scene {c}{s}", "train") for c in range(3) for s in range(6) for n in range(4)]
    kept, others = _labelled(train, 5, seed=1)
    assert sorted(r.label for r in kept) == [0]*5 + [1]*5 + [2]*5 and len({r.source for r in kept}) == 15 and len(kept) + len(others) == len(train)
    assert {r.id for r in kept} != {r.id for r in _labelled(train, 5, seed=2)[0]} and kept == _labelled(train, 5, seed=1)[0]
    short = [r for r in train if r.label or r.source == "scene 00"]      # four videos of class 0 are all there are
    assert sum(r.label == 0 for r in _labelled(short, 5, seed=1)[0]) == 4


@pytest.mark.parametrize("asked, words", [(dict(mixup=.2), "mixup needs the label"), (dict(cutmix=.2), "cutmix needs the label"), (dict(final="decoupled"), "final = decoupled needs the label")])
def test_what_needs_every_label_is_refused_before_there_is_a_folder(settings, asked, words):
    with pytest.raises(ParameterError, match=f"labelled = 4: {words}"): experiment.start("ucf101", LABELS | asked, settings)
    assert not list(settings.reports.rglob("*")) and experiment.start("ucf101", LABELS | dict(mixup=.2, arm="none"), settings).parameters.labelled == 4


@pytest.mark.parametrize("labelled, words", [(2, r"labelled = 2: class 0 has 2 source\(s\).*; raise labelled"), (500, "labelled = 500 leaves no video without a label")])
def test_too_few_or_too_many_labels_are_refused_in_words(settings, labelled, words):
    with pytest.raises(ParameterError, match=words): Schedule(experiment.start("ucf101", LABELS | dict(labelled=labelled), settings)).find()


def test_labels_of_the_validation_list_are_not_passed_over_in_silence(settings):
    with pytest.raises(ParameterError, match="labelled = 4: with map_on_val"): experiment.start("kinetics400", LABELS | dict(test_videos=120), settings)
    assert experiment.start("kinetics400", LABELS | dict(test_videos=120, map_on_val=False), settings).parameters.labelled == 4


def test_all_frames_stay_in_memory(settings, tmp_path):
    s = go(settings, seed=6).find().build()
    id, record = next(iter(s.records.items()))
    longer = miniactions.generate(tmp_path/"longer", train_groups=1, test_groups=1, clips=1, classes=("SameHand", "OtherHand"), frames=48)
    s.records[id] = replace(record, path=next(longer.rglob("*.mp4")))
    assert len(s.plan().read().frames[id]) == 48              # thinned out, a view with a stride would see another speed than the record says


def test_where_the_fusion_teaches_it_is_the_fitted_one(settings, monkeypatch):
    taught, inner = [], training.train
    def train(model, *given, **more):
        if given[2] == "distil": taught.append(type(model.fusion).__name__)
        return inner(model, *given, **more)
    monkeypatch.setattr(training, "train", train)
    s = go(settings, seed=7, lesson="fused", arm="both", intermediate_weight=0., control=False).find().build().plan().read().warm_up().distil()
    assert taught == ["AdaptiveFusion"]


def test_too_few_videos_for_three_parts_name_the_parameter(settings, monkeypatch):
    from mbd import schedule
    monkeypatch.setattr(schedule.experiment, "subset", lambda records, *given: [r for r in records if r.source == records[0].source] + records[-2:])
    with pytest.raises(ParameterError, match="train_videos = 40: of 10 classes.*3 parts need.*set 0 for all"): go(settings, seed=8).find()
