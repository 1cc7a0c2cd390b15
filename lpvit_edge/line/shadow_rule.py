"""How a dense engine runs beside the line."""

from typing import Annotated

import msgspec


class ShadowRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The [shadow] table of line.toml. `bundle` is "dense" (of the store) or a bundle's folder."""

    bundle: Annotated[str, msgspec.Meta(min_length=1)] = "dense"
    share: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.02  # of the judged frames
    queue: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4  # frames that may wait for it
    threads: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    timeout_s: Annotated[float, msgspec.Meta(gt=0)] = 60.0  # for one answer; the first one loads
