"A training that is stopped at any moment ends as if it had not been."
import json, os, random, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path
import pytest, torch
from mbd import training
from mbd.checkpoints import CheckpointError, Checkpoints
from mbd.distillation import Distillation
from mbd.recipes import Mixing
from mbd.training import Training, measure_map, predict, train
from test_training import TEACH, data, equal, make, weights

SMALL = Training(epochs=2, batch_size=8, learning_rate=1e-2)


class Stop(Exception): pass


def stop_at(step):
    def progress(done, steps):
        if done == step: raise Stop
    return progress


def begin(tmp_path, **more): return make(), data(), Checkpoints(tmp_path, every=0, **more)


@pytest.mark.parametrize("settings, teach", [
    (SMALL, None), (replace(SMALL, optimiser="sgd"), None), (replace(SMALL, average=.9), None), (replace(SMALL, mixing=Mixing(mixup=.4, cutmix=1.)), TEACH), (replace(SMALL, accumulate=2, layer_decay=.7), TEACH),
    (SMALL, replace(TEACH, teacher="averaged", teacher_decay=.8)), (SMALL, replace(TEACH, teacher="live")), (SMALL, replace(TEACH, intermediate="hint", warm_up=.5)), (SMALL, replace(TEACH, intermediate="logit", teacher="averaged"))])
def test_stopped_after_any_step_it_ends_with_the_same_weights_and_log(settings, teach, tmp_path):
    alone = make()
    rows = train(alone, data(), settings, "distil", teach)
    model, part, kept = begin(tmp_path)
    for step in (1, 3, 4):      # within an epoch, at its end, in the next; the first checkpoint is written after the second step
        model, part, kept = begin(tmp_path)
        with pytest.raises(Stop): train(model, part, settings, "distil", teach, progress=stop_at(step), checkpoints=kept)
    logged = []
    again, part, kept = begin(tmp_path)
    same = train(again, part, settings, "distil", teach, log=logged.append, checkpoints=kept)
    assert equal(weights(alone), weights(again)) and logged == same
    timeless = lambda rows: [{n: v for n, v in row.items() if n not in ("seconds", "waited")} for row in rows]
    assert timeless(same) == timeless(rows)


def test_a_stage_that_is_done_is_loaded_and_not_trained_again(tmp_path):
    model, part, kept = begin(tmp_path)
    rows = train(model, part, SMALL, checkpoints=kept)
    again, part, kept = begin(tmp_path)
    steps, logged = [], []
    assert train(again, part, SMALL, checkpoints=kept, progress=lambda *x: steps.append(x), log=logged.append) == rows == logged
    assert equal(weights(model), weights(again)) and not steps and not again.training


def test_what_several_gpus_have_trained_can_be_looked_at_without_them(tmp_path, monkeypatch):
    synced = replace(SMALL, batch_norm="synced")
    with monkeypatch.context() as there:
        there.setattr(training, "_synchronise", lambda *given: None)      # as if the GPUs were here
        model, part, kept = begin(tmp_path); rows = train(model, part, synced, checkpoints=kept)
        other, part, kept = begin(tmp_path)
        with pytest.raises(Stop): train(other, part, synced, "distil", progress=stop_at(3), checkpoints=kept)
    again, part, kept = begin(tmp_path)
    assert train(again, part, synced, checkpoints=kept) == rows and equal(weights(model), weights(again))
    with pytest.raises(ValueError, match="'synced' joins the statistics of several GPUs"): train(begin(tmp_path)[0], part, synced, "distil", checkpoints=kept)      # half done: it would go on otherwise


def test_a_checkpoint_brings_weights_back_and_leaves_map_and_temperatures_to_the_caller(tmp_path):
    model, part, kept = begin(tmp_path)
    train(model, part, SMALL, checkpoints=kept)
    again, part, kept = begin(tmp_path)
    again.temperature.fill_(3.); again.map = replace(again.map, share=again.map.share*.9)
    train(again, part, SMALL, checkpoints=kept)
    streams = lambda m: weights(m.local) | {f"global {n}": v for n, v in weights(m.global_).items()}
    assert equal(streams(model), streams(again)) and again.temperature.tolist() == [3., 3.] and torch.equal(again.map.share, make().map.share*.9)
    model, part, kept = begin(tmp_path)
    train(model, part, SMALL, "distil", TEACH, checkpoints=kept)
    other, part, kept = begin(tmp_path)
    other.temperature.fill_(3.)                      # its teachers would say something else
    with pytest.raises(CheckpointError, match="groups"): train(other, part, SMALL, "distil", TEACH, checkpoints=kept)


