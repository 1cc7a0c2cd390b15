"""An engine without hardware or vendor library, for tests and for trying a camera loop."""

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from lpvit_edge.errors import EngineError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class FakeEngine:
    """Scores class i of each image with the image's mean plus i, so results are easy to predict."""

    name = "fake"
    outputs: tuple[str, ...] = ("logits", "features")

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None = None,
        input_shape: tuple[int, ...] = (1, 3, 4, 4),
        classes: int = 3,
    ) -> None:
        if not path.is_file():
            raise EngineError(f"no model file {path}. Give the path of an existing .onnx file")
        self.path = path
        self.threads = threads
        self.input_shape = input_shape
        self.classes = classes
        self._is_open = True

    def infer(self, x: "NDArray[np.float32]") -> "NDArray[np.float32]":
        """Scores (batch, classes) of x (batch, ...)."""
        return self.infer_all(x)["logits"]

    def infer_all(self, x: "NDArray[np.float32]") -> "dict[str, NDArray[np.float32]]":
        """The scores and, as the embedding, each channel's mean (batch, channels)."""
        import numpy as np

        from lpvit_engines.inputs import check_input

        check_input(x, self.input_shape, is_open=self._is_open)
        features = x.reshape(*x.shape[:2], -1).mean(axis=2)  # (batch, channels)
        logits = features.mean(axis=1, keepdims=True) + np.arange(self.classes)
        return {
            "logits": np.asarray(logits, dtype=np.float32),
            "features": np.asarray(features, dtype=np.float32),
        }

    def kernels(self) -> dict[str, str]:
        """One node, computed by numpy."""
        return {"scores": "numpy mean"}

    def close(self) -> None:
        self._is_open = False

    def __enter__(self) -> "FakeEngine":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
