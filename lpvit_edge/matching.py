"""How outputs are matched after pruning, and the record of it: matching.json."""

from typing import ClassVar

import msgspec

from lpvit_edge.records import ModelIdentity, Record


class Matching(msgspec.Struct, frozen=True, kw_only=True):
    """How far and how fast the parameters move; Adam, its rate falling along a cosine."""

    steps: int = 300
    batch: int = 32
    learning_rate: float = 1e-3
    judge_every: int = 25  # steps
    seed: int = 0  # of the order of the images


class MatchLog(Record, frozen=True, kw_only=True):
    """What matching the dense model's outputs did to the pruned weights."""

    KIND: ClassVar[str] = "matching"

    model: ModelIdentity
    steps: int
    kept_step: int  # whose parameters were kept; 0 where none was better than the first
    parameters: int  # numbers that could move
    images: int
    images_apart: int  # which decided what was kept
    loss_before: float  # on the images kept apart
    loss_after: float
    seconds: float
    model_sha256: str  # of the weights afterwards
