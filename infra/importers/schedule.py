"""Map Axolotl's learning rate schedules and their parameters.

The mapping follows what transformers and Axolotl compute, not the name of a schedule: their `constant`
has no warmup, and their `one_cycle` uses the warmup as the share of steps in which the rate rises.
"""

from collections.abc import Iterator
from typing import Any

from infra.importers.findings import (
    Config,
    Findings,
    contradiction,
    convert_value,
    default,
    mapped,
    not_needed,
    parse_float,
    parse_int,
    unmapped,
)
from tasks.sft import SCHEDULE_KWARGS

SCHEDULE_KEYS = (
    *("lr_scheduler", "lr_scheduler_kwargs", "cosine_min_lr_ratio", "lr_div_factor"),
    *("warmup_steps", "warmup_ratio"),
)
SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_min_lr": "cosine",
    "cosine_with_restarts": "cosine_with_restarts",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "inverse_sqrt": "inverse_sqrt",
    "reduce_lr_on_plateau": "reduce_lr_on_plateau",
    "warmup_stable_decay": "warmup_stable_decay",
    "one_cycle": "one_cycle",
}
NEAREST = {
    "rex": "cosine",
    "polynomial": "linear (its power is 1)",
    "cosine_warmup_with_min_lr": "cosine with lr_scheduler_kwargs.min_lr_rate",
    "greedy": "reduce_lr_on_plateau",
    "log_sweep": "exponential",
}
# Schedules of transformers that ignore warmup.
WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau")
# Defaults of transformers or PyTorch that differ from ours.
PRESET: dict[str, dict[str, Any]] = {
    "cosine_with_restarts": {"num_cycles": 1},
    "reduce_lr_on_plateau": {"patience": 10},
    "one_cycle": {"pct_start": 0.03},
}
COUNTS = ("num_cycles", "timescale", "num_decay_steps", "patience", "step_size")
RENAMED = {"min_lr_ratio": "min_lr_rate"}
# Separate keys -> the schedule that Axolotl reads them for, and the parameter that they set.
SEPARATE_KEYS = {
    "cosine_min_lr_ratio": ("cosine", "min_lr_rate"),
    "lr_div_factor": ("one_cycle", "div_factor"),
}
# Values that match the behaviour here.
SAME = {
    "anneal_strategy": "cos",
    "decay_type": "cosine",
    "warmup_type": "linear",
    "mode": "min",
    "threshold_mode": "rel",
    "cooldown": 0,
}


def map_schedule(config: Config) -> Findings:
    """Map the learning rate schedule, its parameters and its warmup."""
    name = str(config.get("lr_scheduler", "cosine"))
    if name == "cosine" and config.get("cosine_min_lr_ratio") == 1:
        note = "a cosine that never decays"
        yield mapped("cosine_min_lr_ratio", "sft.lr_scheduler_type", "constant", note)
        yield default("lr_scheduler_kwargs", "sft.lr_scheduler_kwargs", {}, note)
        ignored = [key for key in ("lr_scheduler", *SCHEDULE_KEYS[1:4]) if key in config]
        yield from (not_needed(key, note) for key in ignored if key != "cosine_min_lr_ratio")
        yield from _warmup(config, "constant_with_warmup")
        return
    if name not in SCHEDULES:
        nearest = NEAREST.get(name, "one of " + ", ".join(SCHEDULE_KWARGS))
        why = f"{name} is not supported; set sft.lr_scheduler_type to {nearest}"
        yield unmapped("lr_scheduler", why, "sft.lr_scheduler_type")
        keys = ("lr_scheduler_kwargs", "cosine_min_lr_ratio", "lr_div_factor")
        yield from (
            unmapped(key, f"parameter of {name}; set sft.lr_scheduler_kwargs")
            for key in keys
            if key in config
        )
    elif "lr_scheduler" in config:
        yield mapped("lr_scheduler", "sft.lr_scheduler_type", SCHEDULES[name])
        yield from _numbers(config, name)
    else:
        yield default("lr_scheduler", "sft.lr_scheduler_type", "cosine")
        yield from _numbers(config, name)
    yield from _warmup(config, name)


