"""Signs in a run's metrics that a person should look at, and counts of what it dropped."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from agentrl.report.plain import is_count

Metrics = Sequence[Mapping[str, Any]]

STEP_REWARD = "credit_step_reward_mean"

RISE = 3.0
"""Standard errors by which the step reward must have risen, for the alarm."""


def reward_alarm(metrics: Metrics) -> dict[str, Any] | None:
    """Looks for step reward that rises while success does not: the policy may be learning to please the PRM.

    A window of a fifth of the run (5 to 20 iterations) is compared with the one before it, at every iteration. The
    alarm rings where the mean step reward rose by more than `RISE` standard errors of the difference, and success by
    less than one.

    Args:
        metrics: of a run, oldest first.

    Returns:
        `ringing` (at the last iteration), `iterations` where it rang, `window`, and of the last comparison
        `reward_before`, `reward_after`, `success_before`, `success_after`. None: too few iterations with a step reward
        (two windows), or no step reward at all.
    """
    rows = [m for m in metrics if _number(m.get(STEP_REWARD)) and _number(m.get("success"))]
    window = min(20, max(5, len(rows) // 5))
    if len(rows) < 2 * window:
        return None
    rang: list[int] = []
    last: dict[str, float] = {}
    ringing = False
    for end in range(2 * window, len(rows) + 1):
        before, after = rows[end - 2 * window : end - window], rows[end - window : end]
        reward, reward_error = _change(before, after, STEP_REWARD)
        success, success_error = _change(before, after, "success")
        ringing = reward > 0 and reward > RISE * reward_error and success < success_error
        if ringing:
            rang.append(int(after[-1]["iteration"]))
        last = {
            f"{name}_{when}": fmean(m[key] for m in part)
            for name, key in (("reward", STEP_REWARD), ("success", "success"))
            for when, part in (("before", before), ("after", after))
        }
    return {"ringing": ringing, "iterations": rang, "window": window, **last}


def dropped(metrics: Metrics) -> list[dict[str, Any]]:
    """Returns what a run left out, one row per reason: ``{"what", "why", "count", "of", "unit", "iterations"}``.

    `of` is the number it was taken from, None where there is none; `iterations` lists those in which it happened.
    """
    rows: list[dict[str, Any]] = []

    def add(what: str, why: str, unit: str, per_iteration: Mapping[int, float], of: float | None) -> None:
        hit = [number for number, count in per_iteration.items() if count]
        total = int(sum(per_iteration.values()))
        rows.append({"what": what, "why": why, "unit": unit, "count": total, "of": of, "iterations": hit})

    trained = [m for m in metrics if "episodes" in m]
    if not trained:
        return rows
    failed = {int(m["iteration"]): m.get("episodes_failed") or 0 for m in trained}
    played = sum(m.get("episodes") or 0 for m in trained) + sum(failed.values())
    totals = {"episodes": played, "tokens": sum(m.get("action_tokens") or 0 for m in trained)}
    for reason, why in INFRASTRUCTURE.items():
        counts = {int(m["iteration"]): (m.get("stop_reasons") or {}).get(reason, 0) for m in trained}
        add(f"Episodes ended by {reason.replace('_', ' ')}", why, "episodes", counts, played)
    evaluated = {int(m["iteration"]): m["eval"] for m in metrics if isinstance(m.get("eval"), Mapping)}
    if evaluated:
        counts = {number: _count(held.get("infrastructure_failures")) for number, held in evaluated.items()}
        total = sum(_count(held.get("episodes")) for held in evaluated.values())
        add("Held-out episodes that failed", "Of the evaluations; in no mean or interval.", "episodes", counts, total)
    for key, what, why, unit in COUNTED:
        if any(key in m for m in trained):
            add(what, why, unit, {int(m["iteration"]): m.get(key) or 0 for m in trained}, totals[unit])
    grouped = [m for m in trained if isinstance(m.get("groups"), Mapping)]
    groups = sum(m["groups"].get("groups") or 0 for m in grouped)
    for key, what, why, unit in GROUPS:
        if any(key in m["groups"] for m in grouped):
            counts = {int(m["iteration"]): m["groups"].get(key) or 0 for m in grouped}
            add(what, why, unit, counts, groups if unit == "groups" else played)
    if any("groups_dropped" in m for m in trained):
        counts = {int(m["iteration"]): m.get("groups_dropped") or 0 for m in trained}
        add(
            "Groups replaced",
            "Dynamic sampling: all outcomes equal; further groups were played.",
            "groups",
            counts,
            None,
        )
    return rows


INFRASTRUCTURE = {
    "environment_error": "The environment raised or died, after all retries. In no mean, baseline or pair.",
    "policy_error": "The policy raised, died or gave no finite log-probs. In no mean, baseline or pair.",
    "deadline": "A step, a policy call or the episode took longer than its deadline. In no mean, baseline or pair.",
    "cancelled": "The run was stopped while it was played. In no mean, baseline or pair.",
}

COUNTED = (
    (
        "episodes_retried",
        "Attempts played again",
        "An infrastructure failure that a retry mended; the retry counts.",
        "episodes",
    ),
    ("truncated_excluded", "Episodes cut off, excluded", "outcome.truncated=excluded: a limit ended them.", "episodes"),
    (
        "overlong_filtered",
        "Episodes without policy loss",
        "policy_update.overlong_filter: a limit ended them.",
        "episodes",
    ),
    (
        "tokens_rejected",
        "Action tokens without policy loss",
        "policy_update.reject: sampler and trainer give them too different probabilities.",
        "tokens",
    ),
)

GROUPS = (
    ("all_success", "Groups of successes only", "No contrast: no pair, and no outcome advantage.", "groups"),
    ("all_failure", "Groups of failures only", "No contrast: no pair, and no outcome advantage.", "groups"),
    ("singleton", "Groups of one", "Nobody to compare with.", "groups"),
    ("empty", "Groups without a scorable episode", "Every member failed.", "groups"),
    ("no_action_tokens", "Episodes without action tokens", "Nothing was sampled: no loss.", "episodes"),
)


COUNTS = ("episodes", "episodes_failed", "groups_dropped", "action_tokens", *(key for key, *_ in COUNTED))
"""Metrics that count something."""

TABLES = ("stop_reasons", "groups")
"""Metrics that are counts by name."""


def dropped_by_stop(stops: Mapping[str, int]) -> list[dict[str, Any]]:
    """Returns what was left out of episodes that ended as `stops` counts, in rows as `dropped`; none of no episodes."""
    played = sum(stops.values())
    if not played:
        return []
    return [
        {
            "what": f"Episodes ended by {reason.replace('_', ' ')}",
            "why": why,
            "unit": "episodes",
            "count": stops.get(reason, 0),
            "of": played,
            "iterations": [],
        }
        for reason, why in INFRASTRUCTURE.items()
    ]


def _count(value: Any) -> int:
    return int(value) if is_count(value) else 0


def _change(before: Metrics, after: Metrics, key: str) -> tuple[float, float]:
    """Difference of the means, and its standard error."""
    a, b = [float(m[key]) for m in before], [float(m[key]) for m in after]
    return fmean(b) - fmean(a), math.sqrt(stdev(a) ** 2 / len(a) + stdev(b) ** 2 / len(b))


def _number(value: Any) -> bool:
    """Whether `value` is a number, and small enough for its square to be one."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e150


def calibration(pairs: Sequence[tuple[float, float]], bins: int = 5) -> list[dict[str, float]]:
    """Returns the reliability of pair probabilities: per bin of confidence `confidence`, `right`, `pairs`.

    Args:
        pairs: (score of the better one, score of the worse one) of every pair.
        bins: of equal size (pairs sorted by confidence), so that small margins are resolved too.
    """
    gaps = sorted((winner - loser for winner, loser in pairs), key=abs)
    size = max(1, math.ceil(len(gaps) / bins))
    rows = []
    for start in range(0, len(gaps), size):
        part = gaps[start : start + size]
        confidence = fmean(1 / (1 + math.exp(-min(abs(gap), 500.0))) for gap in part)
        right = fmean(1.0 if gap > 0 else 0.5 if gap == 0 else 0.0 for gap in part)
        rows.append({"confidence": confidence, "right": right, "pairs": len(part)})
    return rows


def stop_counts(metrics: Metrics) -> dict[str, int]:
    """Returns how many episodes ended for each reason, over the iterations or the environments of `metrics`."""
    total: Counter[str] = Counter()
    for m in metrics:
        total.update({str(name): _count(count) for name, count in (m.get("stop_reasons") or {}).items()})
    return dict(total)
