"""The base of every settings class, and the one place where settings are parsed and their errors worded."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

import pydantic
import yaml
from pydantic import Field

from universality.errors import StudyError

Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Fraction = Annotated[float, Field(gt=0, lt=1)]
_DISCRIMINATORS = ("kind", "source", "architecture")  # fields that tell which of several classes settings are of
Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")]


class OnMismatch(StrEnum):
    """What becomes of a checkpoint that another training made."""

    refuse = "refuse"
    restart = "restart"


class Settings(pydantic.BaseModel):
    """Strict: unknown keys are errors, values are not coerced, instances do not change."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    def canonical(self) -> str:
        """The settings as one line of JSON with sorted keys."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True)


S = TypeVar("S", bound=pydantic.BaseModel)


def parse(kind: type[S], value: object, where: str) -> S:
    """Validate plain `value` as settings of `kind`; StudyError is one line that names the key and what is allowed."""
    try:
        return kind.model_validate(value)
    except pydantic.ValidationError as error:
        raise StudyError(f"{where}: " + "; ".join(_explain(kind, e) for e in error.errors())) from None


def parse_argument(kind: type[S], text: str) -> S:
    """Settings from a command-line argument: inline JSON, or the path of a YAML or JSON file."""
    if text.lstrip().startswith("{"):
        try:
            return parse(kind, json.loads(text), "--settings")
        except json.JSONDecodeError as error:
            raise StudyError(f"--settings: not valid JSON: {error}") from None
    return parse(kind, read_yaml(text), text)


def read_yaml(path: Path | str) -> object:
    try:
        text = Path(path).read_text(encoding="utf8")
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise StudyError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None


def _explain(kind: type[pydantic.BaseModel], error) -> str:
    place, names = _locate(kind, error["loc"])
    key = ".".join(names) or "(top level)"
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key; allowed here: {', '.join(sorted(place.model_fields)) or 'none'}"
    if error["type"] == "missing":
        return f"{key}: missing"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":  # worded by our own validators, which name key and value
        return f"{key}: {message}" if names else message
    if error["type"] == "union_tag_invalid":
        context = error["ctx"]
        tag_key = context["discriminator"].strip("'")
        return f"{key}.{tag_key}: {context['tag']!r} is unknown; allowed: {context['expected_tags']}"
    shown = repr(error["input"])
    if error["type"] in ("float_type", "int_type") and _reads_as_number(error["input"]):
        message += "; YAML reads this as text, write 0.001 or 1.0e-3"
    return f"{key}: {shown if len(shown) <= 80 else shown[:77] + '...'} is not allowed: {message}"


def _reads_as_number(value: object) -> bool:
    try:
        float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return isinstance(value, str)


def _locate(kind: type[pydantic.BaseModel], location: tuple) -> tuple[Any, list[str]]:
    """Follow pydantic's location through the settings classes: (the innermost class, the keys as a user wrote them).

    Where a key holds one of several classes, pydantic's location has the tag of the chosen one, which is no key.
    """
    innermost: Any = kind
    current: Any = kind
    names = []
    for part in location:
        current = _unwrap(current)
        chosen = [c for c in get_args(current) if part in _tags(c)]
        if chosen:
            current = innermost = chosen[0]
            continue
        names.append(str(part))
        fields = getattr(current, "model_fields", {})
        current = fields[part].annotation if part in fields else (get_args(current) or (None,))[-1]
        if hasattr(_unwrap(current), "model_fields"):
            innermost = _unwrap(current)
    return innermost, names


def _unwrap(annotation: Any) -> Any:
    return _unwrap(get_args(annotation)[0]) if get_origin(annotation) is Annotated else annotation


def _tags(choice: Any) -> list:
    return [f.default for name, f in getattr(choice, "model_fields", {}).items() if name in _DISCRIMINATORS]
