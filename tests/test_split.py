"One training, split over two processes in different ways, is one training. Real processes, gloo, on a CPU."
from dataclasses import replace
import pytest, torch
from mbd import devices, training
from mbd.distillation import Distillation
from mbd.training import Training, fit_fusions, measure_map, predict, train
from test_training import TEACH, data, make, weights

SETTINGS = Training(epochs=7, batch_size=8, optimiser="sgd", learning_rate=.05, batch_norm="frozen")      # 21 steps


def numbers(module): return {n: v.double().flatten().tolist() for n, v in module.state_dict().items()}


def learn(settings, teach, double=True):
    "What every process does: [weights, rows, which process]."
    torch.manual_seed(0)
    model = make()
    if double: model.double()
    rows = train(model, data(), Training(**settings), "distil", teach and Distillation(**teach))
    return [numbers(model), rows, devices.processes()]


def plain(record): return {n: getattr(record, n) for n in record.__dataclass_fields__ if n != "mixing"}


def furthest(a, b): return max(abs(x - y) for n in a for x, y in zip(a[n], b[n], strict=True))


@pytest.mark.parametrize("teach", [TEACH, replace(TEACH, intermediate="hint", teacher="averaged")], ids=["relation", "hint"])
def test_two_processes_with_half_the_batch_take_the_steps_of_one(teach):
    "float64, SGD, frozen normalisation, 21 steps; the relations compare clips of both processes."
    one, first, _ = learn(plain(SETTINGS), plain(teach))
    two = devices.launch(learn, (plain(SETTINGS), plain(teach)), 2, "cpu")
    assert [tuple(found[2]) for found in two] == [(0, 2), (1, 2)]
    assert furthest(two[0][0], two[1][0]) == 0 and furthest(one, two[0][0]) < 1e-6 < furthest(one, numbers(make()))
    for a, b in zip(first, two[0][1], strict=True): assert all(a[n] == pytest.approx(b[n], abs=1e-6) for n in ("loss", "accuracy", "intermediate_to_local", "taught_global"))


@pytest.mark.slow
def test_relations_within_each_process_alone_would_differ(monkeypatch):
    "The control of the test above: without the gathering, the same comparison fails."
    two = devices.launch(_alone, (plain(SETTINGS), plain(replace(TEACH, intermediate_weight=20.))), 2, "cpu")
    assert furthest(learn(plain(SETTINGS), plain(replace(TEACH, intermediate_weight=20.)))[0], two[0][0]) > 1e-5


def _alone(settings, teach):
    training._everybodys = lambda rows: (rows, 0)
    return learn(settings, teach)


@pytest.mark.slow
def test_in_float32_the_losses_stay_together():
    "AdamW, batch statistics of each half: the same course, not the same digits."
    settings = plain(Training(epochs=7, batch_size=8, batch_norm="frozen"))
    (_, one, _), ((_, two, _), _) = learn(settings, plain(TEACH), False), devices.launch(learn, (settings, plain(TEACH), False), 2, "cpu")
    for a, b in zip(one, two, strict=True): assert a["loss"] == pytest.approx(b["loss"], rel=.01) and abs(a["accuracy"] - b["accuracy"]) < .05


def answer(clips, count):
    "Predictions, map and fusions of an untrained model: [ids, logits, map, slope, failures]."
    model, part = make(), data(False, clips=clips, count=count)
    answers = predict(model, part, 5)
    measure_map(model, part); fit_fusions(model, part, ["average"])
    return [answers.ids, answers.local.tolist(), answers.embeddings[1].tolist(), model.map.to_dict(), float(model.fusion.slope), model.temperature.tolist()]


@pytest.mark.parametrize("clips, count", [(3, 23)])
def test_each_video_is_answered_once_and_all_processes_know_all(clips, count):
    "23 videos do not divide by two."
    one, two = answer(clips, count), devices.launch(answer, (clips, count), 2, "cpu")
    assert two[0] == two[1] and two[0][0] == one[0] and len(set(one[0])) == count
    for a, b in zip(one[1:3] + one[5:], two[0][1:3] + two[0][5:], strict=True): assert torch.allclose(torch.tensor(a), torch.tensor(b), atol=1e-5)
    assert one[3]["n"] == two[0][3]["n"] and one[4] == pytest.approx(two[0][4], abs=1e-3) and one[3]["share"] == pytest.approx(two[0][3]["share"], abs=1e-4)


