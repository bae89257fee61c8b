"""What benchmarks/speculation.py found, as a table, as CSV, and as verdicts on what drafts are to be worth."""

import csv
import statistics
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.speculation_cluster import Measured

NONE, CHAIN, OURS, SYNCHRONOUS = "none", "fixed chain of 4", "out of the box", "synchronous"
VLLM_OURS, VLLM_THEIRS = "vllm: Tidemill", "vllm: vLLM"
NOISE = 0.97  # two clusters without drafts differ by so much

Found = dict[tuple[str, str], list[Measured]]  # part and way; a part's first way is what its others are compared with


def tpot_s(runs: list[Measured]) -> float:
    return statistics.median(run.tpot_s for run in runs)


def tokens_per_s(runs: list[Measured]) -> float:
    return statistics.median(run.tokens_per_s for run in runs)


def base_of(found: Found, part: str) -> list[Measured]:
    """Its first way."""
    return next(runs for (name, _), runs in found.items() if name == part)


def speed_up(found: Found, part: str, way: str) -> float:
    return tpot_s(base_of(found, part)) / tpot_s(found[part, way])


def ratio(found: Found, part: str, way: str) -> float:
    """Of tokens per second."""
    return tokens_per_s(found[part, way]) / tokens_per_s(base_of(found, part))


def verdicts(found: Found) -> Iterator[tuple[bool, str]]:
    """Of what was measured: whether it is as it is to be, and in words."""
    for part, least in (("batch1, greedy", 2.2), ("batch1, T = 1", 1.7)):
        if (part, OURS) in found:
            value = speed_up(found, part, OURS)
            yield value >= least, f"{part}: {value:.2f}x, at least {least}x"
    near, far = "delay 0 ms", "delay 5 ms"
    if (near, OURS) in found and (far, OURS) in found:
        kept, waited = (speed_up(found, far, way) / speed_up(found, near, way) for way in (OURS, SYNCHRONOUS))
        yield kept >= 0.8, f"{far}: {kept:.0%} of the undelayed speed-up, at least 80% (synchronous: {waited:.0%})"
    many = "batch8, greedy"
    if (many, OURS) in found:
        ours, fixed = (min(ratio(found, many, way), speed_up(found, many, way)) for way in (OURS, CHAIN))
        yield ours >= 0.97 and fixed < 1, f"{many}: {ours:.2f} of none, at least 0.97, while {CHAIN} has {fixed:.2f}"
    for part in dict.fromkeys(part for part, _ in found if part.startswith("lost")):
        value = ratio(found, part, OURS)
        yield value >= NOISE, f"{part}: {value:.2f} of the tokens per second without drafts, at least {NOISE}"
    if (VLLM_OURS, OURS) in found:
        theirs = [way for part, way in found if part == VLLM_THEIRS][1:]
        best = max(theirs, key=lambda way: speed_up(found, VLLM_THEIRS, way))
        ours, value = speed_up(found, VLLM_OURS, OURS), speed_up(found, VLLM_THEIRS, best)
        yield (
            ours / value >= 1.3,
            f"vllm: {ours:.2f}x, {ours / value:.2f} times vLLM's {value:.2f}x ({best}), 1.3 needed",
        )
    for part, way in found:
        if part != VLLM_THEIRS and not _same(found, part, way):
            yield False, f"{part}, {way}: other tokens than without drafts"


def _same(found: Found, part: str, way: str) -> bool:
    return all(run.tokens == base_of(found, part)[0].tokens for run in found[part, way])


def report(console: Console, found: Found, file: Path) -> None:
    """A table and the verdicts, and the table as CSV."""
    rows = [
        (
            *(part, way, tpot_s(runs) * 1e3, speed_up(found, part, way)),
            *(tokens_per_s(runs), ratio(found, part, way)),
            *(statistics.median(run.accepted for run in runs), statistics.median(run.drafted for run in runs)),
            _same(found, part, way),
        )
        for (part, way), runs in found.items()
    ]
    console.width = max(console.width, 110)
    table = Table("part", "drafts", title="padded target: 174M parameters that say what 11M say")
    for heading in ("TPOT ms", "speed-up", "tokens/s", "ratio", "accepted", "drafted", "same tokens"):
        table.add_column(heading, justify="right", no_wrap=True)
    for part, way, *figures, same in rows:
        formats = ("{:.2f}", "{:.2f}x", "{:.0f}", "{:.2f}", "{:.2f}", "{:.2f}")
        cells = [text.format(value) if value else "" for text, value in zip(formats, figures, strict=True)]
        table.add_row(part, way, *cells, "yes" if same else "NO")
    console.print(table)
    for met, words in verdicts(found):
        console.print("met   " if met else "MISSED", words, soft_wrap=True)
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(
            ["part", "drafts", "tpot_ms", "speed_up", "tokens_per_s", "ratio", "accepted", "drafted", "same"]
        )
        writer.writerows(rows)
    console.print(f"written to {file}")
