"""Figures: what they show, and that they are figures on their own."""
import io
import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from mbd import plots  # noqa: E402


def measured(k=5):
    share = np.linspace(0.9, 0.1, k)
    group = ["local" if s > 0.6 else "global" if s < 0.4 else "balanced" for s in share]
    return SimpleNamespace(classes=[f"class {i}" for i in range(k)], share=share, low=share - 0.05, high=share + 0.05, reference=0.5, group=group)


def all_figures(banner=None):
    video, m, p = np.zeros((9, 8, 10, 3), np.uint8), measured(), np.full(5, 0.2)
    rows = [{"stage": "warm-up", "epoch": e, "stream": s, "loss": 1 / e, "accuracy": 0.5} for e in (1, 2) for s in ("local", "global")]
    return {
        "frames": plots.frames_strip(video, banner=banner), "curves": plots.training_curves(rows, banner=banner),
        "map": plots.dominance_map(m, required=[2, 3, 9, 20, 24], field=9, banner=banner),
        "dose": plots.share_against_range(m, [2, 3, 9, 20, 24], field=9, banner=banner),
        "confusion": plots.confusion_matrix(np.eye(5, dtype=int), m.classes, banner=banner),
        "confusion of many": plots.confusion_matrix(np.ones((30, 30), int), [f"c{i}" for i in range(30)], banner=banner),
        "bars": plots.accuracy_bars({"local": 0.5, "adaptive": 0.7}, {"local": (0.4, 0.6)}, banner=banner),
        "prediction": plots.prediction_strip(video, m.classes, p, p, p, weight=0.4, label=2, banner=banner),
    }


def words(figure):
    return [t.get_text() for t in figure.findobj(matplotlib.text.Text)]


@pytest.fixture(scope="module")
def figures():
    plt.close("all")      # what other tests of this process have left open
    return all_figures(banner="generated data")


def test_figures_are_returned_and_not_held(figures):
    assert all(isinstance(f, Figure) for f in figures.values())
    assert plt.get_fignums() == []


def test_every_figure_can_be_saved_and_is_small(figures):
    for name, figure in figures.items():
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=80)
        assert 1000 < len(file.getvalue()) < 200_000, name


def test_generated_data_is_written_into_every_figure_and_only_there(figures):
    for name, figure in figures.items():
        assert "generated data" in words(figure), name
    assert not any("generated data" in words(f) for f in all_figures().values())


def test_colours_differ_and_the_streams_keep_theirs(figures):
    assert len({plots.LOCAL, plots.GLOBAL, plots.BALANCED, plots.FUSED}) == 4
    lines = {line.get_label(): line.get_color() for line in figures["curves"].axes[0].get_lines()}
    assert lines["local"] == plots.LOCAL and lines["global"] == plots.GLOBAL


def test_what_a_colour_tells_a_line_or_a_marker_tells_too(figures):
    t, p = np.arange(10.0), np.full((10, 5), 0.2)
    lines = plots.timeline(t, measured().classes, p, p[:, 0], np.stack([p[:, 0]] * 3, 1)).axes[0].get_lines()
    assert len({repr(line._unscaled_dash_pattern) for line in lines}) == len(lines) == 5
    markers = {line.get_label(): line.get_marker() for line in figures["dose"].axes[0].get_lines() if line.get_label() in plots.GROUP_COLOURS}
    assert len(set(markers.values())) == len(markers) == 3


def test_no_line_runs_through_a_name(figures):
    axes = figures["dose"].axes[0]
    names = [t for t in axes.texts if t.get_text().startswith("class")]
    assert len(names) == 5 and all(t.get_bbox_patch() and t.zorder > max(line.zorder for line in axes.get_lines() if line.get_linestyle() in ("--", ":")) for t in names)


def test_a_strip_shows_evenly_spaced_frames_up_to_the_last():
    figure = plots.frames_strip(np.zeros((100, 4, 4, 3), np.uint8), count=5)
    assert [a.get_title() for a in figure.axes] == ["0", "25", "50", "74", "99"]
    assert [a.get_title() for a in plots.frames_strip(np.zeros((2, 4, 4, 3), np.uint8), titles=["in", "out"]).axes] == ["in", "out"]


def test_titles_and_probabilities_that_do_not_match_are_an_error():
    video, p = np.zeros((3, 4, 4, 3), np.uint8), np.full(2, 0.5)
    with pytest.raises(ValueError, match="3 frames need as many titles, got 1"):
        plots.frames_strip(video, titles=["a"])
    with pytest.raises(ValueError, match=r"3 classes need as many probabilities, got \(2,\)"):
        plots.prediction_strip(video, ["a", "b", "c"], p, p, p)


