"""Where a language model answers: from the environment, so that no key stands in a study."""

import os
from typing import NamedTuple

from universality.errors import StudyError

_NEEDED = ("OPENAI_BASE_URL", "UNIVERSALITY_JUDGE_MODEL")


class Endpoint(NamedTuple):
    base_url: str
    model: str
    key: str | None

    @classmethod
    def of_environment(cls) -> "Endpoint":
        """Raises StudyError naming the variable that is missing."""
        found = [os.environ.get(name, "") for name in _NEEDED]
        for name, value in zip(_NEEDED, found, strict=True):
            if not value:
                raise StudyError(f"judge: the environment has no {name}; set it to the endpoint's")
        return cls(found[0], found[1], os.environ.get("OPENAI_API_KEY"))
