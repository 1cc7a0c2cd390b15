"""The basis that a model is pruned in: rotated.safetensors, in the run folder.

The sensitivity step chooses it and notes the file's hash; the allocation carries the hash on, and
pruning works in that basis and in no other. lpvit_edge.rotate says what a basis is.
"""

from typing import TYPE_CHECKING

import msgspec

from lpvit_edge import files, weights
from lpvit_edge.errors import MismatchError, PruningError
from lpvit_edge.job import Job
from lpvit_edge.pattern import parse_pattern
from lpvit_edge.progress import say, working

if TYPE_CHECKING:
    import torch
    from torch import nn

FILE = "rotated.safetensors"


def choose(job: Job, images: "torch.Tensor", *, rotate: bool | None) -> Job:
    """The job with its model in the basis that suits its patterns best; writes rotated.safetensors.

    images (n, 3, S, S), normalized. None rotates where the model allows it and no pattern is 2:4,
    which loses by it. Raises PruningError where True is asked of a model that does not allow it.
    """
    from lpvit_edge.rotate import rotated

    if rotate is None and any(parse_pattern(name).kind == "2:4" for name in job.patterns):
        say("the residual streams stay as they are: 2:4 loses by a rotation, see --rotate")
        return job
    if rotate is False:
        return job
    try:
        with working("rotate the residual streams"):
            turned = rotated(job.model.module, job.walk, images)
    except PruningError as error:
        if rotate:
            raise PruningError(f"{error}; leave out --rotate") from error
        say(f"the residual streams stay as they are: {error}")
        return job
    path = job.path(FILE)
    weights.save(turned, path)
    return _in(job, turned, files.sha256_of(path))


def of(job: Job, sha256: str | None) -> Job:
    """The job in the basis that a file of its run folder is about: its `basis_sha256`.

    Raises MismatchError where rotated.safetensors is another, or gone.
    """
    if sha256 == job.basis_sha256:
        return job
    path = job.path(FILE)
    found = files.sha256_of(path) if path.exists() else None
    if sha256 is None or found != sha256:
        raise MismatchError(
            f"{path}: the curves and the allocation are of the model in another basis (hash "
            f"{sha256}, here {found}); run `lpvit sensitivity` and `lpvit allocate` again"
        )
    return _in(job, weights.filled(job.model.module, weights.load(path)), sha256)


def _in(job: Job, module: "nn.Module", sha256: str) -> Job:
    model = msgspec.structs.replace(job.model, module=module)
    return msgspec.structs.replace(job, model=model, basis_sha256=sha256)
