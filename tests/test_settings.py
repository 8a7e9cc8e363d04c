import os, subprocess, sys
from pathlib import Path
import pytest
from mbd import settings


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    for name in [n for n in os.environ if n.startswith("MBD_")]: monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def write(folder, text):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.ini").write_text(text)
    return folder / "settings.ini"


def test_nearest_file_upwards_and_paths_relative_to_it(tmp_path, monkeypatch):
    write(tmp_path, "[data]\nucf101 = far\n")
    near = write(tmp_path / "project", "[data]\nucf101 = videos/ucf # 1; old\n[run]\nreports = out\nworkers = 3\n")
    (tmp_path / "project/nbs").mkdir()
    monkeypatch.chdir(tmp_path / "project/nbs")
    found = settings.load()
    assert found.file == near and found.data["ucf101"] == tmp_path / "project/videos/ucf # 1; old"
    assert found.reports == tmp_path / "project/out" and found.workers == 3
    monkeypatch.setenv("MBD_SETTINGS", str(tmp_path / "settings.ini"))
    assert settings.load().data["ucf101"] == tmp_path / "far"


def test_another_programs_settings_ini_is_passed_over(tmp_path, monkeypatch):
    ours = write(tmp_path, "[run]\nworkers = 1\n")
    write(tmp_path / "sub", "[DEFAULT]\nlib_name = other\n")
    monkeypatch.chdir(tmp_path / "sub")
    assert settings.load().file == ours


@pytest.mark.parametrize("text", ["\ufeff[data]\nucf101 = v\n", "[data] ; mine\nucf101 = v\n", "  [data]\nucf101 = v\n"])
def test_a_file_that_can_be_read_is_found(tmp_path, monkeypatch, text):
    "One that is passed over would be missed by nobody: all values have defaults."
    ours = write(tmp_path, text); monkeypatch.chdir(tmp_path)
    assert settings.load().file == ours and settings.load().data == {"ucf101": tmp_path/"v"}
    write(tmp_path, "[Data]\nucf101 = v\n")
    with pytest.raises(ValueError, match="unknown section; did you mean 'data'"): settings.load()


def test_defaults_without_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "find", lambda: None)
    found = settings.load()
    assert found.file is None and found.data == {} and found.reports == tmp_path / "reports"
    assert found.device in ("cpu", "cuda", "mps") and found.precision in ("float32", "bfloat16") and 0 <= found.workers <= 8


def test_parameters_over_environment_over_file(tmp_path, monkeypatch):
    file = write(tmp_path, "[data]\nucf101 = a\nhmdb51 = b\nssv2 =\n[annotations]\nucf101 = lists\n[run]\nworkers = 1\n")
    monkeypatch.setenv("MBD_DATA_UCF101", "/elsewhere/ucf")
    monkeypatch.setenv("MBD_DATA_HMDB51", "")
    monkeypatch.setenv("MBD_WORKERS", "2")
    found = settings.load(file)
    assert found.data == {"ucf101": Path("/elsewhere/ucf")} and found.annotations == {"ucf101": tmp_path / "lists"} and found.workers == 2
    found = settings.load(file, workers=4, data={"ucf101": "mine"})
    assert found.data == {"ucf101": tmp_path / "mine"} and found.workers == 4


def test_each_value_says_where_it_stands(tmp_path, monkeypatch):
    file = write(tmp_path, "[data]\nucf101 = a\nhmdb51 = b\n[run]\ndevice = cpu\n")
    monkeypatch.setenv("MBD_DATA_UCF101", str(tmp_path / "old"))
    found = settings.load(file, workers=1, data={"hmdb51": "mine"})
    assert found.data["ucf101"] == tmp_path / "old" and found.origin["data", "ucf101"] == "environment variable MBD_DATA_UCF101"
    assert found.origin["data", "hmdb51"] == "parameter 'data'" and found.origin["run", "device"] == f"{file} [run]" and found.origin["run", "precision"] == "default"


@pytest.mark.parametrize("text, parts", [
    ("[data]\nufc101 = x", ["settings.ini [data]", "'ufc101'", "did you mean 'ucf101'"]),
    ("[dta]\nucf101 = x\n[run]", ["[dta]", "did you mean 'data'"]),
    ("[run]\ndevise = cpu", ["settings.ini [run]", "'devise'", "did you mean 'device'"]),
    ("[run]\ndevice = gpu", ["device = 'gpu'", "valid: auto, cpu, cuda, mps"]),
    ("[run]\ndevice = cuda:99", ["device = 'cuda:99'", "this computer has"]),
    ("[run]\nprecision = bfloat", ["precision = 'bfloat'", "did you mean 'bfloat16'"]),
    ("[run]\nworkers = two", ["workers = 'two'", "whole number"]),
    ("[run]\nworkers\n", ["cannot be read"]),
])
def test_mistakes_in_the_file_are_named(tmp_path, text, parts):
    with pytest.raises(ValueError) as error: settings.load(write(tmp_path, text))
    assert all(part in str(error.value) for part in parts), str(error.value)


@pytest.mark.parametrize("name, part", [("MBD_DATA_UFC101", "did you mean 'ucf101'"), ("MBD_DTA_UCF101", "did you mean 'data'"), ("MBD_DEVIC", "did you mean 'device'"), ("MBD_DEVICE", "device = 'x'"),
                                         ("MBD_DATA", "write MBD_DATA_UCF101"), ("MBD_UCF101", "write MBD_DATA_UCF101")])
def test_mistakes_in_the_environment_are_named(monkeypatch, name, part):
    monkeypatch.setenv(name, "x")
    with pytest.raises(ValueError) as error: settings.load()
    assert name in str(error.value) and part in str(error.value)


def test_other_variables_of_the_kit_are_left_alone(monkeypatch):
    monkeypatch.setenv("MBD_REALDATA", "x"); monkeypatch.setenv("MBD_CACHE", "y")
    assert settings.load(device="cpu").device == "cpu"


@pytest.mark.parametrize("parameters, part", [({"worker": 2}, "did you mean 'workers'"), ({"workers": -1}, "-1"), ({"workers": 1.5}, "1.5"),
                                             ({"data": "x"}, "must be a dict"), ({"data": {"k400": "x"}}, "'k400'"), ({"device": "cpu:x"}, "cpu:x")])
def test_mistakes_in_parameters_are_named(parameters, part):
    with pytest.raises(ValueError, match="parameter") as error: settings.load(**parameters)
    assert part in str(error.value)


def test_a_named_file_must_exist(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="nothere.ini does not exist"): settings.load(tmp_path / "nothere.ini")
    monkeypatch.setenv("MBD_SETTINGS", str(tmp_path / "gone.ini"))
    with pytest.raises(ValueError, match="gone.ini does not exist"): settings.load()


def test_the_projects_own_file_is_valid():
    root = Path(__file__).parents[1]
    found = settings.load(root / "settings.ini")
    assert found.reports == root / "reports" and "ucf101" not in found.data
