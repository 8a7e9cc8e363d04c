"""The command line: what a user types, what is printed where, and how it ends."""
import argparse, os, subprocess, sys
from pathlib import Path
import numpy as np, pytest
from mbd import cli
from mbd.settings import KitError

VIDEO = pytest.importorskip("av") and __import__("mbd.video", fromlist=["video"])


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    "No settings of this machine: a folder of its own, with a settings file of its own."
    for name in [n for n in os.environ if n.startswith("MBD_")]: monkeypatch.delenv(name)
    monkeypatch.setenv("MBD_CACHE", str(tmp_path / "cache")); monkeypatch.setenv("MBD_PROGRESS", "lines")
    (tmp_path / "settings.ini").write_text("[data]\nucf101 =\n[run]\ndevice = cpu\n")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def ucf(tmp_path):
    "Two classes, three groups, in UCF101's layout; one listed video is missing, one is no video."
    root, rng = tmp_path / "ucf", np.random.default_rng(0)
    lists = root / "ucfTrainTestlist"; lists.mkdir(parents=True)
    (lists / "classInd.txt").write_text("1 Run\n2 Walk\n")
    names = [f"{c}/v_{c}_g{g:02}_c01.avi" for c in ("Run", "Walk") for g in (1, 2, 3)]
    (lists / "trainlist01.txt").write_text("".join(f"{n} {1 + n.startswith('Walk')}\n" for n in names if "g01" not in n))
    (lists / "testlist01.txt").write_text("".join(f"{n}\n" for n in names if "g01" in n))
    for name in names[:-1]:
        path = root / "UCF-101" / name; path.parent.mkdir(parents=True, exist_ok=True)
        VIDEO.write_video(path.with_suffix(".mp4"), rng.integers(0, 255, (8, 32, 48, 3)).astype(np.uint8)).rename(path)
    (root / "UCF-101" / names[1]).write_bytes(b"no video")
    return root


