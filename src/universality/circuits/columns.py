"""The columns of circuits' tables; docs/circuits.md says what they mean."""

METRICS = ("logit_diff", "log_prob", "prob", "logit", "top1")
ENDS = ("", "_low", "_high")
COMMON = ("model", "task", "passes", "accuracy", "prompts")
"""Those of every table."""
_METRICS = tuple(f"{metric}{end}" for metric in METRICS for end in ENDS)
_EFFECT = (*_METRICS, "share", "p_value", "matters")
_PLACE = ("corruption", "sender", "layer", "offset")
_SHARES = tuple(f"{name}{end}" for name in ("share", "mean_offset") for end in ENDS)
_NULL = ("null", "null_low", "null_high", "above_null")

PATHS = ("corruption", "sender", "layer", "head", "receiver", "input", "path", "position", *_EFFECT, *_NULL)
OFF_BY_ONE = (*_PLACE, "strongest", *_METRICS, *_SHARES)
TAPS = (*_PLACE, "tap", "reads", "through", *_EFFECT)
CHANNELS = (*_PLACE, "channel", *_EFFECT)
MIXING = ("layer", "ways", *_METRICS)