@pytest.mark.parametrize("bad", [np.zeros((4, 4, 3), np.uint8), np.zeros((2, 3, 4, 4), np.uint8), np.zeros((0, 4, 4, 3), np.uint8), np.zeros((2, 4, 4, 3))])
def test_a_strip_of_something_else_is_an_error(bad):
    with pytest.raises(ValueError, match="T, H, W, 3"):
        plots.frames_strip(bad)


def test_curves_lay_stages_end_to_end_and_leave_out_what_is_missing():
    rows = [{"stage": "warm-up", "epoch": "1", "stream": "local", "loss": "2.0", "accuracy": ""},      # as a CSV reader gives them
            {"stage": "warm-up", "epoch": "2", "stream": "local", "loss": "1.0", "accuracy": "0.5"},
            {"stage": "distil", "epoch": "1", "stream": "local", "loss": "0.5", "accuracy": "0.6"}]
    loss, accuracy = plots.training_curves(rows).axes
    assert [line.get_xydata().tolist() for line in loss.get_lines() if line.get_label() == "local"] == [[[1, 2], [2, 1], [3, 0.5]]]
    assert [line.get_xydata().tolist() for line in accuracy.get_lines() if line.get_label() == "local"] == [[[2, 0.5], [3, 0.6]]]
    assert {"warm-up", "distil"} <= set(words(loss.figure))
    with pytest.raises(ValueError, match="no epoch"):
        plots.training_curves([])


def test_map_is_sorted_and_coloured_by_group(figures):
    bars, panel = figures["map"].axes
    assert [t.get_text() for t in bars.get_yticklabels()] == [f"class {i}" for i in (4, 3, 2, 1, 0)]
    colours = [matplotlib.colors.to_hex(p.get_facecolor()[:3]).upper() for p in bars.patches]
    assert colours == [plots.GLOBAL] * 2 + [plots.BALANCED] + [plots.LOCAL] * 2
    points = [line.get_xdata().tolist() for line in panel.get_lines() if len(line.get_xdata()) == 5]
    assert points == [[24, 20, 9, 3, 2]]      # the construction in the same order as the bars


def test_map_of_a_hundred_classes_keeps_all_names():
    figure = plots.dominance_map(measured(101))
    assert len(figure.axes[0].get_yticklabels()) == 101 and figure.get_size_inches()[1] < 16


def test_names_of_equal_range_do_not_collide():
    heights = dict(plots._spread(np.array([3, 3, 3, 9]), np.array([0.98, 0.981, 0.5, 0.5]), gap=0.05))
    mine = sorted(heights[i] for i in (0, 1, 2))
    assert min(np.diff(mine)) >= 0.0499 and max(mine) <= 0.99 and heights[3] == 0.5


def test_confusions_are_listed_by_frequency_without_the_right_answers():
    matrix = np.array([[5, 3, 0], [1, 9, 0], [0, 0, 0]])
    assert plots.top_confusions(matrix, "abc") == [("a", "b", 3, 0.375), ("b", "a", 1, 0.1)]
    assert plots.top_confusions(np.eye(3, dtype=int), "abc") == []
    with pytest.raises(ValueError, match="matrix"):
        plots.confusion_matrix(matrix, ["a", "b"])


def test_cells_are_fractions_of_the_true_class():
    figure = plots.confusion_matrix(np.array([[3, 1], [0, 0]]), ["a", "b"])
    assert figure.axes[0].images[0].get_array().tolist() == [[0.75, 0.25], [0, 0]]
    assert {"75", "25"} <= set(words(figure))


def test_true_class_is_marked_in_every_list():
    p = [np.array([0, 0, 0.8, 0.1, 0.1]), np.array([0.1, 0.5, 0.2, 0.2, 0]), np.array([0, 0.3, 0.4, 0.3, 0])]
    figure = plots.prediction_strip(np.zeros((3, 4, 4, 3), np.uint8), measured().classes, *p, label=2)
    lists = [[t.get_text() for t in a.get_yticklabels()] for a in figure.axes if a.get_xlabel() == "probability"]
    assert [names.index("class 2 ✓") for names in lists] == [0, 1, 0]


# sentences, as the classes of Something-Something are: of forty to a hundred letters
LONG = [f"{verb} something that {way} on top of something else that cannot hold it, {end}" for verb in ("Laying", "Balancing", "Pretending to balance")
        for way, end in (("rolls", "so it falls down"), ("does not quite stand", "so that in the end all of it falls off the table"), ("bends", "and nothing happens"), ("slides", "until it stays"))]


