"""Controls redraw their figure; predictions are kept and survive trouble."""

import json
import os
import re

import ipywidgets
import matplotlib.pyplot as plt
import pytest

from mini.lab import explore, predict, recall, widgets

ALT = "A line that rises with the width"


@pytest.fixture(autouse=True)
def shown(monkeypatch, tmp_path):
    """What was displayed; predictions are kept in a fresh folder."""
    bundles = []
    monkeypatch.setenv("MINI_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MINI_PREDICTIONS", raising=False)
    monkeypatch.setattr(widgets, "display", lambda data, raw, metadata: bundles.append((data, metadata)))
    return bundles


def draw(width=2, kind="line", grid=True, title=""):
    fig, ax = plt.subplots()
    ax.plot([0, width], marker="o" if kind == "dots" else None)
    ax.set(xlabel="x", ylabel="y", title=title)
    ax.grid(grid)
    return fig


def widget(bundle) -> ipywidgets.Widget:
    return ipywidgets.widgets.widget._instances[bundle[0][widgets.WIDGET]["model_id"]]


def test_explore_shows_widget_and_picture_and_text(shown):
    explore(draw, ALT, width=(1, 8), kind=["line", "dots"], grid=True, title="T")
    data, metadata = shown[0]
    assert data["image/png"].startswith(b"\x89PNG")
    assert metadata["image/png"]["alt"] == ALT
    assert data["text/plain"] == f"{ALT} (controls: width, kind, grid, title)"
    kinds = [type(w).__name__ for w in widget(shown[0]).children]
    assert kinds == ["IntSlider", "Dropdown", "Checkbox", "Text", "HTML"]
    assert f'alt="{ALT}"' in widget(shown[0]).children[-1].value


def test_moving_a_control_redraws_and_leaves_no_figure_open(shown):
    explore(draw, ALT, width=(1, 8))
    slider, picture = widget(shown[0]).children
    before = picture.value
    slider.value = 7
    assert picture.value != before
    slider.value = 4  # the middle, where it started
    assert picture.value == before
    assert plt.get_fignums() == []


def test_a_text_can_be_explored_too(shown):
    explore(lambda times: "<b> " * times, "A repeated word", times=(1, 3))
    data, _ = shown[0]
    assert "image/png" not in data
    assert data["text/plain"] == "A repeated word (controls: times)"
    slider, text = widget(shown[0]).children
    assert text.value == '<pre style="white-space: pre-wrap">&lt;b&gt; &lt;b&gt; </pre>'
    slider.value = 1
    assert text.value == '<pre style="white-space: pre-wrap">&lt;b&gt; </pre>'


def test_an_error_while_moving_is_shown_in_place_of_the_figure(shown):
    def fragile(width=2):
        if width > 5:
            raise ValueError(f"width={width} <is> too much")
        return draw(width)

    explore(fragile, ALT, width=(1, 8))
    slider, picture = widget(shown[0]).children
    slider.value = 6
    assert picture.value == "<pre>ValueError: width=6 &lt;is&gt; too much</pre>"
    slider.value = 2
    assert picture.value.startswith("<img")


def test_a_ready_made_control_keeps_its_words(shown):
    slider = ipywidgets.FloatLogSlider(1e-3, base=10, min=-4, max=-1, description="learning rate, per step")
    explore(lambda rate: draw(rate), ALT, rate=slider)
    assert "learning rate, per step" in shown[0][0]["text/plain"]
    assert slider.description == "learning rate, per step"


@pytest.mark.parametrize(
    ("controls", "words"), [({}, "has no controls"), ({"width": object()}, "width=.* is no control")]
)
def test_bad_controls_are_refused(controls, words):
    with pytest.raises(ValueError, match=words):
        explore(draw, ALT, **controls)


def answer(shown, value) -> str:
    """Type a value into the newest prediction, press Keep, and give what the widget says."""
    field, _, button, status = widget(shown[-1]).children[1].children
    field.value = value
    button.click()
    return status.value


def test_prediction_is_kept_and_recalled(shown, capsys):
    predict("cost", "How many million dollars?", unit="M$")
    assert shown[0][0]["text/plain"] == "Your prediction: How many million dollars?"
    assert answer(shown, 100.0) == "kept"
    recall("cost", 5.576)
    assert (
        capsys.readouterr().out
        == "You predicted 100 M$; measured 5.576 M$. That is 1/17.9 times your prediction.\n"
    )
    predict("cost", "How many million dollars?", unit="M$")
    assert widget(shown[-1]).children[1].children[0].value == 100.0


def test_choice_is_kept_and_recalled(shown, capsys):
    predict("who", "Which is larger?", options=["dense", "MoE"])
    assert answer(shown, None) == "choose one first"
    assert answer(shown, "MoE") == "kept"
    recall("who", "dense")
    assert capsys.readouterr().out == "You predicted MoE; measured dense. Not what you said.\n"
    recall("who", "MoE")
    assert capsys.readouterr().out == "You predicted MoE; measured MoE. As you said.\n"


def test_a_kept_choice_is_shown_again_if_it_can_still_be_made(shown):
    predict("who", "Which is larger?", options=["dense", "MoE"])
    answer(shown, "MoE")
    for options, value in ((["dense", "MoE"], "MoE"), (["dense", "sparse"], None), (None, 0)):
        predict("who", "Which is larger?", options=options)
        assert widget(shown[-1]).children[1].children[0].value == value


def test_predictions_can_be_kept_in_another_folder(tmp_path, shown, monkeypatch):
    monkeypatch.setenv("MINI_PREDICTIONS", str(tmp_path / "elsewhere"))
    predict("cost", "How many?")
    answer(shown, 2.0)
    assert json.loads((tmp_path / "elsewhere" / "cost.json").read_text())["value"] == 2.0
    assert not (tmp_path / "home" / "predictions").exists()


def test_recall_without_prediction(capsys):
    recall("never", 3.5, unit="GB")
    assert capsys.readouterr().out == "Measured: 3.5 GB. (You kept no prediction for this one.)\n"


@pytest.mark.parametrize(
    ("said", "ending"),
    [(0.0, "measured 4."), (-2.0, "measured 4."), (2.0, "That is 2 times your prediction.")],
)
def test_ratios_are_given_where_they_mean_something(shown, capsys, said, ending):
    predict("x", "How many?")
    answer(shown, said)
    recall("x", 4)
    assert capsys.readouterr().out.strip().endswith(ending)


@pytest.mark.parametrize("content", [b"{not json", b"[1, 2]", b"\xff\xfe\x00", b'{"value": 3}', b""])
def test_corrupt_file_is_set_aside_and_said(tmp_path, shown, capsys, content):
    path = tmp_path / "home" / "predictions" / "cost.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    recall("cost", 3)
    assert "Warning: cost.json could not be used" in capsys.readouterr().out
    assert (path.parent / "cost.json.broken-0").read_bytes() == content
    predict("cost", "How many?")
    answer(shown, 2.0)
    assert json.loads(path.read_text())["value"] == 2.0


def test_full_disk_is_said_and_the_old_prediction_stays(shown, monkeypatch, capsys):
    predict("cost", "How many?")
    answer(shown, 2.0)

    def full(source, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert re.match(r"not kept: could not save .* \(No space left on device;", answer(shown, 3.0))
    recall("cost", 2)
    assert "You predicted 2;" in capsys.readouterr().out


@pytest.mark.parametrize("id", ["../up", "a b", ""])
def test_ids_are_file_names(id):
    with pytest.raises(ValueError, match="letters, digits"):
        predict(id, "How many?")
