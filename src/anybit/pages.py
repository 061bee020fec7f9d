"""What a run found, as one self-contained page: nothing is asked of the network."""

from collections.abc import Mapping
from typing import Any


def search_page(report: Mapping[str, Any]) -> str:
    """Every evaluated subnet over its cost, the front, and the front measured again; hovering shows the scheme."""
    import plotly.graph_objects as go

    figure = go.Figure()
    origins = {"uniform": "uniform", "drawn": "drawn", "sensitivity": "one layer changed", "searched": "searched", "allocated": "allocated"}
    symbols = {"uniform": "diamond", "drawn": "circle-open", "sensitivity": "x-thin-open", "searched": "circle", "allocated": "square"}
    for origin, name in origins.items():
        rows = [row for row in report["evaluated"] if row["origin"] == origin]
        if rows:
            figure.add_scatter(
                x=[row["cost"] for row in rows],
                y=[row["score"] for row in rows],
                text=[_words(row["scheme"]) for row in rows],
                mode="markers",
                marker_symbol=symbols[origin],
                name=name,
            )
    front = report["front"]
    told = {"x": [row["cost"] for row in front], "text": [_words(row["scheme"]) for row in front]}
    figure.add_scatter(**told, y=[row["score"] for row in front], mode="lines", line_shape="hv", name="front")
    figure.add_scatter(
        **told, y=[row["measured"] for row in front], mode="lines+markers", line_dash="dot", name="front, measured on other inputs"
    )
    title = f"{len(report['evaluated'])} subnets, {report['settings']['strategy']}"
    figure.update_layout(title=title, xaxis_title=report["quantity"], yaxis_title=report["score"], template="plotly_white")
    return _page([figure])


def growth_page(report: Mapping[str, Any]) -> str:
    """The bits of every layer over the epochs, the network's bits against the budget, and accuracy soft and frozen."""
    import plotly.graph_objects as go

    epochs = report["epochs"]
    numbers = [row["epoch"] for row in epochs]
    names = list(epochs[-1]["layers"])
    bits = [[row["layers"][name] for row in epochs] for name in names]
    grid = go.Figure(
        go.Heatmap(x=numbers, y=names, z=bits, zmin=0, zmax=8, colorscale="Cividis", texttemplate="%{z}", colorbar_title="bits")
    )
    grid.update_layout(title="Bits of every layer", xaxis_title="epoch", yaxis_autorange="reversed", height=200 + 22 * len(names))
    whole = go.Figure(go.Scatter(x=numbers, y=[row["weight_bits"] for row in epochs], name="bits a weight"))
    whole.update_layout(title=f"Bits a weight (budget {report['budget'] or 'none'})", xaxis_title="epoch", template="plotly_white")
    figures = [grid, whole]
    score = next((key for key in ("top1", "loss") if key in epochs[-1].get("frozen", {})), None)
    if score:
        lines = go.Figure()
        for kind in ("soft", "frozen"):
            lines.add_scatter(x=numbers, y=[row[kind][score] for row in epochs], name=f"{kind} {score}")
        lines.update_layout(title=f"{score}, as it trains and as it would be saved", xaxis_title="epoch", template="plotly_white")
        figures.append(lines)
    return _page(figures)


def _words(scheme: Mapping[str, str]) -> str:
    return "<br>".join(f"{name} {precision}" for name, precision in scheme.items())


def _page(figures: list) -> str:
    """The figures one under another; the library that draws them is in the page, once."""
    parts = [figure.to_html(full_html=False, include_plotlyjs=index == 0) for index, figure in enumerate(figures)]
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>anybit</title>'
    return f"{head}<body>{''.join(parts)}</body></html>\n"