def drawn_of_long_names(classes):
    K, video = len(classes), np.zeros((8, 16, 22, 3), np.uint8)
    p, share = [np.roll(np.linspace(1, 0, K), k) for k in range(3)], np.linspace(0.2, 0.8, K)
    m, matrix = SimpleNamespace(classes=classes, share=share, low=share - 0.1, high=share + 0.1, reference=0.5, group=["local"] * K), np.ones((K, K), int)
    title = f"largest weight of the local stream: {classes[5]}"
    return {
        "prediction": plots.prediction_strip(video, classes, *p, 0.5, 0, title=title, banner="made up"),
        "five answers": plots.prediction_strip(video, classes, *p, 0.5, top=5, title="a_file.mp4"),
        "evidence": plots.evidence_strip(video[:6], range(6), *np.ones((2, 6, 2, 2)), title=title),
        "map": plots.dominance_map(m), "map of many": plots.dominance_map(SimpleNamespace(**vars(m) | {n: np.resize(getattr(m, n), 44) for n in ("classes", "share", "low", "high", "group")})),
        "map with ranges": plots.dominance_map(m, np.arange(1, K + 1), 5, title=title),
        "confusion": plots.confusion_matrix(matrix, classes, title=title), "confusion of many": plots.confusion_matrix(matrix, classes, numbers_up_to=2),
        "timeline": plots.timeline(np.arange(9.0), classes, np.resize(p[0], (9, K)), np.full(9, 0.5), title=title),
    }


