"""Every error this SDK raises on purpose, with the exit code of the command line.

* LpvitEdgeError                 1  refused, with a message
  * MissingDependencyError       3  an optional library is absent or broken     (also ImportError)
  * EnvironmentUnfitError        3  the machine cannot do what was asked
  * FileFormatError              1  a file is not what it should be             (also ValueError)
  * MismatchError                1  two files come from different conditions    (also ValueError)
  * ModelError                   1  a model, or weights that do not fit it      (also ValueError)
  * DataError                    1  images or labels that cannot be used        (also ValueError)
  * PruningError                 1  a pattern or statistics that cannot prune   (also ValueError)
  * UnknownEngineError           1  no engine has that name                     (also LookupError)
  * EngineError                  1  an engine refused a model, or failed
    * WrongAnswersError          1  an engine computes something else than its model
  * SourceError                  1  a camera or file cannot be opened, or was lost
  * SinkError                    1  a verdict could not be delivered; it stays in the journal
  * UnknownOptionError           2  an option has no such value                 (also ValueError)
  * BudgetNotMetError            4  no allocation fits the budget
  * AccuracyFloorError           5  every step falls below the accuracy floor
  * MeasurementError             6  a measurement that cannot be trusted
  * DeviceMismatchError          7  an artefact was built for another device

A message says what happened, with the values, and then what to do about it. Callers catch
LpvitEdgeError; anything else that escapes is a bug and keeps its traceback.
"""

from typing import ClassVar


class LpvitEdgeError(Exception):
    """Base of every error raised on purpose."""

    exit_code: ClassVar[int] = 1


class MissingDependencyError(LpvitEdgeError, ImportError):
    """An optional library is absent or cannot be loaded."""

    exit_code = 3


class EnvironmentUnfitError(LpvitEdgeError):
    """The machine lacks something that no file or argument can replace."""

    exit_code = 3


class FileFormatError(LpvitEdgeError, ValueError):
    """A file does not hold the kind, version or fields it should."""


class MismatchError(LpvitEdgeError, ValueError):
    """Two files were made under different conditions and must not be combined."""


class ModelError(LpvitEdgeError, ValueError):
    """A model that cannot be loaded or walked, or weights that do not fit it."""


class DataError(LpvitEdgeError, ValueError):
    """Images or labels that cannot be used."""


class PruningError(LpvitEdgeError, ValueError):
    """A pattern that does not fit a layer, or statistics too poor to prune from."""


class UnknownEngineError(LpvitEdgeError, LookupError):
    """No engine is registered under that name."""


class EngineError(LpvitEdgeError):
    """An engine refused a model or failed while running it."""


class WrongAnswersError(EngineError):
    """An engine does not compute what its model does; nobody may use what it was loaded from."""


class SourceError(LpvitEdgeError):
    """A source of frames cannot be opened, or was lost."""


class SinkError(LpvitEdgeError):
    """A sink did not take what it was given; it is tried again."""


class UnknownOptionError(LpvitEdgeError, ValueError):
    """An option was given a value that it does not know."""

    exit_code = 2


class BudgetNotMetError(LpvitEdgeError):
    """No allocation fits the budget; the message carries the best that is reachable."""

    exit_code = 4


class AccuracyFloorError(LpvitEdgeError):
    """Even the weakest step falls below the accuracy floor."""

    exit_code = 5


class MeasurementError(LpvitEdgeError):
    """A measurement that cannot be trusted."""

    exit_code = 6


class DeviceMismatchError(LpvitEdgeError):
    """An artefact was built for another device."""

    exit_code = 7
