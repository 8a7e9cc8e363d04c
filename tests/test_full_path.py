"The full recipe of each benchmark on a handful of videos in its layout, real clips where there are some: one epoch, the protocol's own views, the whole record."
import itertools, os, shutil
from pathlib import Path
import pytest, torch
from mbd import datasets, experiment, miniactions, pairs, video
from mbd.experiment import ParameterError
from mbd.schedule import Schedule
from mbd.settings import Settings

ROOT = Path(__file__).parents[1]
CLIPS = ROOT/os.environ.get("MBD_REALDATA", "absent")/"clips"
CLASSES = miniactions.CLASSES[:2]
PROTOCOLS = {"ucf101": ((5, 3), None), "hmdb51": ((5, 3), None), "kinetics400": ((10, 3), "5x3"), "ssv2": ((2, 3), "1x3")}
FITS = {"kinetics400": dict(train_groups=2, test_groups=4)}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    "Files of random weights, in torchvision's form: {backbone: path}."
    from torchvision.models import video as models
    folder, made = tmp_path_factory.mktemp("weights"), {}
    def save(name):
        if name not in made:
            torch.manual_seed(0)
            made[name] = folder/f"{name}.pth"
            torch.save(getattr(models, name)(weights=None).state_dict(), made[name])
        return str(made[name])
    return save


@pytest.fixture
def benchmark(tmp_path, monkeypatch):
    "A benchmark's folder with its lists and a few videos: real clips under the list's names, if there are any; and nothing may be fetched."
    def never(*given, **more): raise AssertionError(f"something is downloaded: {given}")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", never)
    def make(name):
        folder = miniactions.generate(tmp_path/name, name, classes=CLASSES, clips=1, **FITS.get(name, dict(train_groups=4, test_groups=1)))
        real = sorted((p for p in CLIPS.rglob("*") if p.is_file() and p.suffix in (".avi", ".mp4", ".mkv", ".webm") and p.parent.name != "arm wrestling"), key=lambda p: p.stat().st_size)[:8]
        lists = [datasets.load(name, folder, 1, subset) for subset in datasets.READERS[name][2][:2]]
        for record, clip in zip(itertools.chain(*(d.records for d in lists)), itertools.cycle(real)): record.path.unlink(); shutil.copyfile(clip, record.path)
        return Settings(data={name: folder}, reports=tmp_path/"reports"), lists
    return make


SMALL = dict(preset="full", data="real", warm_up_epochs=1, distil_epochs=1, batch_size=4, accumulate=1, resamples=100, control=False, device="cpu", precision="float32", workers=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_full_recipe_goes_all_the_way(benchmark, weights, name):
    settings, (train, test) = benchmark(name)
    pair = pairs.find_pair(name, "less_unequal" if name == "ssv2" else None)      # the default one takes no smaller clips
    files = dict(local_weights=weights(pair.local.backbone), global_weights=weights(pair.global_.backbone))
    run = experiment.start(name, SMALL | files | dict(frames=4, size=32, pair=pair.name), settings)
    s = Schedule(run)
    record = s.carry_out()
    assert record["status"] == "complete" and record["data"]["name"] == name and run.parameters.pair == pair.name and run.parameters.read == "files"
    (clips, crops), also = PROTOCOLS[name]
    assert (record["protocol"]["clips"], record["protocol"]["crops"]) == (clips, crops) and list(record.get("also", {})) == ([also] if also else [])
    assert s.end.answers.local.shape == s.end.answers.global_.shape == (len(s.parts["test"]), clips*crops, 2) and str(clips) in record["by_clips"]
    counts = {n: record["data"][n] for n in ("fit", "map", "gate", "test")}
    assert all(c["expected"] == c["found"] > 0 == c["unreadable"] for c in counts.values()), counts
    assert sum(c["found"] for c in counts.values()) == train.expected + test.expected
    assert {r.subset for r in s.parts["map"] + s.parts["gate"]} == ({"validation"} if name == "kinetics400" else {"train"}) and record["data"]["map_on_val"] == (name == "kinetics400")
    assert set(s.model.local.seen) == {"kinetics400/train"} <= set(s.model.global_.seen)
    assert s.data["fit"].flip == s.lists["train"].directional      # mirrored classes that name a side would be others
    assert record["plan"]["seconds"] > 0 and set(record["order"]) == {"original", "shuffled", "reversed"}


def test_kinetics_weights_and_a_map_on_the_training_list_are_refused_before_anything_runs(benchmark):
    settings, _ = benchmark("kinetics400")
    with pytest.raises(ParameterError, match="map_on_val = False.*have seen the training list"): experiment.start("kinetics400", SMALL | dict(map_on_val=False), settings)
    assert not settings.reports.exists()


def test_a_network_of_one_size_refuses_another_by_the_name_of_the_parameter(benchmark, weights):
    settings, _ = benchmark("ssv2")
    files = dict(local_weights=weights("r2plus1d_18"), global_weights=weights("mvit_v2_s"))
    with experiment.start("ssv2", SMALL | files | dict(frames=8, size=56), settings) as run, pytest.raises(ParameterError, match="frames = 8, size = 56: expected a clip .*set both to 0"):
        Schedule(run).find().build()
