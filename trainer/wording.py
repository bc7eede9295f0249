"""How figures are written for people: in the progress bar, in the plain log lines and in the report."""

from __future__ import annotations

import math


def number(value: float, digits: int = 3) -> str:
    """``value`` to ``digits`` significant digits: 0.123, 12.3, 1,234, 2.1e-5. Whole numbers (int) are written whole."""
    if isinstance(value, int):
        return f"{value:,d}"
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude < -3 or magnitude > 8:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:,.{max(0, digits - 1 - magnitude)}f}"


def brief(value: float) -> str:
    """``number`` without the zeros at its end: for bounds and targets, which somebody set."""
    text = number(value)
    if isinstance(value, int) or "." not in text:
        return text
    mantissa, mark, exponent = text.partition("e")
    return mantissa.rstrip("0").rstrip(".") + mark + exponent


def fixed(value: float, decimals: int) -> str:
    """``value`` with so many decimals, without the minus of a value that rounds to zero."""
    text = f"{value:,.{decimals}f}"
    return text.removeprefix("-") if float(text.replace(",", "")) == 0 else text


def decimals_of_intervals(*half_widths: float) -> int:
    """Decimals, at most 4, at which the narrowest interval shows two digits, so that means and bounds are alike."""
    widths = [width for width in half_widths if width > 0]
    if not widths:
        return 3
    return min(4, max(0, 1 - math.floor(math.log10(min(widths)))))


def percent(share: float) -> str:
    """A share of 1 in percent: 0.4 %, 12 %, 100 %."""
    value = 100.0 * share
    return f"{fixed(value, 1 if 0 < abs(value) < 9.95 else 0)} %"


def duration(seconds: float) -> str:
    """31 ms, 3.2 s, 42 s, 11 min 20 s, 3 h 05 min, 2 d 4 h."""
    if 0 < seconds < 0.9995:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if minutes == 0:
        return f"{whole} s"
    if hours == 0:
        return f"{minutes} min {whole % 60:02d} s"
    if days < 2:
        return f"{hours} h {minutes % 60:02d} min"
    return f"{days} d {hours % 24} h"
