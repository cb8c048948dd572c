"""The plots of the page: the part that each layer loses, and the plans that a search scored."""

from __future__ import annotations

from typing import Any

import gradio as gr
import pandas as pd
import record_tables
from model_source import record

PART_COLOURS = {"FFN": "#0d9488", "attention": "#f59e0b", "layer": "#0d9488", "experts": "#0d9488"}
"""Colours of the parts, with enough contrast on white and on black."""
ORIGINS = {"seed": "#0ea5e9", "evolution": "#f97316", "self": "#a855f7", "random": "#84cc16", "fallback": "#eab308"}
OTHER = "#ec4899"
"""Colour of a proposer of another name, such as an endpoint's."""
FITNESS = {"kl": "KL to the dense model", "perplexity": "perplexity"}


def rates(value: pd.DataFrame, fitting: int, **settings: Any) -> gr.BarPlot:
    """Plot one bar per layer; with more than `fitting` layers, only every fifth is labelled."""
    layers = len(record()["rates"])
    return gr.BarPlot(
        value,
        x="layer",
        y="removed",
        color="part",
        color_map=PART_COLOURS,
        sort=layer_order(value),
        y_title="removed, %",
        min_width=300,
        elem_classes="rates many" if layers > fitting else "rates",
        **settings,
    )


def search_curve(plans: pd.DataFrame, fitness: str, **settings: Any) -> gr.LinePlot:
    """Plot the best fitness so far against the evaluations spent."""
    curve = record_tables.best_so_far(plans)
    return gr.LinePlot(
        curve,
        x="evaluations",
        y="fitness",
        x_title="full evaluations spent",
        y_title=fitness,
        x_lim=_around(plans["evaluations"]),
        y_lim=_around(curve["fitness"]),
        min_width=300,
        **settings,
    )


def plans(value: pd.DataFrame, fitness: str, **settings: Any) -> gr.ScatterPlot:
    """Plot one point per plan, coloured by its source."""
    return gr.ScatterPlot(
        value,
        x="evaluations",
        y="fitness",
        color="from",
        color_map=dict.fromkeys(value["from"], OTHER) | ORIGINS,
        x_title="full evaluations spent",
        y_title=fitness,
        min_width=300,
        **limits(value),
        **settings,
    )


def layer_order(rates: pd.DataFrame) -> list[str] | None:
    """Return the layers in numerical order: the plot would sort their names as text."""
    return list(dict.fromkeys(rates["layer"])) or None


def limits(plans: pd.DataFrame) -> dict[str, list[float]]:
    """Return limits of both axes with a margin around the points; empty where there are no points."""
    return {"x_lim": _around(plans["evaluations"]), "y_lim": _around(plans["fitness"])} if len(plans) else {}


def _around(values: pd.Series) -> list[float]:
    """Return limits of an axis with a margin of a tenth of the range."""
    room = 0.1 * (values.max() - values.min()) or 0.1
    return [float(values.min() - room), float(values.max() + room)]