def answer_few(count):
    try: return len(answer(1, count)[0])
    except ValueError as error: return str(error)


def test_more_processes_than_videos_are_told_so_in_all_of_them():
    said = devices.launch(answer_few, (1,), 2, "cpu")
    assert said[0] == said[1] == "1 videos that could be read are too few for 2 processes, of which one had none to answer: start fewer"


def resume(settings, folder, stop, count=None):
    from mbd.checkpoints import Checkpoints
    model, data_ = make().double(), data() if count is None else data(count=count)
    def progress(done, steps):
        if done == stop: raise KeyError("stop")
    try: train(model, data_, Training(**settings), checkpoints=Checkpoints(folder, every=0), progress=progress)
    except KeyError: pass
    return numbers(model)


@pytest.mark.slow
def test_stopped_in_two_processes_it_goes_on_in_two_or_in_one(tmp_path):
    "Checkpoints of several processes are written at every tenth step."
    settings, whole = plain(SETTINGS), learn(plain(SETTINGS), None)[0]
    for name, processes in (("two", 2), ("one", 1)):
        devices.launch(resume, (settings, str(tmp_path/name), 14), 2, "cpu")
        steps = [f.name for f in (tmp_path/name).glob("*.safetensors")]
        assert steps and all("10" in s for s in steps)
        ended = devices.launch(resume, (settings, str(tmp_path/name), 0), 2, "cpu")[0] if processes == 2 else resume(settings, str(tmp_path/name), 0)
        assert furthest(whole, ended) < 1e-6


def test_a_checkpoint_at_the_end_of_an_epoch_is_gone_on_from(tmp_path):
    "40 videos, 8 a step: step 10 is the last of the second epoch, and nothing of it is left to do."
    settings = plain(replace(SETTINGS, epochs=3))
    devices.launch(resume, (settings, str(tmp_path/"cut"), 11, 40), 2, "cpu")
    assert any("step-10." in f.name for f in (tmp_path/"cut").glob("*.safetensors"))
    ended, whole = (devices.launch(resume, (settings, str(tmp_path/name), 0, 40), 2, "cpu")[0] for name in ("cut", "whole"))
    assert furthest(whole, ended) == 0


def apart(settings, folder):
    "Two machines, each with a folder of its own under the same name."
    from mbd.checkpoints import CheckpointError
    try: resume(settings, f"{folder}/{devices.processes()[0]}", 0)
    except CheckpointError as error: return str(error)


def test_processes_that_do_not_see_the_same_checkpoint_say_so(tmp_path):
    settings = plain(replace(SETTINGS, epochs=1))
    resume(settings, f"{tmp_path}/0", 2)
    said = devices.launch(apart, (settings, str(tmp_path)), 2, "cpu")
    assert said[0] == said[1] and "0: step 1, 1: none" in said[0] and "resume = False" in said[0]


def test_all_processes_end_with_the_same_statistics_too():
    two = devices.launch(learn, (plain(replace(SETTINGS, epochs=2, batch_norm="batch")), None), 2, "cpu")
    assert any("running" in n for n in two[0][0]) and furthest(two[0][0], two[1][0]) == 0


def test_of_several_processes_each_takes_its_own_device(monkeypatch):
    asked = []
    monkeypatch.setattr(devices, "processes", lambda: (0, 2))
    monkeypatch.setattr(devices, "accelerator", lambda device, precision: asked.append(device) or 1/0)
    with pytest.raises(ZeroDivisionError): training.Trainer(make(), 4, SETTINGS)
    assert asked == ["cpu"] and isinstance(asked[0], str)      # the kind alone: "cuda:0" would be one GPU for all
    with pytest.raises(ValueError, match="one clip each"): training.Trainer(make(), 4, replace(SETTINGS, accumulate=4))
