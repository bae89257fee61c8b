"""PromQL made from declared series: an expression can name nothing that the declarations do not."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tidemill.core.metrics import Kind, Series

# What a scrape adds to every series; see cluster/discovery.py.
TARGET_LABELS = frozenset({"cluster", "component", "worker", "instance", "job"})


@dataclass(frozen=True, slots=True)
class Expr:
    """An expression, and the declarations it was made from."""

    text: str
    series: tuple[Series, ...]

    def __truediv__(self, other: "Expr") -> "Expr":
        return Expr(f"{self.text} / {other.text}", self.series + other.series)

    def or_zero(self) -> "Expr":
        """For counters of what should never happen: nothing counted yet is 0."""
        return Expr(f"{self.text} or vector(0)", self.series)


def combine(template: str, **parts: Expr) -> Expr:
    """Parts put together by operators: `combine("{a} > 0 unless {b} > 0", a=..., b=...)`."""
    text = template.format_map({name: part.text for name, part in parts.items()})
    return Expr(text, tuple(series for part in parts.values() for series in part.series))


@dataclass(frozen=True, slots=True)
class PromQL:
    """Makes expressions over a window, of the targets that `scope` selects."""

    window: str
    scope: Mapping[str, str] = field(default_factory=dict)

    def value(self, series: Series, by: tuple[str, ...], aggregate: str = "sum", **where: str) -> Expr:
        """A gauge now, aggregated by labels."""
        _expect(series, Kind.GAUGE)
        return Expr(_aggregated(aggregate, by, self._select(series, "", by, where)), (series,))

    def rate(self, series: Series, by: tuple[str, ...], **where: str) -> Expr:
        """A counter's growth in a second."""
        _expect(series, Kind.COUNTER)
        return self._rate(series, "", by, where)

    def increase(self, series: Series, by: tuple[str, ...], **where: str) -> Expr:
        """A counter's growth in the window."""
        _expect(series, Kind.COUNTER)
        selected = self._select(series, "", by, where)
        return Expr(_aggregated("sum", by, f"increase({selected}[{self.window}])"), (series,))

    def over_time(self, function: str, series: Series, by: tuple[str, ...], aggregate: str, **where: str) -> Expr:
        """A gauge's history in the window, such as `changes` or `min_over_time`."""
        _expect(series, Kind.GAUGE)
        selected = self._select(series, "", by, where)
        return Expr(_aggregated(aggregate, by, f"{function}({selected}[{self.window}])"), (series,))

    def quantile(self, share: float, series: Series, by: tuple[str, ...] = (), **where: str) -> Expr:
        """Of a histogram's observations in the window."""
        _expect(series, Kind.HISTOGRAM)
        buckets = self._rate(series, "_bucket", ("le", *by), where)
        return Expr(f"histogram_quantile({share:g}, {buckets.text})", (series,))

    def mean(self, series: Series, by: tuple[str, ...] = (), **where: str) -> Expr:
        """Of a histogram's observations in the window."""
        _expect(series, Kind.HISTOGRAM)
        return self._rate(series, "_sum", by, where) / self._rate(series, "_count", by, where)

    def spent(self, series: Series, by: tuple[str, ...] = (), **where: str) -> Expr:
        """What a histogram's observations add up to in a second."""
        _expect(series, Kind.HISTOGRAM)
        return self._rate(series, "_sum", by, where)

    def _rate(self, series: Series, suffix: str, by: tuple[str, ...], where: Mapping[str, str]) -> Expr:
        selected = self._select(series, suffix, by, where)
        return Expr(_aggregated("sum", by, f"rate({selected}[{self.window}])"), (series,))

    def _select(self, series: Series, suffix: str, by: tuple[str, ...], where: Mapping[str, str]) -> str:
        known = {*series.labels, *TARGET_LABELS, *(["le"] if suffix == "_bucket" else [])}
        unknown = {*by, *where, *self.scope} - known
        if unknown:
            raise ValueError(f"{series.name} has no label {', '.join(sorted(unknown))}; it has {sorted(known)}")
        labels = ", ".join(_matcher(name, value) for name, value in {**self.scope, **where}.items())
        return f"{series.name}{suffix}" + (f"{{{labels}}}" if labels else "")


def _matcher(label: str, value: str) -> str:
    """`!value` selects all others."""
    return f'{label}!="{value[1:]}"' if value.startswith("!") else f'{label}="{value}"'


def _aggregated(aggregate: str, by: tuple[str, ...], inner: str) -> str:
    return f"{aggregate} by ({', '.join(by)}) ({inner})" if by else f"{aggregate}({inner})"


def _expect(series: Series, kind: Kind) -> None:
    if series.kind is not kind:
        raise ValueError(f"{series.name} is a {series.kind}, and a {kind} is needed here")
