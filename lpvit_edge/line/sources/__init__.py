"""Where frames come from, by the `kind` of the [source] table.

A source may wedge in its driver, so it runs in a process of its own (lpvit_edge.line.capture); a
watched folder needs none (lpvit_edge.line.folder).
"""

from importlib import import_module

from lpvit_edge.errors import SourceError
from lpvit_edge.line.config import SourceConfig
from lpvit_edge.line.sources.base import Source

__all__ = ["Source", "open_source"]

_OPENERS = {
    "video": "lpvit_edge.line.sources.stream:open_video",
    "rtsp": "lpvit_edge.line.sources.stream:open_rtsp",
    "v4l2": "lpvit_edge.line.sources.stream:open_v4l2",
    "gstreamer": "lpvit_edge.line.sources.gstreamer:open_pipeline",
    "genicam": "lpvit_edge.line.sources.genicam:open_camera",
    "synthetic": "lpvit_edge.line.sources.synthetic:open_synthetic",
}


def open_source(config: SourceConfig) -> Source:
    """Open a source. Raises SourceError in words, MissingDependencyError without its library."""
    kind = config.__struct_config__.tag
    if kind not in _OPENERS:
        raise SourceError(f"no source of kind {kind!r} runs in a capture process")
    module, _, function = _OPENERS[str(kind)].partition(":")
    source: Source = getattr(import_module(module), function)(config)
    return source
