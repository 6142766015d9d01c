"""Controls: a figure that follows its sliders, and the predictions that a reader makes before measuring."""

import base64
import html
import json
import os
import re
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import ipywidgets
from IPython.display import display
from ipywidgets import HTML, Button, FloatText, HBox, Label, Layout, RadioButtons, VBox
from matplotlib.figure import Figure

from mini.lab.claims import escape, number
from mini.lab.figures import to_png
from mini.lab.files import home, set_aside
from mini.train import write

WIDGET = "application/vnd.jupyter.widget-view+json"


def explore(draw: Callable[..., Figure | str], alt: str, **controls: Any) -> None:
    """Show a figure or a text with controls that redo it at once: `draw(**values)` returns it for their values.

    Each control is named after an argument of `draw` and is an ipywidget, or (low, high) or (low, high, step) for
    a slider, a list for a choice, True or False for a tick box, a string for a text field. A slider starts in the
    middle; pass an ipywidget with a `description` to choose the start, the words and the unit ("tokens, in
    billions"). The first figure is kept as a plain picture too, for GitHub and wherever no kernel runs.
    """
    inputs = {name: _control(name, value) for name, value in controls.items()}
    if not inputs:
        raise ValueError("explore() has no controls; give at least one, such as width=(1, 8)")

    def render() -> tuple[str, bytes | None]:
        """What to show as HTML, and the plain picture of a figure."""
        shown = draw(**{name: widget.value for name, widget in inputs.items()})
        if isinstance(shown, str):
            return f'<pre style="white-space: pre-wrap">{html.escape(shown)}</pre>', None
        png = to_png(shown, alt)
        return _img(png, alt), png

    def redraw(_: Any) -> None:
        try:
            picture.value = render()[0]
        except Exception as error:  # a callback's error would vanish in the log
            picture.value = f"<pre>{html.escape(f'{type(error).__name__}: {error}')}</pre>"

    first, png = render()
    picture = HTML(first)
    for widget in inputs.values():
        widget.observe(redraw, "value")
    whole = VBox([*inputs.values(), picture])
    whole.add_class("mini-explore")
    text = f"{alt} (controls: {', '.join(widget.description for widget in inputs.values())})"
    _show(whole, text, png, alt)


def predict(id: str, question: str, *, unit: str = "", options: list[str] | None = None) -> None:
    """Ask for a prediction before measuring, and keep it for `recall`: one of the `options`, or a number."""
    kept = _read(id)
    start = kept["value"] if kept else None
    if options:
        field = RadioButtons(
            options=options, value=start if start in options else None, layout=Layout(width="auto")
        )
    else:
        field = FloatText(value=start if isinstance(start, int | float) else 0, layout=Layout(width="10em"))
    button = Button(
        description="Keep", tooltip="Keep this prediction until it has been measured", button_style="primary"
    )
    status = Label("" if kept is None else f"kept on {kept['on']}")

    def keep(_: Any) -> None:
        if field.value is None:
            status.value = "choose one first"
            return
        answer = {"question": question, "value": field.value, "unit": unit, "on": date.today().isoformat()}
        try:
            write(_path(id), json.dumps(answer).encode())
            status.value = "kept"
        except OSError as error:
            status.value = f"not kept: {error.strerror}"

    button.on_click(keep)
    whole = VBox(
        [HTML(f"<b>Your prediction.</b> {escape(question)}"), HBox([field, Label(unit), button, status])]
    )
    _show(whole, f"Your prediction: {question}")


def recall(id: str, measured: float | str, *, unit: str = "") -> None:
    """Set the kept prediction beside what was measured."""
    kept = _read(id)
    if kept is None:
        print(f"Measured: {number(measured)} {unit}".rstrip() + ". (You kept no prediction for this one.)")
        return
    value, unit = kept["value"], unit or kept["unit"]
    text = f"You predicted {number(value)} {unit}".rstrip() + f"; measured {number(measured)} {unit}".rstrip()
    if isinstance(value, str) or isinstance(measured, str):
        print(f"{text}. {'As you said.' if value == measured else 'Not what you said.'}")
    elif value and measured and (ratio := float(measured) / value) > 0:
        print(
            f"{text}. That is {f'{ratio:.3g}' if ratio >= 1 else f'1/{1 / ratio:.3g}'} times your prediction."
        )
    else:
        print(f"{text}.")


def _control(name: str, value: Any) -> ipywidgets.ValueWidget:
    widget = (
        value if isinstance(value, ipywidgets.Widget) else ipywidgets.interactive.widget_from_abbrev(value)
    )
    if widget is None:
        raise ValueError(
            f"{name}={value!r} is no control; give an ipywidget, (low, high, step), a list, a bool or a string"
        )
    widget.description = widget.description or name.replace("_", " ")
    widget.style.description_width = "17em"
    widget.layout.width = widget.layout.width or "41em"
    return widget


def _img(png: bytes, alt: str) -> str:
    """The picture as HTML, since ipywidgets' own Image has no text for screen readers."""
    # width and height from the PNG header, so that the page does not jump between two pictures
    width, height = (int.from_bytes(png[i : i + 4], "big") for i in (16, 20))
    data = base64.b64encode(png).decode()
    return (
        f'<img alt="{html.escape(alt)}" width="{width}" height="{height}" src="data:image/png;base64,{data}">'
    )


def _show(widget: ipywidgets.Widget, text: str, png: bytes | None = None, alt: str = "") -> None:
    """Display a widget with what stands in for it where none can be drawn."""
    bundle: dict[str, Any] = {
        "text/plain": text,
        WIDGET: {"version_major": 2, "version_minor": 0, "model_id": widget.model_id},
    }
    if png is not None:
        bundle["image/png"] = png
    display(bundle, raw=True, metadata={"image/png": {"alt": alt}} if png is not None else {})


def _path(id: str) -> Path:
    if not re.fullmatch(r"[\w-]+", id):
        raise ValueError(f"id={id!r} names a file; use letters, digits, - and _")
    return Path(os.environ.get("MINI_PREDICTIONS") or home() / "predictions") / f"{id}.json"


def _read(id: str) -> dict | None:
    path = _path(id)
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(kept, dict) or not {"value", "unit", "on"} <= kept.keys():
            raise ValueError("not a prediction")
        return kept
    except FileNotFoundError:
        return None
    except ValueError as error:
        set_aside(path, str(error))
    except OSError as error:
        print(f"Warning: {path.name} could not be read ({error.strerror})")
    return None
