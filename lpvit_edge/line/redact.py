"""Addresses without their passwords, and passwords that come from the environment."""

import hashlib
import os
import re

from lpvit_edge.errors import EnvironmentUnfitError

_USER = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*://)\S+@", re.IGNORECASE)
_QUERY = re.compile(
    r"(?P<key>[?&](?:[a-z_-]*(?:password|passwd|pwd|token|secret|key|auth)[a-z_-]*)=)[^&\s]+",
    re.IGNORECASE,
)
# GStreamer's settings, and whatever is written like them: user-pw="a b", passphrase=c
_SETTING = re.compile(
    r"(?P<key>(?<![\w?&-])[\w-]*(?:pw|pwd|passwd|password|passphrase|token|secret|user-id)\s*=\s*)"
    r"(?:\"(?:\\.|[^\"\\])*\"|'[^']*'|[^\s\"'&]+)",
    re.IGNORECASE,
)
_PLACE = re.compile(r"\b(?:location|uri|device|sensor-id|camera-name|serial|name)=\S+")
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def redacted(text: str) -> str:
    """The text with users, passwords and tokens of addresses and settings replaced by stars."""
    text = _QUERY.sub(r"\g<key>***", _USER.sub(r"\g<scheme>***@", text))
    return _SETTING.sub(r"\g<key>***", text)


def pipeline_name(pipeline: str) -> str:
    """What a GStreamer pipeline is called: its first element, and where that takes frames from.

    Its other settings are left out: some hold passwords under names that nobody foresees.
    """
    element, _, settings = pipeline.partition("!")[0].strip().partition(" ")
    return redacted(" ".join((element, *_PLACE.findall(settings))))


def address_name(url: str) -> str:
    """An address that may hold a secret in its path: a digest tells it from others like it."""
    url, path = redacted(url), url.partition("://")[2].partition("/")[2]
    if not path:
        return url
    scheme, _, rest = url.partition("://")
    digest = hashlib.sha256(path.encode()).hexdigest()[:8]
    return f"{scheme}://{rest.partition('/')[0]}/*** ({digest})"


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