def test_list_check_list(ucf, capsys):
    assert cli.main(["data", "list", "ucf101", "--root", str(ucf)]) == 0
    out = capsys.readouterr().out
    train = next(line.split() for line in out.splitlines() if line.split()[:3] == ["ucf101", "1", "train"])
    assert train[3:9] == ["2", "9537", "4", "3", "1", "0"] and "no such list there: ucf101 train (split 2)" in out
    assert cli.main(["data", "check", "ucf101", "--root", str(ucf), "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert "5 videos: 4 readable, 1 unreadable" in out and "v_Run_g02_c01.avi" in out and (ucf / "unreadable.csv").is_file()
    cli.main(["data", "list", "ucf101", "--root", str(ucf)])
    train = next(line.split() for line in capsys.readouterr().out.splitlines() if line.split()[:3] == ["ucf101", "1", "train"])
    assert train[3:9] == ["2", "9537", "4", "3", "1", "1"]      # found as before, and counted as unreadable


def test_the_settings_say_where_and_an_option_wins(ucf, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MBD_DATA_UCF101", str(ucf))
    assert cli.main(["data", "list"]) == 0 and "ucf101" in capsys.readouterr().out
    assert cli.main(["data", "list", "ucf101", "--root", str(tmp_path / "nowhere")]) == 1
    err = capsys.readouterr().err
    assert err.startswith("mbd: ") and err.count("\n") == 1 and "nowhere" in err


def test_resize_by_shards(ucf, tmp_path, capsys):
    for shard in ("0/2", "1/2"): assert cli.main(["data", "resize", "ucf101", "small", "--root", str(ucf), "--short-side", "16", "--keyframes", "12", "--shard", shard, "--workers", "1"]) == 0
    copies = sorted(p for p in (tmp_path / "small").rglob("*.mp4"))
    assert len(copies) == 4 and VIDEO.read_frames(copies[0], [0]).shape == (1, 16, 24, 3)


@pytest.mark.parametrize("words, status, said", [
    (["data", "check", "ucf11"], 2, "did you mean 'ucf101'"),
    (["data", "check", "ucf101"], 2, "MBD_DATA_UCF101"),
    (["data", "list"], 2, "no data set is configured"),
    (["data", "list", "ucf101", "hmdb51", "--root", "x"], 2, "belong to one data set"),
    (["data", "resize", "ucf101", "out", "--shard", "2/2"], 2, "0 <= i < n"),
    (["data", "check", "ucf101", "--workers", "0"], 2, "above 0"),
    (["data", "prepare", "ssv2", "--root", "ssv2"], None, "source"),
    (["data", "resize", "ucf101", "out", "--root", "gone"], 1, "gone"),
    ([], 2, "mbd --help"), (["dta"], 2, "'data'"), (["data", "lst"], 2, "see mbd data --help"), (["data", "list", "ucf101", "--rot", "x"], 2, "see mbd data list --help"), (["compare", "x"], 2, "mbd compare: unknown: x"),
    (["data", "list", "ucf101", "--root", "file"], 1, "--root file is no folder"),
    (["data", "list", "ucf101", "--root", "empty"], 1, "--annotations FOLDER"),
    (["data", "check", "ucf101", "--root", "empty"], 2, "no video below empty"), (["data", "resize", "ucf101", "out", "--root", "empty"], 2, "no video below empty"),
    (["data", "check", "ucf101", "--root", "empty", "--output", "file"], 2, "file is a file"), (["data", "resize", "ucf101", "file/out", "--root", "empty"], 2, "file is a file"),
    (["data", "prepare", "ucf101", "--root", "new", "--url", "ftp://x"], 1, "--url ADDRESS"), (["data", "prepare", "ucf101", "--subset", "train", "--root", "new"], 2, "leave it out"),
    (["features", "ucf101"], 2, "--backbone"), (["features", "ucf101", "--backbone", "hand_cnn", "--output", "file"], 2, "file is a file"),
    (["run", "ucf11"], 2, "did you mean 'ucf101'"), (["run", "ucf101", "-p", "preset=smoke"], 2, "a name and a value, as -p preset smoke"), (["run", "ucf101", "--size", "smoke"], 2, "see mbd run --help"),
    (["run", "ucf101", "-p", "pressed", "smoke"], 2, "did you mean 'preset'?; mbd run ucf101 --parameters lists all"), (["run", "ucf101", "-p", "preset", "smok"], 2, "did you mean 'smoke'"),
    (["run", "all", "-p", "data", "real"], 2, "no folder is configured for ucf101"), (["run", "ucf101", "-p", "local_weights", "gone.pth"], 2, "no such file"),
    (["run", "ucf101", "-p", "preset", "smoke", "-p", "reports", "file"], 1, "file: File exists; a file is in the way; choose another place"),
    (["train", "features"], 2, "valid: ucf101"), (["train", "ucf101", "-p", "seed", "-1"], 2, "out of range"), (["train", "ucf101", "-p", "batch_size", "2"], 2, "batch_size = 2"), (["run", "ucf101", "-p", "accumulate", "4", "-p", "intermediate", "logit", "-p", "batch_size", "6"], 2, "choose a multiple of 4"), (["train", "ucf101", "-p", "preset", "smoke", "-p", "reports", "file"], 1, "choose another place"),
    (["compare", "--reports", "gone"], 2, "--reports"), (["compare", "--output", "empty"], 2, "name a file in it"),
    (["analyse", "a.npz", "b.npz", "--output", "file"], 2, "file is a file"), (["predict", "file", "--output", "file"], 2, "file is a file"),
    (["bench", "data", "--real", "gone"], 2, "gone is no folder"), (["bench", "train", "--output", "file/table.md"], 2, "file is a file"), (["bench", "features", "file"], 2, "file is a file"),
])
def test_errors_are_one_line_and_the_status_tells(words, status, said, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("MBD_PROGRESS", "none")      # which stands on the same stream
    (tmp_path / "file").write_text("no folder"); (tmp_path / "empty").mkdir()
    try: ended = cli.main(words)
    except SystemExit as error: ended = error.code
    err = capsys.readouterr().err
    assert said in err and err.startswith("mbd") and err.count("\n") == 1 and len(err) < 400
    assert ended == status if status is not None else ended in (1, 2)
    assert not (tmp_path / "reports").exists() or not list((tmp_path / "reports").iterdir())      # nothing is left behind that began


@pytest.mark.parametrize("text, said", [("[data]\nucf101 = a\nucf101 = b\n", "already exists"), ("[data]\nucf11 = a\n", "did you mean 'ucf101'"), ("[run]\ndevice = gpu\n", "did you mean 'cpu'"), ("[dat]\nucf101 = a\n[run]\n", "did you mean 'data'"), (b"[data]\nucf101 = \xff\n", "cannot be read")])
def test_settings_that_cannot_be_read_are_named(text, said, tmp_path, capsys):
    (tmp_path / "settings.ini").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert cli.main(["data", "list"]) == 2
    err = capsys.readouterr().err
    assert "settings.ini" in err and said in err and err.count("\n") == 1


@pytest.mark.parametrize("error, status, said", [
    (PermissionError(13, "Permission denied", "reports"), 1, "mbd: reports: Permission denied; choose another place, or change its rights\n"), (OSError(28, "No space left on device", "a.csv"), 1, "mbd: a.csv: No space left on device; make room, or choose another place\n"),
    (OSError(28, "the tables cannot be written; make room"), 1, "mbd: the tables cannot be written; make room\n"), (ModuleNotFoundError("No module named 'av'"), 1, "mbd: No module named 'av'; install the kit with all it needs: pip install -e . in its folder\n"),
    (KitError("3 of 10 videos could not be read; run `mbd data check`"), 1, "mbd: 3 of 10 videos could not be read; run `mbd data check`\n"), (MemoryError("warm-up: lower batch_size"), 1, "mbd: warm-up: lower batch_size\n"), (ValueError(""), 2, "mbd: ValueError\n")])
def test_what_goes_wrong_inside_is_one_line_too(error, status, said, monkeypatch, capsys, ucf):
    def fail(*_, **__): raise error
    monkeypatch.setattr("mbd.scanning.check", fail)
    assert cli.main(["data", "check", "ucf101", "--root", str(ucf)]) == status and capsys.readouterr().err == said


def test_what_nobody_foresaw_keeps_its_traceback(monkeypatch, capsys, ucf):
    def fail(*_, **__): raise RuntimeError("first\n\nsecond")
    monkeypatch.setattr("mbd.scanning.check", fail)
    assert cli.main(["data", "check", "ucf101", "--root", str(ucf)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("Traceback") and ", in fail\n" in err and err.endswith("\nmbd: RuntimeError: first; second\n")


def test_the_parameters_of_an_experiment_are_listed(capsys):
    assert cli.main(["run", "ucf101", "--parameters"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("# ucf101\npreset = 'auto'  # size of the run") and "\nworkers = None" in out and not Path("reports").exists()


def test_a_traceback_on_request(monkeypatch):
    monkeypatch.setenv("MBD_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError): cli.main(["data", "list", "ucf101", "--root", "gone"])


def test_stopped_by_hand(monkeypatch, capsys, ucf):
    def stop(*_, **__): raise KeyboardInterrupt
    monkeypatch.setattr("mbd.scanning.check", stop)
    assert cli.main(["data", "check", "ucf101", "--root", str(ucf)]) == 130 and "continues" in capsys.readouterr().err
    monkeypatch.setattr("mbd.analyse.analyse", stop)
    assert cli.main(["analyse", "a.npz"]) == 130 and "begins anew" in capsys.readouterr().err


def test_prepare_hands_the_words_on(monkeypatch, capsys, tmp_path):
    from mbd import preparation
    asked = {}
    def prepare(name, root, **options):
        asked.update(options, name=name, root=root)
        return preparation.Prepared(name, root, root, 3, 1)
    monkeypatch.setattr(preparation, "prepare", prepare); monkeypatch.setenv("MBD_URLS_KINETICS400", "https://mirror.example.org/k400/")
    assert cli.main(["data", "prepare", "kinetics400", "--root", "k", "--subset", "train", "--subset", "test", "--discard"]) == 0
    assert (asked["name"], asked["root"], asked["urls"], asked["subsets"], asked["keep"]) == ("kinetics400", Path("k"), "https://mirror.example.org/k400", ("train", "test"), False)
    assert cli.main(["data", "prepare", "kinetics400", "--root", "k", "--url", "https://other.example.org"]) == 0
    assert asked["urls"] == ["https://other.example.org"] and asked["keep"] is True and "3 videos" in capsys.readouterr().out


def test_a_configured_folder_that_is_not_there_is_named(tmp_path, monkeypatch, capsys):
    from mbd import miniactions
    miniactions.generate(tmp_path / "mini", classes=("PushUpsSlow", "PushUpsFast"), train_groups=2, test_groups=1, clips=1, workers=1)
    monkeypatch.setenv("MBD_DATA_UCF101", str(tmp_path / "mini")), monkeypatch.setenv("MBD_DATA_HMDB51", str(tmp_path / "nowhere"))
    assert cli.main(["data", "list", "ucf101", "hmdb51"]) != 0
    out, err = capsys.readouterr()
    assert "ucf101" in out and "hmdb51" not in out and str(tmp_path / "nowhere") in err and "settings.ini" in err


@pytest.mark.parametrize("words", [[], ["data"], ["data", "list"], ["data", "prepare"], ["data", "check"], ["data", "resize"], ["features"], ["run"], ["train"], ["analyse"], ["compare"], ["predict"], ["bench"], ["bench", "data"], ["bench", "pairs"], ["bench", "inference"], ["bench", "train"], ["bench", "features"]])
def test_help_of_everything(words, capsys):
    with pytest.raises(SystemExit) as ended: cli.main([*words, "--help"])
    assert ended.value.code == 0 and capsys.readouterr().out.startswith("usage: mbd")


def test_help_needs_no_torch_and_the_program_is_installed():
    code = "import sys\nfrom mbd.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules and 'av' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}, capture_output=True).returncode == 0
    from importlib.metadata import entry_points
    assert [e.value for e in entry_points(group="console_scripts") if e.name == "mbd"] in (["mbd.cli:main"], [])


@pytest.mark.parametrize("words", [["--help"], ["data", "list", "ucf101", "--root", "ucf"]])
def test_a_closed_pipe_is_no_error(ucf, words):
    "The reader is gone before a line is written; what Python buffers, it writes at its end."
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    for more in ({}, {"PYTHONUNBUFFERED": "1"}):
        with subprocess.Popen([sys.executable, "-m", "mbd.cli", *words], env=plain | more | {"PYTHONPATH": str(Path(cli.__file__).parents[1])}, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as program:
            program.stdout.close()
            assert (program.stderr.read(), program.wait()) == (b"", 0)


def test_a_closed_output_is_no_error():
    program = subprocess.run([sys.executable, "-m", "mbd.cli", "--version"], env=os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])}, stderr=subprocess.PIPE, preexec_fn=lambda: os.close(1))
    assert program.returncode == 0 and b"Traceback" not in program.stderr


@pytest.mark.parametrize("reader, status", [("true", 0), ("cat", 1)])
def test_a_pipe_of_our_own_that_breaks_is_an_error(reader, status):
    "As when a worker process dies; only where nobody reads us any more is it the end of the reader."
    said = "import argparse, os, time; from mbd.cli import _ended; time.sleep(.5)\ndef broken(_): there, here = os.pipe(); os.close(there); os.write(here, b'x')\nos._exit(_ended(argparse.Namespace(function=broken)))"
    program = subprocess.Popen([sys.executable, "-c", said], env=os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    reading = subprocess.Popen([reader], stdin=program.stdout, stdout=subprocess.DEVNULL); program.stdout.close()
    told = program.stderr.read().decode(); reading.wait()
    assert program.wait() == status and ("BrokenPipeError" in told) == bool(status)


def test_where_the_system_cannot_be_asked_a_broken_pipe_is_the_readers(monkeypatch):
    "As on Windows, whose `select` has no `poll`."
    def broken(_): raise BrokenPipeError
    monkeypatch.delattr("select.poll")
    assert cli._ended(argparse.Namespace(function=broken)) == 0


def test_features_of_a_generated_set_are_stored_and_continued(tmp_path, monkeypatch, capsys):
    "The whole way from words to a store that the feature door reads."
    from mbd import features, miniactions
    monkeypatch.setenv("MBD_PROGRESS", "none")
    root = miniactions.generate(tmp_path / "set", classes=miniactions.CLASSES[:2], train_groups=3, test_groups=1, clips=1)
    words = ["features", "ucf101", "--root", str(root), "--backbone", "hand_cnn", "--protocol", "2x3", "--output", str(tmp_path / "stores"), "--workers", "0"]
    assert cli.main([*words, "--shard", "0/2"]) == 0 and cli.main([*words, "--shard", "1/2"]) == 0 and cli.main(words) == 0
    store = features.FeatureStore(tmp_path / "stores/ucf101/hand_cnn-unnamed-2x3")
    assert len(store) == 8
    capsys.readouterr()
    assert cli.main([*words[:4], "--backbone", "hand_cn"]) == 2 and "hand_cnn" in capsys.readouterr().err


def predictions(path, seed, **more):
    rng, labels = np.random.default_rng(seed), np.arange(90) % 3
    np.savez(path, ids=np.arange(90), labels=labels, logits=2 * np.eye(3)[labels] + rng.normal(size=(90, 3)), **more)
    return str(path)


def test_analyse_two_files(tmp_path, capsys):
    import json
    a, b = predictions(tmp_path / "a.npz", 0), predictions(tmp_path / "b.npz", 1)
    assert cli.main(["analyse", a, b, "--name-a", "resnet", "--folds", "3", "--cost-a", "1.5", "--cost-b", "8", "--seed", "2"]) == 0
    out, err = capsys.readouterr()
    assert "analysing: 540 of 540 videos" in err and "analysing" not in out and "resnet is right on" in out and "GFLOPs" in out and out.splitlines()[-1] == f"report: {Path('analysis/report.html')}"
    record = json.loads(Path("analysis/result.json").read_text())
    assert (record["names"], record["folds"], record["seed"], record["early_exit"]["gflops"]) == (["resnet", "b"], 3, 2, [1.5, 8.0]) and Path("analysis/videos.csv").is_file()


@pytest.mark.parametrize("more, status, said", [
    (["--cost-a", "1"], 2, "go together"), (["--folds", "1"], 2, "at least 2"), (["--name-b", "a"], 2, "both models are named 'a'"), (["--most", "5"], 2, "at least 100"), (["--cost-a", "1", "--cost-b", "nan"], 2, "above 0"),
])
def test_analyse_says_what_is_wrong(tmp_path, capsys, more, status, said):
    a, b = predictions(tmp_path / "a.npz", 0), predictions(tmp_path / "b.npz", 1)
    assert cli.main(["analyse", a, b, *more]) == status
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and not Path("analysis").exists()


def test_analyse_names_the_bad_file(tmp_path, capsys):
    a = predictions(tmp_path / "a.npz", 0)
    (tmp_path / "cut.npz").write_bytes(Path(a).read_bytes()[:500])
    for second, status, said in (("cut.npz", 2, "cut.npz: not a whole .npz"), ("gone.npz", 1, "gone.npz")):
        assert cli.main(["analyse", a, str(tmp_path / second)]) == status and said in capsys.readouterr().err


def test_bench_inference_and_train_hand_the_words_on(monkeypatch, capsys):
    "What was typed stands in the report as it was typed, so that it can be typed again."
    from mbd import speed
    asked = []
    for name in ("inference_table", "train_table"): monkeypatch.setattr(speed, name, lambda report, name=name, **given: asked.append((name, report, given)) or f"{name}: a table", raising=False)
    assert cli.main(["bench", "inference"]) == 0 and "inference_table: a table" in capsys.readouterr().out
    assert cli.main(["bench", "inference", "--pair", "ucf101/hand", "--pair", "ssv2/hand", "--batch", "2", "--no-compile", "--output", "a.md", "--precision", "bfloat16"]) == 0
    assert cli.main(["bench", "train", "--variant", "plain", "--variant", "compile+channels_last", "--batch", "8", "--workers", "2", "--rounds", "3"]) == 0
    plain, words, train = [{key: value for key, value in given.items() if key != "progress"} for _, _, given in asked]
    assert plain == dict(pairs=None, batches=(1, 16), device="cpu", compiled=True, rounds=5, precision=None, command="mbd bench inference --rounds 5 --device auto")
    assert words == dict(pairs=["ucf101/hand", "ssv2/hand"], batches=[2], device="cpu", compiled=False, rounds=5, precision="bfloat16",
                         command="mbd bench inference --pair ucf101/hand --pair ssv2/hand --batch 2 --rounds 5 --device auto --precision bfloat16 --no-compile") and asked[1][1] == "a.md"
    assert train == dict(pairs=None, variants=["plain", "compile+channels_last"], batch_size=8, precision=None, device="cpu", workers=2, rounds=3, epochs=30,
                         command="mbd bench train --variant plain --variant compile+channels_last --batch 8 --device auto --workers 2 --rounds 3 --epochs 30")
    assert cli.parser().parse_args(train["command"].split()[1:]).variant == ["plain", "compile+channels_last"]
    for words in (["inference", "--batch", "0"], ["train", "--precision", "int8"]):
        with pytest.raises(SystemExit): cli.main(["bench", *words])


def test_bench_names_a_wrong_pair(capsys):
    assert cli.main(["bench", "inference", "--pair", "ucf101/hnad"]) == 2 and "did you mean 'hand'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ("run", "train"))
def test_a_preset_is_a_parameter_like_any_other(command, monkeypatch):
    "The two ways to say it come together in one list, in order."
    seen = []
    monkeypatch.setattr(cli, f"_{command}", lambda words: seen.append([tuple(pair) for pair in words.parameter]) or 0)
    assert cli.main([command, "ucf101", "-p", "seed", "3", "--preset", "smoke", "-p", "split", "2"]) == 0 and cli.main([command, "ucf101"]) == 0
    assert seen == [[("seed", "3"), ("preset", "smoke"), ("split", "2")], []]


# ---- a video of one's own

@pytest.fixture
def model(tmp_path):
    "A checkpoint of two small streams, with a map, and a video."
    import torch
    from mbd.dominance import DominanceMap
    from mbd.fusion import AdaptiveFusion
    from mbd.global_stream import GlobalStream
    from mbd.local_stream import LocalStream
    from mbd.model import MBD
    torch.manual_seed(0)
    made = MBD(LocalStream(2, (4, 6), (3, 1)), GlobalStream(2, width=12, depth=2, heads=3), ["run", "walk"])
    made.map = DominanceMap(["run", "walk"], [5] * 2, [2] * 2, [.3, .7], [.2, .6], [.4, .8], ["global", "local"], .5)
    made.fusion = AdaptiveFusion(made.map.logit_share)
    rng = np.random.default_rng(0)
    VIDEO.write_video(tmp_path / "my.mp4", rng.integers(0, 255, (70, 64, 64, 3)).astype(np.uint8)); VIDEO.write_video(tmp_path / "short.mp4", rng.integers(0, 255, (4, 64, 64, 3)).astype(np.uint8))
    (tmp_path / "text.mp4").write_text("no video")
    return made.save(tmp_path / "model", about={"data": {"name": "miniactions"}})


def test_predict(model, capsys):
    assert cli.main(["predict", "my.mp4", "--model", "model", "--top", "1", "--output", "out"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("looking: ") and out.startswith("model: ")      # a script reads the answer alone
    for words in ("model: model", "my.mp4: 2.80 s", "share of the local stream: 0.", "decided by ", "times real time", "generated figure videos", "written: out/prediction.json".replace("/", os.sep)): assert words in out, words
    assert {p.name for p in Path("out").iterdir()} == {"prediction.json", "timeline.csv", "share.png", "timeline.png", "answer.png", "evidence.png"}
    assert cli.main(["predict", "my.mp4", "--model", "model", "--step", ".4", "--rate", "30"]) == 0 and "windows of 1.03 s" in capsys.readouterr().out


def test_predict_takes_the_model_of_the_newest_run(model, tmp_path, capsys):
    import json
    run = tmp_path / "reports/ucf101-generated/one"; run.mkdir(parents=True)
    (run / "result.json").write_text(json.dumps({"schema": 1, "status": "complete", "ended": "2026-01-01T00:00:00"}))
    model.rename(run / "checkpoints") and (run / "checkpoints").rename(run / "model"); (run / "checkpoints").mkdir(); (run / "model").rename(run / "checkpoints/model")
    assert cli.main(["predict", "my.mp4"]) == 0 and f"model: {run / 'checkpoints/model'}" in capsys.readouterr().out


@pytest.mark.parametrize("words, status, said", [
    (["gone.mp4"], 1, "gone.mp4: no such file"), (["text.mp4"], 1, "text.mp4: is no video"), (["short.mp4", "--model", "model"], 2, "4 frames are too few"), (["my.mp4", "--model", "nowhere"], 1, "config.json is missing"), (["my.mp4", "--model", "other"], 2, "a model of another kind"),
    (["my.mp4", "--model", "newer"], 2, "install the mbd version that wrote it (9.9)"), (["my.mp4"], 1, "--pair pretrained"), (["my.mp4", "--pair", "hand"], 2, "no weights that know"), (["my.mp4", "--model", "model", "--local-weights", "x"], 2, "give --pair NAME too"),
    (["my.mp4", "--pair", "pretrained", "--local-weights", "gone.pth"], 1, "gone.pth"), (["my.mp4", "--model", "a", "--hub", "b/c"], 2, "not allowed with"), (["my.mp4", "--step", "0"], 2, "above 0"), (["my.mp4", "--top", "0"], 2, "above 0"),
])
def test_predict_says_what_is_wrong_in_one_line(model, words, status, said, capsys, tmp_path):
    import json
    for name, text in (("other", {"model_type": "bert"}), ("newer", {"format": 99, "mbd": "9.9"})): (tmp_path / name).mkdir(); (tmp_path / name / "config.json").write_text(json.dumps(text))
    if "--pair" in words: pytest.importorskip("torchvision")
    try: ended = cli.main(["predict", *words])
    except SystemExit as error: ended = error.code
    err = capsys.readouterr().err
    assert ended == status and said in err and "Traceback" not in err and (err.count("\n") == 1 or "usage: " in err)


def test_predict_fetches_from_the_hub(model, monkeypatch, capsys):
    from mbd import model as models
    monkeypatch.setattr(models, "snapshot_download", lambda name, **options: str(model))
    assert cli.main(["predict", "my.mp4", "--hub", "me/figures"]) == 0 and "model: me/figures" in capsys.readouterr().out
