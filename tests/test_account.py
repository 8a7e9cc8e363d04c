"What a run notebook shows of a schedule, in cases that the chapter's run does not reach."
from types import SimpleNamespace
import numpy as np, pytest, torch
from mbd import account, miniactions, pairs, plots
from mbd.clips import LOCAL_VIEW, View
from mbd.local_stream import LocalStream, sketched, stream_view


def shown(**more):
    "As much of a schedule as the figures look at."
    return SimpleNamespace(frames={i: np.zeros((8, 16, 16, 3), np.uint8) for i in "abcdefghij"}, unreadable={}, run=SimpleNamespace(banner=None, save_figure=lambda name, figure: None), **more)


def test_a_video_is_not_said_to_lean_on_a_stream_that_has_less_than_half_of_the_weight():
    p = torch.tensor([[.6, .4], [.3, .7]])
    end = SimpleNamespace(pair=(p.log(), p.log()), answers=SimpleNamespace(labels=torch.tensor([0, 1]), ids=["a", "b"]), fused={"adaptive": p})
    s = shown(end=end, alone=None, classes=["jump", "row"], records={i: SimpleNamespace(id=i) for i in "ab"}, model=SimpleNamespace(fusion=SimpleNamespace(weight=lambda local, global_: torch.tensor([.45, .2]))))
    titles = [figure.get_suptitle() for figure in account.strips(s)]
    assert titles[:2] == ["largest weight of the local stream: jump", "largest weight of the global stream: row"]


@pytest.mark.parametrize("rows", [2, 10])
def test_the_title_of_the_examples_stands_above_the_pictures(rows):
    fit = [SimpleNamespace(id=i, label=k) for k, i in enumerate("abcdefghij"[:rows])]
    figure = account.examples(shown(parts={"fit": fit}, classes=[f"a class of {k}" for k in range(rows)]), "a title")
    figure.canvas.draw()
    assert len(figure.axes) == 8*rows and figure._suptitle.get_window_extent().y0 >= max(a.bbox.y1 for a in figure.axes) - 1


@pytest.mark.parametrize("title, classes", [("generated data", ["Placing something that rolls onto something else so that it stays where it is"]*2), ("$\\frac$", ["$\\frac$"]*2)])
def test_the_examples_take_names_as_they_are(title, classes):
    figure = account.examples(shown(parts={"fit": [SimpleNamespace(id=i, label=k) for k, i in enumerate("ab")]}, classes=classes), title)
    figure.draw_without_rendering()      # a formula that matplotlib cannot read would raise
    assert figure.get_tightbbox().x0 > -.03 and figure.axes[0].get_ylabel().split()[-1] == plots._name(classes[0]).split()[-1]


class Own(torch.nn.Module):
    "A stream whose layers cannot be followed, as chapter 07's Tiny."
    backbone, seen = "own", frozenset()


@pytest.mark.parametrize("stream, view, words, frames", [
    (LocalStream(2), LOCAL_VIEW, "13 frames x 31 px", 13), (LocalStream(2), View(4, 3, 28), "10 frames x 28 px", 10), (LocalStream(2), View(16, sampling="segments"), "7 of its frames x 31 px", None),
    (sketched("r2plus1d_18"), stream_view("r2plus1d_18", "kinetics400"), "1.1 s x 112 px", None), (Own(), LOCAL_VIEW, "not known", None)])
def test_a_field_lies_in_the_clip_and_where_it_is_not_known_no_line_is_drawn(stream, view, words, frames):
    model = SimpleNamespace(local=stream, global_=SimpleNamespace(backbone="other", seen=()), local_view=view, global_view=view,
                            map=SimpleNamespace(classes=["ComesBack", "SameHand"], share=[.4, .6], low=[.3, .5], high=[.5, .7], group=["global", "local"], reference=.5))
    s = shown(model=model, cost={"parameters": {"local": 1, "global": 1}, "gflops_per_view": {"local": 1, "global": 1}}, pair=pairs.find_pair("ucf101"), classes=model.map.classes, spec=miniactions.Spec())
    s.run.generated = True
    assert account.streams(s).splitlines()[2].split(" | ")[3] == words and account.field(s) == frames
    panel = account.dominance(s).axes[1]
    assert panel.get_title() == (f"dashed: the local stream's field, {frames}" if frames else "")
