"""What stands in the project's own papers is there: links, commands, the citation, the container."""
import json, re, shlex, tomllib
from pathlib import Path
import pytest
from mbd import cli

ROOT = Path(__file__).resolve().parents[1]
PAPERS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "data/README.md", "reports/README.md")]
pytestmark = pytest.mark.skipif(not PAPERS[1].is_file(), reason="an installed package has no papers")


@pytest.mark.parametrize("paper", PAPERS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_to_files(paper):
    links = re.findall(r"\]\(([^)#]+)", paper.read_text(encoding="utf-8"))
    assert not [link for link in links if not re.match(r"https?://", link) and not (paper.parent / link).exists()]


NAMED = {"data", "list", "prepare", "check", "resize", "features", "run", "train", "analyse", "compare", "bench", "predict", "inference", "pairs"}


def commands(text):
    "The words of each `mbd ...` of a text: lines of code blocks, and what stands between backticks. What leaves a choice or only names a command is not to be typed."
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    lines = [line for block in blocks for line in block.splitlines()] + re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    found = filter(None, (re.search(r"(?:^|/| |mbd\.cli )mbd ([^#]*)|mbd\.cli ([^#]*)", line) for line in lines))
    typed = [shlex.split(words[1] or words[2]) for words in found if not re.search(r"[|]|\.\.\.|\b[A-Z]{3,}\b", words[0])]
    return [words for words in typed if words and words[0] in NAMED and not set(words) <= NAMED]


@pytest.mark.parametrize("paper", PAPERS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_the_commands_can_be_typed(paper, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    typed = commands(paper.read_text(encoding="utf-8"))
    for words in typed:
        try: cli.parser().parse_args(words)
        except SystemExit: pytest.fail(f"{paper.name}: mbd {shlex.join(words)}")
    assert typed or paper.parent.name == "reports"


def test_the_readme_s_script_for_videos_and_a_network_of_ones_own_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("av")
    from mbd import local_stream, miniactions, video
    monkeypatch.chdir(tmp_path)
    for name in ("PushUpsFast", "SameHand"):
        (tmp_path/"my_videos"/name).mkdir(parents=True)
        for group in range(1, 7): video.write_video(tmp_path/"my_videos"/name/f"{group}.mp4", miniactions.render(miniactions.Spec(), name, group=group, clip=1))
    (tmp_path/"my.mp4").write_bytes((tmp_path/"my_videos/SameHand/1.mp4").read_bytes())
    script, before = re.search(r"<!-- own data -->\n```python\n(.*?)^```", PAPERS[0].read_text(encoding="utf-8"), re.M | re.S)[1], dict(local_stream.BACKBONES)
    try: exec(compile(re.sub(r"epochs=\d+", "epochs=1", script), "README.md", "exec"), {"__name__": "readme"})
    finally: local_stream.BACKBONES.clear(); local_stream.BACKBONES.update(before)
    said = capsys.readouterr().out
    assert "reference (share over all classes)" in said and "my.mp4: 1.24 s" in said and (tmp_path/"my_model/config.json").is_file()


def test_the_citation_names_the_paper_as_the_readme_does():
    yaml = pytest.importorskip("yaml")
    citation, readme = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8")), PAPERS[0].read_text(encoding="utf-8")
    [paper] = citation["references"]
    assert f"https://doi.org/{paper['doi']}" in readme and ", ".join(a["family-names"] for a in paper["authors"]) in readme
    assert f"{paper['year']}, {paper['volume']}({paper['issue']}), {paper['start']}" in readme
    assert citation["license"] == tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["license"]


def test_the_container_installs_an_extra_that_there_is_and_opens_the_notebooks():
    container = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extra = re.fullmatch(r"pip install -e '\.\[(\w+)\]'", container["postCreateCommand"])[1]
    assert extra in project["optional-dependencies"] and any(d.startswith("jupyterlab") for d in project["dependencies"])
    name, version = container["image"].split(":")
    assert name == "python" and tuple(map(int, version.split("."))) >= tuple(map(int, re.findall(r"\d+", project["requires-python"])))
    words = shlex.split(container["postAttachCommand"])      # test_browser.py starts it
    assert words[:2] == ["jupyter", "lab"] and (ROOT / words[2]).is_dir()