def _numbers(config: Config, name: str) -> Findings:
    """Map lr_scheduler_kwargs, the older separate keys, and the presets."""
    values: dict[str, Any] = {}
    sources = []
    for key, field, value in _given_numbers(config, name):
        owner, _ = SEPARATE_KEYS.get(key, (SCHEDULES[name], ""))
        found = _number(field, value, config, name)
        if owner != SCHEDULES[name]:
            yield not_needed(key, f"Axolotl reads it only for {owner}")
        elif found is None:
            yield not_needed(key, "same as in Nightshift")
        elif isinstance(found, str):
            yield unmapped(key, found)
        else:
            values |= found
            sources.append(key)
    values = PRESET.get(name, {}) | values
    if sources:
        yield mapped(" and ".join(sources), "sft.lr_scheduler_kwargs", values)
    else:
        yield default(
            "lr_scheduler_kwargs", "sft.lr_scheduler_kwargs", values, f"Axolotl's defaults for {name}"
        )


def _given_numbers(config: Config, name: str) -> Iterator[tuple[str, str, Any]]:
    """Yield key, name of the parameter, and value."""
    # A pct_start in lr_scheduler_kwargs overrides this value.
    if name == "one_cycle" and config.get("warmup_ratio"):
        yield "warmup_ratio", "pct_start", config["warmup_ratio"]
    given = config.get("lr_scheduler_kwargs", {})
    for key, value in given.items() if isinstance(given, dict) else [("?", given)]:
        yield f"lr_scheduler_kwargs.{key}", key, value
    for key, (_, field) in SEPARATE_KEYS.items():
        if key in config:
            yield key, field, config[key]


def _number(key: str, value: Any, config: Config, name: str) -> dict[str, Any] | str | None:
    """Return the parameter under our name, None if it matches already, or why it cannot be mapped."""
    kind, field = SCHEDULES[name], RENAMED.get(key, key)
    if SAME.get(key) == value or (name == "cosine_with_min_lr" and key == "num_cycles" and value == 0.5):
        return None
    try:
        if key == "num_stable_steps":
            return None
        if key == "min_lr" and "min_lr_rate" in SCHEDULE_KWARGS[kind] and "learning_rate" in config:
            return {"min_lr_rate": parse_float(value) / parse_float(config["learning_rate"])}
        if field in SCHEDULE_KWARGS[kind]:
            return {field: parse_int(value) if field in COUNTS else parse_float(value)}
    except (ValueError, ZeroDivisionError) as err:
        return str(err)
    return f"{kind} takes {', '.join(SCHEDULE_KWARGS[kind]) or 'no numbers'}; remove it"


def _warmup(config: Config, name: str) -> Findings:
    count, share = config.get("warmup_steps"), config.get("warmup_ratio")
    if is_share(count) and not share and name not in (*WITHOUT_WARMUP, "one_cycle"):
        yield mapped("warmup_steps", "sft.warmup_ratio", parse_float(count), "below 1: a share of all steps")
        yield default("warmup_steps", "sft.warmup_steps", 0)
        return
    keys = [key for key in ("warmup_steps", "warmup_ratio") if key in config]
    if count and share:
        yield contradiction("warmup_steps", "warmup_ratio", f"{count} and {share}; remove one")
        return
    if name in WITHOUT_WARMUP or name == "one_cycle":
        yield default("warmup_steps", "sft.warmup_steps", 0, f"{name} does not use it")
        yield default("warmup_ratio", "sft.warmup_ratio", 0.0, f"{name} does not use it")
    if name == "one_cycle" and count:
        yield unmapped("warmup_steps", "one_cycle takes a ratio: set sft.lr_scheduler_kwargs.pct_start")
    if name in WITHOUT_WARMUP or name == "one_cycle":
        ignored = [key for key in keys if name != "one_cycle" or not config[key]]
        yield from (not_needed(key, f"{name} does not use it") for key in ignored)
    elif keys:
        yield from _given_warmup(config, keys)
    else:
        yield default("warmup_steps", "sft.warmup_steps", 0)
        yield default(
            "warmup_ratio", "sft.warmup_ratio", 0.03, "Axolotl's default; Axolotl limits it to 100 steps"
        )


def is_share(value: Any) -> bool:
    """Return whether a number of steps is a share of all steps.

    Example:
        >>> is_share(0.1), is_share(5), is_share("few")
        (True, False, False)
    """
    try:
        return 0 < parse_float(value) < 1
    except ValueError:
        return False


def _given_warmup(config: Config, keys: list[str]) -> Findings:
    for key, target, convert, zero in (
        ("warmup_steps", "sft.warmup_steps", parse_int, 0),
        ("warmup_ratio", "sft.warmup_ratio", parse_float, 0.0),
    ):
        if key in keys:
            yield convert_value(key, target, config[key], convert)
        else:
            yield default(key, target, zero, "the other key is given")
