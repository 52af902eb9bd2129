"""How numbers read in a sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence


def significant(value: float, digits: int = 2) -> str:
    """To that many significant digits, without an exponent where the number is of ordinary size: 0.012, 350,
    1.3e-7."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        return f"{value:.{decimals}f}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def percent(fraction: float) -> str:
    """A fraction as percent to two significant digits, or as many as it takes to tell a share from all; what is below
    0.001 % or closer to 100 % is said to be so."""
    if not math.isfinite(fraction):
        return f"{fraction} %"
    if abs(fraction - 1) < 1e-12:
        fraction = 1.0  # but for the rounding of what was computed
    if 0 < abs(fraction) < 1e-5:
        return "less than 0.001 %"
    if 1 - 1e-5 < fraction < 1:
        return "more than 99.999 %"
    digits = 2
    while fraction < 1 and float(significant(100 * fraction, digits)) >= 100:
        digits += 1
    return f"{significant(100 * fraction, digits)} %"


def p_value_text(p_value: float) -> str:
    """A p-value, which no model of noise makes meaningful below 1e-12; an en dash where there is none."""
    return "–" if not math.isfinite(p_value) else "< 1e-12" if p_value < 1e-12 else significant(p_value)


def plural(count: int, noun: str) -> str:
    """`1 prompt`, `3 prompts`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def with_article(noun: str) -> str:
    """`a Huginn`, `an Ouro`."""
    return f"{'an' if noun[0] in 'AEIOUaeiou' else 'a'} {noun}"


def counted_parts(groups: Sequence[tuple[int, str]], total: int, things: str) -> list[str]:
    """Of (count, verb phrase): `12 of 20 tokens (60 %) orbit`, and without the total in those that follow."""
    counts = (
        f"{count:,} of {total:,} {things}" if place == 0 else f"{count:,}" for place, (count, _) in enumerate(groups)
    )
    return [f"{said} ({percent(count / total)}) {verb}" for said, (count, verb) in zip(counts, groups, strict=True)]


def duration(seconds: float) -> str:
    """To the unit that matters: `40 s`, `5 min`, `2 h 10 min`."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def listed(words: Sequence[str], last: str = "and") -> str:
    """`a`, `a and b`, `a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}" if words else ""


def layout_text(prelude: int, recurrent: int, coda: int, recurrences: int | str | None = "R") -> str:
    """In the paper's notation, (p, k ⊗ R, c), or the number of layers of a feed-forward model."""
    if not recurrent:
        return f"{prelude + coda} layers, feed-forward"
    return f"({prelude}, {recurrent} ⊗ {recurrences}, {coda})"


def spans(indices: Sequence[int]) -> str:
    """Sorted indices with runs drawn together: `0–3, 5`."""
    runs: list[tuple[int, int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1] = runs[-1][0], index
        else:
            runs.append((index, index))
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in runs)


def visible(text: str, longest: int = 40) -> str:
    """White space made visible, other characters without a shape as dots, cut to `longest` characters.

    Nothing is escaped: what shows it must not read markup in it.
    """
    shown = "".join(
        {"\n": "⏎", "\t": "⇥", "\r": "␍"}.get(char, char if char.isprintable() or char == " " else "·") for char in text
    )
    if not shown.strip():
        shown = shown.replace(" ", "␣")
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"