@pytest.fixture(scope="module")
def long_named():
    "The figures as a run draws them, and what matplotlib said meanwhile."
    with matplotlib.rc_context(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")      # "axes sizes collapsed to zero"
        plots.style()
        drawn = drawn_of_long_names(LONG)
        for figure in drawn.values():
            figure.draw_without_rendering()
        yield drawn, [str(warning.message) for warning in said]


def test_long_names_leave_room_for_what_they_name(long_named):
    drawn, said = long_named
    assert max(map(len, LONG)) > 95 and said == []
    for name, figure in drawn.items():
        sizes = [a.get_window_extent().width / figure.dpi for a in figure.axes if "fraction" not in a.get_ylabel()]      # but the colour bar
        assert min(sizes) > 0.9 or name == "evidence", (name, sizes)


def test_no_name_is_cut_or_lies_on_another_or_on_a_bar(long_named):
    for what, figure in long_named[0].items():
        box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        assert box.x0 > -0.02 and box.y0 > -0.02 and box.x1 < width + 0.02 and box.y1 < height + 0.02, (what, box)
        for axes in figure.axes:
            boxes = [t.get_window_extent() for t in axes.get_yticklabels() if len(t.get_text()) > 20]
            boxes.sort(key=lambda box: box.y0)
            assert all(below.y1 < above.y0 + 1 for below, above in zip(boxes, boxes[1:])), what
            assert not any(box.overlaps(other.bbox) for box in boxes for other in figure.axes), what


def test_a_long_name_keeps_its_ends_and_a_short_one_all():
    assert plots._name("passing American football (not in game)") == "passing American football (not in game)"
    assert plots._name("Putting something on a steep slope so it slides down", 24, 2) == "Putting something on a …\nso it slides down"
    assert plots._name("v_" + "x" * 90 + "_c01.avi", 20) == "v_xxxxxxxx…x_c01.avi" and plots._name("") == ""
    assert len({plots._name(name, 56) for name in LONG}) == len(LONG)


def test_a_dollar_in_a_name_is_a_dollar_and_no_formula():
    names, p = ["$\\frac$", "win $5 or $10", "a"], np.array([0.5, 0.3, 0.2])
    m = SimpleNamespace(classes=names, share=p, low=p - 0.1, high=p + 0.1, reference=0.5, group=["local"] * 3)
    figures = [plots.prediction_strip(np.zeros((1, 8, 8, 3), np.uint8), names, p, p, p, title="a $\\frac$.mp4"), plots.dominance_map(m, title="$\\frac$"), plots.share_against_range(m, [1, 2, 3]),
               plots.confusion_matrix(np.ones((3, 3), int), names), plots.confusion_matrix(np.ones((3, 3), int), names, numbers_up_to=1), plots.timeline([1.0], names, [p], [0.5]),
               plots.frames_strip(np.zeros((3, 8, 8, 3), np.uint8), titles=names), plots.evidence_strip(np.zeros((1, 8, 8, 3), np.uint8), [0], *np.ones((2, 1, 2, 2)), title="$\\frac$"),
               plots.accuracy_bars({"$\\frac$": 0.5}), plots.accuracy_against_cost([("$\\frac$", 1, 50)], [("$\\frac$", 2, 60, None)], banner="$\\frac$")]
    for figure in figures:
        figure.draw_without_rendering()       # a formula that matplotlib cannot read would raise
        assert [t for t in words(figure) if r"\frac" in t] and all(r"\$\frac\$" in t for t in words(figure) if r"\frac" in t)


def test_style_changes_text_sizes():
    with matplotlib.rc_context():
        plots.style()
        assert plt.rcParams["font.size"] == 9 and plt.rcParams["figure.dpi"] <= 90


PARTS = ("video", "views", "local", "global", "dominance", "distillation", "fusion", "evaluation")


def lit_colours(figure):
    "Colours other than white and greys that a picture of the method shows in boxes and lines."
    colours = [p.get_facecolor() for p in figure.axes[0].patches] + [line.get_color() for line in figure.axes[0].lines]
    return {matplotlib.colors.to_hex(c).upper() for c in colours} & {plots.LOCAL, plots.GLOBAL, plots.FUSED}


def test_the_method_lights_one_part_and_keeps_the_words_of_all():
    pictures = {part: plots.method(part) for part in PARTS} | {"all": plots.method()}
    assert len({tuple(sorted(words(f))) for f in pictures.values()}) == 1      # a part that is not lit is still readable
    drawn = {name: io.BytesIO() for name in pictures}
    for name, figure in pictures.items():
        figure.savefig(drawn[name], format="png", dpi=80)
    assert len({d.getvalue() for d in drawn.values()}) == len(pictures) and max(len(d.getvalue()) for d in drawn.values()) < 40_000
    assert lit_colours(pictures["local"]) == {plots.LOCAL} and lit_colours(pictures["global"]) == {plots.GLOBAL} and lit_colours(pictures["video"]) == set()
    assert plots.FUSED in lit_colours(pictures["fusion"]) and lit_colours(pictures["distillation"]) == {plots.LOCAL, plots.GLOBAL}
    assert lit_colours(plots.method(["local", "fusion"])) == {plots.LOCAL, plots.GLOBAL, plots.FUSED}


def test_texts_of_the_method_do_not_overlap():
    figure = plots.method()
    figure.canvas.draw()
    boxes = [(t.get_text(), t.get_window_extent()) for t in figure.axes[0].texts if t.get_text()]
    assert len(boxes) > 15
    assert [] == [(a, b) for i, (a, box) in enumerate(boxes) for b, other in boxes[i + 1:] if box.overlaps(other)]


def test_a_part_that_the_method_has_not_is_told():
    with pytest.raises(ValueError, match="no part 'fuson'; did you mean 'fusion'"):
        plots.method("fuson")


def bars(height, colour=0):
    figure, axes = plots._figure(1, 1, (2, 1))
    axes[0, 0].bar([0], [height], color=f"C{colour}")
    return figure


def test_without_a_front_end_sliders_are_the_figure_of_their_start():
    figure = plots.sliders(bars, height=(0.0, 5.0, 2.0), colour=(0, 3, 1))
    assert isinstance(figure, Figure) and figure.axes[0].patches[0].get_height() == 2
    with pytest.raises(ValueError, match="'height': the start 6 must lie in 0 to 5"):
        plots.sliders(bars, height=(0, 5, 6))


class Reader:
    "A front end, as far as the protocol goes: sends cells to a kernel and keeps what comes back."

    def __init__(self):
        from jupyter_client.manager import KernelManager
        path = os.pathsep.join([str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")])
        self.manager = KernelManager()
        self.manager.kernel_spec.argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        self.manager.start_kernel(env={**os.environ, "PYTHONPATH": path})
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=60)

    def until_idle(self, request):
        messages = []
        while not messages or not (messages[-1]["msg_type"] == "status" and messages[-1]["content"]["execution_state"] == "idle" and messages[-1]["parent_header"].get("msg_id") == request):
            messages.append(self.client.get_iopub_msg(timeout=60))
        assert not [m["content"]["evalue"] for m in messages if m["msg_type"] == "error"]
        return {kind: [m["content"] for m in messages if m["msg_type"] == kind] for kind in {m["msg_type"] for m in messages}}

    def run(self, code, somebody): return self.until_idle(self.client.execute(code, allow_stdin=somebody))

    def move(self, comm, **state):
        message = self.client.session.msg("comm_msg", {"comm_id": comm, "data": {"method": "update", "state": state, "buffer_paths": []}})
        self.client.shell_channel.send(message)
        return self.until_idle(message["header"]["msg_id"])


def test_in_a_kernel_sliders_move_the_figure_for_a_reader_and_leave_no_widget_for_a_machine():
    pytest.importorskip("ipykernel"), pytest.importorskip("ipywidgets")
    reader = Reader()
    try:
        reader.run("%matplotlib inline\nfrom mbd import plots\ndef draw(height):\n    figure, axes = plots._figure(1, 1, (2, 1)); axes[0, 0].bar([0], [height]); axes[0, 0].set(ylim=(0, 5)); return figure", False)
        cell = "plots.sliders(draw, height=(0.0, 5.0, 2.0))"
        alone = reader.run(cell, somebody=False)      # as nbconvert and papermill run it
        [still] = alone["execute_result"]
        assert "image/png" in still["data"] and not any("widget" in kind for kind in still["data"]) and not {"comm_open", "display_data"} & set(alone)
        met = reader.run(cell, somebody=True)         # as JupyterLab runs it
        [shown] = [m for m in met["display_data"] if "image/png" in m["data"]]
        assert shown["data"]["image/png"] == still["data"]["image/png"] and any("application/vnd.jupyter.widget-view+json" in m["data"] for m in met["display_data"])
        [knob] = [m["comm_id"] for m in met["comm_open"] if m["data"]["state"].get("_model_name") == "FloatSliderModel"]
        [moved] = reader.move(knob, value=4.0)["update_display_data"]
        assert moved["transient"]["display_id"] == shown["transient"]["display_id"] and moved["data"]["image/png"] != shown["data"]["image/png"]
    finally:
        reader.client.stop_channels()
        reader.manager.shutdown_kernel(now=True)


# as some of Something-Something's: sentences that differ in the middle only, or in a word behind a comma
ALIKE = [f"{verb} something up {how}" for verb in ("Tilting", "Lifting one side of") for how in ("completely without making it spill all over", "completely, then making it spill all over")]
ALIKE += [f"{verb} the mirror {way} while following something" for verb in ("Moving", "Pretending to move") for way in ("clockwise", "sideways", "anticlockwise")]


def test_names_that_stand_beside_each_other_differ():
    assert len({plots._name(name, 24, 2) for name in ALIKE}) < len(ALIKE) > len({plots._name(name, 36) for name in ALIKE})
    for width, lines in ((24, 2), (28, 2), (36, 1), (28, 1), (13, 1)):
        names = plots._names(ALIKE, width, lines)
        assert list(names) == ALIKE and len(set(names.values())) == len(ALIKE) and all(len(row) <= width for name in names.values() for row in name.split("\n"))
        assert all(names[text] == plots._name(text, width, lines) for text in ALIKE if [plots._name(t, width, lines) for t in ALIKE].count(plots._name(text, width, lines)) == 1)
    first, second = plots._names(ALIKE[:2], 24, 2).values()
    assert "without" in first and "then" in second and all(way in name for way, name in zip(("clockwise", "sideways", "anticlockwise"), plots._names(ALIKE[4:7], 24, 2).values()))
    assert len(set(plots._names(["x" * 40 + end + "x" * 40 for end in "abc"], 20).values())) == 3 and plots._names(["$x$", "$x$"]) == {"$x$": r"\$x\$"}


def test_classes_that_are_shortened_alike_differ_in_every_figure():
    K, video, share = len(ALIKE), np.zeros((2, 8, 8, 3), np.uint8), np.linspace(0.2, 0.8, len(ALIKE))
    p, m = np.linspace(1, 0, K), SimpleNamespace(classes=ALIKE, share=share, low=share, high=share, reference=0.5, group=["local"] * K)
    ticks = lambda axes: [t.get_text() for t in axes.get_yticklabels()]
    shown = [ticks(plots.prediction_strip(video, ALIKE, p, p, p, top=K).axes[-1]), ticks(plots.dominance_map(m).axes[0]), [t.get_text() for t in plots.share_against_range(m, share).axes[0].texts],
             ticks(plots.confusion_matrix(np.ones((K, K), int), ALIKE).axes[0]), [t.get_text() for t in plots.timeline(np.arange(2.0), ALIKE, np.stack([p, p]), p[:2]).axes[0].get_legend().get_texts()],
             [a.get_title() for a in plots.frames_strip(np.zeros((4, 8, 8, 3), np.uint8), titles=ALIKE[:4]).axes]]
    assert [len(names) for names in shown] == [K, K, K, K, 5, 4] and all(len(set(names)) == len(names) for names in shown)
    pairs = ticks(plots.confusion_matrix(np.ones((K, K), int), ALIKE, numbers_up_to=2).axes[1])
    assert len(set(pairs)) == len(pairs) == 12 and all(true != answer for true, answer in (name.split("\n  for ") for name in pairs))
