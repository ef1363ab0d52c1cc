"""Numbers for people: percentages, losses, times and counts as short text.

A unit is set off by a space that does not break.
"""

from __future__ import annotations

import math

PERCENT = "\N{NO-BREAK SPACE}%"


def percent(fraction: float, digits: int = 1) -> str:
    """Return a fraction as a percentage: 0.934 is "93.4 %", a trace "<0.1 %", nothing "0 %"."""
    if fraction == 0:
        return f"0{PERCENT}"
    shown = f"{100 * fraction:.{digits}f}{PERCENT}"
    if not any(figure in "123456789" for figure in shown):
        return f"{'<' if fraction > 0 else '>−'}{10.0**-digits:.{digits}f}{PERCENT}"
    return signed(shown)


def fine_percent(fraction: float) -> str:
    """Return a fraction as a percentage of two significant digits: 0.000357 is "0.036 %"."""
    size = abs(100 * fraction)
    if 0 < size < 1e-3:
        return number(100 * fraction, 2) + PERCENT
    return percent(fraction, 0 if size >= 9.95 else 1 if size >= 0.995 else _digits(size))


def points(difference: float) -> str:
    """Return a difference of two fractions in percentage points with its sign: "+1.3", "−0.04"."""
    size = abs(100 * difference)
    digits = 1 if size >= 0.995 or not size else min(_digits(size), 4)
    shown = fixed(100 * difference, digits)
    return f"+{shown}" if difference > 0 else shown


def percent_range(low: float, high: float) -> str:
    """Return an interval of fractions as "91.8–94.9 %"."""
    return f"{percent(low).removesuffix(PERCENT)}–{percent(high)}"


def number(value: float, digits: int = 3) -> str:
    """Return a number with a few significant digits; exponents only where they help."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e6:
        whole = len(f"{abs(value):.0f}") if abs(value) >= 1 else 0
        shown = f"{value:,.{max(digits - whole, 0)}f}" if whole else f"{value:.{digits}g}"
        return signed(shown)
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return signed(f"{mantissa}e{int(exponent)}")


def fixed(value: float, digits: int = 2) -> str:
    """Return a number with so many decimals, as cosines are shown; no negative zero."""
    shown = f"{value:.{digits}f}"
    return signed(shown if any(figure in "123456789" for figure in shown) else shown.lstrip("-"))


def seconds(value: float) -> str:
    """Return a time: "0.42 s", "12.3 s" or "3 min 05 s"."""
    if value < 1:
        return f"{value:.2f} s"
    if value < 59.95:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s"


def _digits(size: float) -> int:
    return 1 - math.floor(math.log10(size)) if size else 0


def signed(text: str) -> str:
    """Return the text with a true minus sign, which is as wide as a digit."""
    return text.replace("-", "−")


def listed(words: tuple[str, ...]) -> str:
    """Return "a", "a and b" or "a, b and c"."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def in_words(count: int) -> str:
    """Return small counts as words: 4 is "four"."""
    words = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    return words[count] if count < len(words) else f"{count:,}"


def counted(count: int, noun: str) -> str:
    """Return "1 layer" or "33 layers"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
