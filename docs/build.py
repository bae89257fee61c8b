"""Writes docs/settings.md and docs/metrics.md from the declarations: python docs/build.py"""

from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from tidemill.core.metrics import CONTROLLER_SERIES, ROUTER_SERIES, WORKER_SERIES, Series
from tidemill.core.settings import Settings

HERE = Path(__file__).parent
NOTE = "<!-- written by docs/build.py from the declarations; `make docs` writes it again -->\n"


def settings_page() -> str:
    """Every setting with its type, default and meaning."""
    lines = ["# Settings", "", NOTE, "A YAML file; see `deploy/local.yaml`. Unknown keys are errors.", ""]
    lines += _section("", Settings)
    return "\n".join(lines) + "\n"


def _section(prefix: str, model: type[BaseModel]) -> list[str]:
    rows, nested = [], []
    for name, field in model.model_fields.items():
        inner = _nested(field.annotation)
        meaning = " ".join((field.description or "").split())
        if inner is None:
            default = "required" if field.is_required() else f"`{field.default}`"
            rows.append(f"| `{prefix}{name}` | {_type(field.annotation)} | {default} | {meaning} |")
        else:
            key = "CLASS." if "dict" in str(field.annotation) else ""
            optional = " Optional." if type(None) in get_args(field.annotation) else ""
            about = f"{(inner.__doc__ or '').strip()}{optional} {meaning}".strip()
            nested += ["", f"## `{prefix}{name}`", about, "", *_section(f"{prefix}{name}.{key}", inner)]
    table = ["| Setting | Type | Default | Meaning |", "|---|---|---|---|", *rows] if rows else []
    return table + nested


def _nested(annotation: Any) -> type[BaseModel] | None:
    """The section a field holds, if it holds one: itself, optionally, or by name."""
    for each in (annotation, *get_args(annotation)):
        if isinstance(each, type) and issubclass(each, BaseModel):
            return each
    return None


def _type(annotation: Any) -> str:
    text = getattr(annotation, "__name__", None) if not get_args(annotation) else None
    words = {"typing.": "", "pathlib.": "", "NoneType": "none", "None": "none", "|": "or"}
    found = text or str(annotation)
    for old, new in words.items():
        found = found.replace(old, new)
    return found


METRIC_COLUMNS = ("Series", "Type", "Unit", "Labels", "What it is", "When it moves")


def metrics_page() -> str:
    """Every series with its type, unit, labels and what to do when it moves."""
    lines = [
        "# Metrics",
        "",
        NOTE,
        "Served for Prometheus by the router, each worker and the controller; `tidemill status` shows where.",
        "A scrape adds `cluster`, `component` and `worker` (see [operations.md](operations.md)). Unit 1 is a count.",
        "Beside these, each process serves its own `process_*`, and a vLLM worker its engine's `vllm:*`.",
    ]
    for title, series in (("Router", ROUTER_SERIES), ("Workers", WORKER_SERIES), ("Controller", CONTROLLER_SERIES)):
        lines += ["", f"## {title}", f"| {' | '.join(METRIC_COLUMNS)} |", "|---" * len(METRIC_COLUMNS) + "|"]
        lines += [_row(each) for each in series]
    return "\n".join(lines) + "\n"


def _row(series: Series) -> str:
    labels = ", ".join(f"`{label}`" for label in series.labels)
    return f"| `{series.name}` | {series.kind} | {series.unit} | {labels} | {series.help} | {series.when_it_moves} |"


PAGES = {"settings.md": settings_page, "metrics.md": metrics_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (HERE / name).write_text(page(), encoding="utf-8")
