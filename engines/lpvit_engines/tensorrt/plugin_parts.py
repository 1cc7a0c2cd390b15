"""What the plugin tells TensorRT while an engine is built, and what it does while one runs.

Plain classes: TensorRT's own bases exist only once it is imported, and join them in plugin.py.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lpvit_edge.errors import EngineError, LpvitEdgeError
from lpvit_engines.cuda.kernel import Kernel, beyond_a_launch
from lpvit_engines.cuda.packing import PANEL_COLS, TILE_ROWS
from lpvit_engines.tensorrt.plugin_fields import NAME, NAMESPACE

_INDEX_INPUTS = (2, 3)
_LOG = logging.getLogger(__name__)


def check_shapes(given: dict[str, Any], shapes: Sequence[tuple[int, ...]]) -> None:
    """Refuse inputs that do not make the layer of the attributes: the kernel trusts them.

    shapes are those of X, panels, rows, columns and bias. Raises EngineError.
    """
    x, panels, rows, columns, bias = shapes
    outputs, inputs = given["out_features"], given["in_features"]
    segments = panels[0] * PANEL_COLS // given["block_cols"] if panels else 0
    if (
        x[-1:] != (inputs,)
        or panels != (*panels[:1], given["block_rows"], PANEL_COLS)
        or rows != (outputs // given["block_rows"], 4)
        or columns != (segments,)
        or bias != (outputs,)
    ):
        raise EngineError(
            f"X {x}, panels {panels}, rows {rows}, columns {columns} and bias {bias} are not those "
            f"of {outputs} outputs and {inputs} inputs in blocks of {given['block_rows']}x"
            f"{given['block_cols']}: export the model again and build it again"
        )
    uncounted = beyond_a_launch(math.prod(x[:-1]), widest=max(inputs, outputs), tile_rows=TILE_ROWS)
    if uncounted is not None:
        raise EngineError(uncounted)


def upper_shape(described: Any) -> tuple[int, ...]:
    """The shape of a tensor at build, at its largest where TensorRT leaves it open (-1)."""
    sizes = tuple(described.desc.dims)
    return tuple(described.max) if any(size < 0 for size in sizes) else sizes


@contextmanager
def _told() -> Iterator[None]:
    """TensorRT turns an exception into a number; the words go to the log."""
    try:
        yield
    except LpvitEdgeError as error:
        _tell(error)
        raise


def _tell(error: LpvitEdgeError) -> None:
    _LOG.error("%s::%s: %s", NAMESPACE, NAME, error)


class Shapes:
    """IPluginV3OneBuild: shapes, types and formats."""

    trt: Any
    given: dict[str, Any]

    def get_output_data_types(self, input_types: Any) -> Any:
        return [input_types[0]]

    def get_output_shapes(self, inputs: Any, shape_inputs: Any, expr_builder: Any) -> Any:
        trt = self.trt
        shape = trt.DimsExprs(inputs[0])
        shape[len(shape) - 1] = expr_builder.constant(self.given["out_features"])
        return [shape]

    def supports_format_combination(self, pos: int, in_out: Any, num_inputs: int) -> bool:
        trt = self.trt
        described = in_out[pos].desc
        wanted = trt.DataType.INT32 if pos in _INDEX_INPUTS else trt.DataType.HALF
        return bool(described.type == wanted and described.format == trt.TensorFormat.LINEAR)

    # TensorRT names the first parameter `in`, which Python cannot; it passes by position.
    def configure_plugin(self, in_: Any, out: Any) -> None:
        with _told():
            check_shapes(self.given, [upper_shape(described) for described in in_])

    def get_workspace_size(self, in_: Any, out: Any) -> int:
        return 0


class Launches:
    """IPluginV3OneRuntime: one launch of the kernel that was loaded with the plugin."""

    given: dict[str, Any]
    kernel: Kernel

    def on_shape_change(self, in_: Any, out: Any) -> None:
        with _told():
            check_shapes(self.given, [tuple(described.dims) for described in in_])

    def set_tactic(self, tactic: int) -> None:
        pass

    def enqueue(
        self,
        input_desc: Any,
        output_desc: Any,
        inputs: Any,
        outputs: Any,
        workspace: int,
        stream: int,
    ) -> None:
        try:  # not _told(), which costs half a launch
            self.kernel.launch(
                x=inputs[0],
                values=inputs[1],
                rows=inputs[2],
                columns=inputs[3],
                bias=inputs[4],
                residual=0,
                tokens=math.prod(tuple(input_desc[0].dims)[:-1]),
                ldx=self.given["in_features"],
                ldy=self.given["out_features"],
                y=outputs[0],
                block_row_count=input_desc[2].dims[0],
                stream=stream,
            )
        except LpvitEdgeError as error:
            _tell(error)
            raise
