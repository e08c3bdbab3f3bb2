"""Learning rate as a pure function of the optimizer step: nothing to save, and one unit everywhere (FIDELITY row 12)."""
import math

SCHEDULES = ("cosine", "constant")


def lr_at(step: int, *, base: float, end: float, warmup: int, total: int, hold_fraction: float = 0.0,
          schedule: str = "cosine") -> float:
    """The rate for optimizer step `step` (0-based) of `total`.

    Linear warm-up over `warmup` steps (the first is base / warmup), then `base` for `hold_fraction` of the remaining steps, then
    half a cosine down to `end`, reached at the last step. `constant` stays at base after the warm-up.
    """
    if step < warmup:
        return base * (step + 1) / warmup
    if schedule == "constant":
        return base
    start = warmup + hold_fraction * (total - warmup)
    if step <= start:
        return base
    progress = min(1.0, (step - start) / max(1.0, total - 1 - start))
    return end + (base - end) * 0.5 * (1 + math.cos(math.pi * progress))
