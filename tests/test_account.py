"What a run notebook shows of a schedule, in cases that the chapter's run does not reach."
from types import SimpleNamespace
import numpy as np, pytest, torch
from mbd import account


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
