"""What every engine can do."""

from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Self = TypeVar("Self", bound="Engine")


class Engine(Protocol):
    """A model compiled for one device, loaded and ready; a context manager that closes it."""

    name: str
    input_shape: tuple[int, ...]
    """Of the one input, as compiled; -1 where a dimension is open."""
    outputs: tuple[str, ...]
    """Names of what infer_all() returns. The first is the answer; a ViT also has "features"."""

    def infer(self, x: "NDArray[np.float32]") -> "NDArray[np.float32]":
        """The model's answer, its first output, for x, float32 of input_shape. For a ViT: x
        (batch, 3, height, width), already normalized, gives logits (batch, classes).

        Blocks until the device is done. The caller owns the returned array. Raises EngineError
        for another shape or dtype, after close(), and where the backend fails.
        """
        ...

    def infer_all(self, x: "NDArray[np.float32]") -> "dict[str, NDArray[np.float32]]":
        """Every output by its name, in the order of `outputs`, otherwise like infer().

        "features" (batch, width) is the embedding that the classifier reads.
        """
        ...

    def kernels(self) -> dict[str, str]:
        """The kernel that really runs each node, by the node's name in the compiled graph."""
        ...

    def close(self) -> None:
        """Free the model. A further infer() raises EngineError; a further close() does nothing."""
        ...

    def __enter__(self: Self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...