@pytest.mark.parametrize("change", [dict(settings=replace(SMALL, learning_rate=2e-2)), dict(seed=5), dict(teach=TEACH), dict(count=18)])
def test_a_checkpoint_of_another_training_is_refused(change, tmp_path):
    model, part, kept = begin(tmp_path)
    train(model, part, SMALL, checkpoints=kept)
    other, part = make(change.get("seed", 0)), data(count=change["count"]) if "count" in change else data()
    before = weights(other)
    with pytest.raises(CheckpointError, match="learning_rate|start|distillation|videos"): train(other, part, change.get("settings", SMALL), distillation=change.get("teach"), checkpoints=kept)
    assert equal(before, weights(other))


def test_a_new_limit_of_skipped_steps_is_no_other_training(tmp_path):
    model, part, kept = begin(tmp_path)
    with pytest.raises(Stop): train(model, part, SMALL, checkpoints=kept, progress=stop_at(4))
    again, part, kept = begin(tmp_path)
    assert train(again, part, replace(SMALL, max_skipped=50), checkpoints=kept)


def test_a_damaged_last_checkpoint_costs_a_step_and_no_more(tmp_path, caplog):
    alone = make(); train(alone, data(), SMALL)
    model, part, kept = begin(tmp_path)
    with pytest.raises(Stop): train(model, part, SMALL, checkpoints=kept, progress=stop_at(5))
    newest = max(tmp_path.glob("warm-up*.safetensors"), key=lambda f: f.name)
    newest.write_bytes(newest.read_bytes()[:-100])
    again, part, kept = begin(tmp_path)
    train(again, part, SMALL, checkpoints=kept)
    assert equal(weights(alone), weights(again)) and newest.name.split(".safetensors")[0] in caplog.text


def test_the_best_epoch_is_kept_beside_the_last(tmp_path):
    model, part, kept = begin(tmp_path)
    rows = train(model, part, Training(epochs=5, batch_size=8, learning_rate=3e-2), checkpoints=kept, validate=data(False))
    scores = [row["validation"] for row in rows if row["stream"] == "local"]
    assert len(scores) == 5 and all(0 <= s <= 1 for s in scores)
    best = kept.best("warm-up")
    assert best.score >= max(scores[:1]) and any(name.startswith("model.local.") for name in best.tensors)


def test_looking_at_the_validation_part_changes_no_weight():
    looked, plain = make(), make()
    train(looked, data(), SMALL, validate=data(False)); train(plain, data(), SMALL)
    assert equal(weights(looked), weights(plain))


def test_a_signal_saves_and_leaves(tmp_path):
    model, part, kept = begin(tmp_path)
    kept.every = 1e9
    def progress(done, steps):
        if done == 4: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(training.Stopped, match="step 4 of 6, which is saved"): train(model, part, SMALL, checkpoints=kept, progress=progress)
    alone, (again, part, kept) = make(), begin(tmp_path)
    train(alone, data(), SMALL); train(again, part, SMALL, checkpoints=kept)
    assert equal(weights(alone), weights(again))


def test_half_done_predictions_are_taken_up(tmp_path):
    model, part = make(), data(False, clips=2)
    whole = predict(model, part, 5)
    with pytest.raises(Stop): predict(model, data(False, clips=2), 5, checkpoints=Checkpoints(tmp_path, every=0), progress=stop_at(20), stage="test")
    read = []
    again = predict(model, data(False, clips=2), 5, checkpoints=Checkpoints(tmp_path, every=0), progress=lambda *x: read.append(x), stage="test")
    assert torch.equal(whole.local, again.local) and torch.equal(whole.global_, again.global_) and all(torch.equal(a, b) for a, b in zip(whole.embeddings, again.embeddings))
    assert len(read) == 7 and predict(model, data(False, clips=2), 5, checkpoints=Checkpoints(tmp_path), stage="test").ids == whole.ids
    model.local.head.bias.data += 1
    with pytest.raises(CheckpointError, match="start"): predict(model, data(False, clips=2), 5, checkpoints=Checkpoints(tmp_path), stage="test")


