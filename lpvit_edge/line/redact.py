"""Addresses without their passwords, and passwords that come from the environment."""

import os
import re

from lpvit_edge.errors import EnvironmentUnfitError

_USER = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*://)\S+@", re.IGNORECASE)
_QUERY = re.compile(
    r"(?P<key>[?&](?:[a-z_-]*(?:password|passwd|pwd|token|secret|key|auth)[a-z_-]*)=)[^&\s]+",
    re.IGNORECASE,
)
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def redacted(text: str) -> str:
    """The text with users, passwords and tokens of addresses replaced by three stars."""
    return _QUERY.sub(r"\g<key>***", _USER.sub(r"\g<scheme>***@", text))


def from_environment(text: str) -> str:
    """The text with ${NAME} replaced. Raises EnvironmentUnfitError for a variable not set."""

    def value(found: "re.Match[str]") -> str:
        name = found[1]
        if name not in os.environ:
            raise EnvironmentUnfitError(
                f"${{{name}}} is not set in the environment; set it (EnvironmentFile= of the unit)"
            )
        return os.environ[name]

    return _VARIABLE.sub(value, text)
