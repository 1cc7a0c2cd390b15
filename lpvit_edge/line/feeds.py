"""The feed that a source needs, and what records call that source."""

from pathlib import Path

import msgspec

from lpvit_edge.line.capture import CaptureFeed
from lpvit_edge.line.config import FolderSource, GstreamerSource, LineConfig, SourceConfig
from lpvit_edge.line.feed import Feed, Intake
from lpvit_edge.line.folder import FolderFeed
from lpvit_edge.line.journal import Journal
from lpvit_edge.line.redact import from_environment, pipeline_name, redacted
from lpvit_edge.line.sequence import SequenceFile


def open_feed(config: LineConfig, intake: Intake, sequence: SequenceFile, journal: Journal) -> Feed:
    """A feed that is not started. Raises EnvironmentUnfitError for a variable not set."""
    if isinstance(config.source, FolderSource):
        return FolderFeed(config.source, intake, sequence, journal)
    source = msgspec.structs.replace(config.source, target=from_environment(config.source.target))
    return CaptureFeed(
        source, config.policy, intake, Path(config.state) / "sequence", stall_s=config.stall_s
    )


def source_name(source: SourceConfig) -> str:
    """How records call a source: without anything that may be a secret."""
    if isinstance(source, GstreamerSource):
        return pipeline_name(source.target)
    return redacted(source.target)
