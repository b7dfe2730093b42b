"""`--rerank aqe` or `--rerank kreciprocal:k1=10,depth=50`: what it says."""

from __future__ import annotations

from embedkit.errors import UnknownNameError, UsageError

__all__ = ["read_rerank"]

_SETTINGS: dict[str, dict[str, float]] = {
    "aqe": {"k": 10, "alpha": 3.0},
    "kreciprocal": {"depth": 100, "k1": 20, "k2": 6, "lambda": 0.3},
}


def read_rerank(text: str) -> tuple[str, dict[str, float]]:
    """The name and all settings of a re-ranking.

    Raises:
        UnknownNameError: There is no such one, or it has no such setting.
        UsageError: A setting is no number.
    """
    name, _, rest = text.partition(":")
    if name not in _SETTINGS:
        raise UnknownNameError("re-ranking", name, _SETTINGS)
    known = _SETTINGS[name]
    values = dict(known)
    for part in filter(None, rest.split(",")):
        key, _, value = part.strip().partition("=")
        if key not in known:
            raise UnknownNameError(f"setting of {name}", key, known)
        try:
            values[key] = type(known[key])(value)
        except ValueError as error:
            raise UsageError(
                f"--rerank {name}: {key} takes a number, got {value!r}",
                hint=f"--rerank {name}:{key}={known[key]}",
            ) from error
    return name, values
