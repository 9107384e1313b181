"""How the report says numbers and decisions, the same on every face. Plain strings, quick to import."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

MINUS = "\N{MINUS SIGN}"


class Decision(StrEnum):
    """What became of one task, worst first."""

    FAILED = "failed"
    IN_PRODUCTION = "regressed in production"
    """The champion itself answers worse than when it was promoted: what it runs on changed."""
    REFUSED = "refused"
    HELD_BACK = "held back"
    IN_DOUBT = "in doubt"
    """The champion answers differently than when it was promoted, and too few examples tell whether worse."""
    AGAINST_ADVICE = "promoted against advice"
    """gate.policy is advisory, and another policy would not have promoted it."""
    UNPROVEN = "promoted, not proven"
    PROMOTED = "promoted"
    VERIFIED_AGAIN = "verified again"
    """The champion was evaluated again on what it runs on now, and is not worse."""
    UNCHANGED = "unchanged"
    VERIFIED = "verified"


TONES = {
    Decision.FAILED: "bad",
    Decision.IN_PRODUCTION: "bad",
    Decision.REFUSED: "bad",
    Decision.HELD_BACK: "warn",
    Decision.IN_DOUBT: "warn",
    Decision.AGAINST_ADVICE: "warn",
    Decision.UNPROVEN: "warn",
    Decision.PROMOTED: "good",
    Decision.VERIFIED_AGAIN: "good",
    Decision.UNCHANGED: "calm",
    Decision.VERIFIED: "calm",
}
MARKS = {"bad": "✕", "warn": "?", "good": "✓", "calm": "="}


def percent(value: float) -> str:
    """0.1234 -> 12.3 %."""
    return f"{100 * value:.1f} %"


def points(value: float) -> str:
    """Format a difference of two shares in points, with its sign; what rounds to zero has none."""
    return f"{100 * value:+.1f}".replace("+0.0", "0.0").replace("-0.0", "0.0")


def signed(value: float) -> str:
    """As `points`, with a real minus sign."""
    return points(value).replace("-", MINUS)


def share(value: float) -> str:
    """0.7891 -> .789, as tables of methods have it."""
    return f"{value:.3f}".removeprefix("0")


def signed_share(value: float) -> str:
    """0.0312 -> +.031; what rounds to zero has no sign."""
    text = f"{abs(value):.3f}".removeprefix("0")
    return text if text == ".000" else f"{'+' if value > 0 else MINUS}{text}"


def duration(seconds: float) -> str:
    """A time as people read it."""
    if seconds < 1:
        return f"{1000 * seconds:.2g} ms" if seconds < 0.1 else f"{1000 * seconds:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def size(num_bytes: float) -> str:
    """A size on disk as people read it."""
    if num_bytes < 1e3:
        return f"{num_bytes:.0f} B"
    return f"{num_bytes / 1e3:.0f} kB" if num_bytes < 1e5 else f"{num_bytes / 1e6:.1f} MB"


def p_value(value: float) -> str:
    """A p value as people read it."""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def listed(names: Sequence[str], most: int = 4) -> str:
    """a, b and c; what is too much is counted."""
    shown = list(names) if len(names) <= most else [*names[: most - 1], f"{len(names) - most + 1} more"]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def cut(text: str, most: int) -> str:
    """At most so many characters, and a sign that there were more."""
    return text if len(text) <= most else text[:most] + " …"