def test_stored_features_take_no_checkpoints(tmp_path):
    part = data(); part.batches = lambda *given: training.Batches(part, *given) if False else None
    class Other:
        records, train, seed = part.records, True, 0
        def __len__(self): return len(part)
    with pytest.raises(ValueError, match="takes no checkpoints"): train(make(), Other(), SMALL, checkpoints=Checkpoints(tmp_path))


# ---- real processes, killed by a signal that nothing can catch

COMMAND = ["train", "ucf101", *(word for name, value in dict(preset="smoke", data="generated", train_videos=60, test_videos=20, warm_up_epochs=3, distil_epochs=3, teacher="averaged", average=.9, checkpoint_minutes=0, workers=0, resamples=200).items() for word in ("-p", name, str(value)))]


def saved(folder): return {f.name for f in folder.glob("reports/*/*/checkpoints/stages/*.safetensors")}


def run(folder, saves=None, wait=0., limit=None):
    "Start the command. Kill it after `limit` seconds, or `wait` seconds after it has saved so many times. (Exit status, what it said, names of what it saved in order, seconds)."
    environ = {**os.environ, "MBD_REPORTS": str(folder/"reports"), "MBD_DATA_MINIACTIONS": str(folder.parent/"videos"), "MBD_PROGRESS": "none", "OMP_NUM_THREADS": "2", "MBD_DEVICE": "cpu"}
    seen, new, begun = saved(folder), [], time.monotonic()
    with open(folder/"said", "w+") as said:
        process = subprocess.Popen([sys.executable, "-m", "mbd.cli", *COMMAND], env=environ, stdout=subprocess.DEVNULL, stderr=said, cwd=folder)
        while process.poll() is None:
            new += sorted(saved(folder) - seen); seen |= set(new)
            enough = saves is not None and len(new) >= saves
            if enough: time.sleep(wait)
            if enough or (limit is not None and time.monotonic() - begun > limit): process.kill(); process.wait()
            time.sleep(.005)
        return process.returncode, Path(folder/"said").read_text(), new, time.monotonic() - begun


def outcomes(folder):
    "What all complete runs found: (weights, answers, map, log without times, top-1, sessions)."
    from safetensors.torch import load_file
    from mbd.experiment import load_predictions
    for path in sorted((folder/"reports").glob("*/*/result.json")):
        record, run = json.loads(path.read_text()), path.parent
        if record["status"] != "complete": continue      # killed before its first checkpoint, and so begun anew
        log = [line.split(",")[:5] for line in (run/"log.csv").read_text().splitlines()]
        yield load_file(str(next((run/"checkpoints"/"model").glob("*.safetensors")))), load_predictions(run/"predictions.npz"), (run/"dominance.csv").read_text(), log, record["top1"], record.get("sessions", [])


@pytest.mark.slow
def test_killed_at_ten_random_moments_a_run_ends_bit_for_bit_as_one_never_killed(tmp_path):
    (tmp_path/"whole").mkdir(); (tmp_path/"killed").mkdir()
    status, words, saves, seconds = run(tmp_path/"whole")
    assert status == 0, words
    rng, stages = random.Random(time.time_ns()), []
    places = [0, *sorted(rng.sample(range(1, len(saves)), 9))]
    moments = [dict(limit=rng.uniform(0, .3*seconds)), *(dict(saves=b - a, wait=rng.uniform(0, .5)) for a, b in zip(places, places[1:]))]      # one while it begins, nine over all stages
    while moments:
        status, words, new, _ = run(tmp_path/"killed", **moments[0])
        assert status in (-9, 0), words
        if status == -9: moments.pop(0); stages.append(new[-1].split(".safe")[0] if new else "nothing")      # else it was through before: another run begins
    status, words, *_ = run(tmp_path/"killed")
    assert status == 0, words
    (weights, answers, *rest, _), = outcomes(tmp_path/"whole")
    for killed_weights, killed_answers, *killed, _ in outcomes(tmp_path/"killed"):
        assert equal(weights, killed_weights) and killed == rest
        assert answers.keys() == killed_answers.keys() and all((answers[n] == killed_answers[n]).all() for n in answers)
    print(f"a whole run: {seconds:.0f} s, {len(saves)} checkpoints; killed ten times, after {', '.join(stages)}")
