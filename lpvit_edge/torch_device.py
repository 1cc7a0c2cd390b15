"""The device that torch works on while a model's curves are taken and it is pruned.

Engines and measurements have a device of their own; the accuracy that a floor is judged by is
counted on the processor.
"""

import copy
import os
import re
from typing import TYPE_CHECKING

import msgspec

from lpvit_edge import distributed
from lpvit_edge.errors import EnvironmentUnfitError, UnknownOptionError

if TYPE_CHECKING:
    from lpvit_edge.job import Job

CPU = "cpu"


def resolved(name: str) -> str:
    """The device of the option --device: cpu, or cuda with its number.

    Of several processes each takes the GPU of its own LOCAL_RANK for "cuda". Raises
    UnknownOptionError for another name, EnvironmentUnfitError where torch has no such GPU.
    """
    found = re.fullmatch(r"cpu|cuda(?::(\d{1,3}))?", name)
    if found is None:
        raise UnknownOptionError(f"--device {name!r}; write cpu, cuda, or cuda:1 for the second")
    if name == CPU:
        return CPU
    own = os.environ.get("LOCAL_RANK", "0") if distributed.size() > 1 else "0"
    index = int(found[1] or own)
    _refuse_absent(name, index)
    return f"cuda:{index}"


def _refuse_absent(name: str, index: int) -> None:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= count:
        raise EnvironmentUnfitError(
            f"--device {name} asks for GPU {index}, counted from 0, and torch {torch.__version__} "
            f"can use {count} here; see what nvidia-smi lists, whether torch is built for CUDA "
            "(torch.version.cuda), or leave out --device"
        )


def placed(job: "Job") -> "Job":
    """The job with a copy of its model on its device; on the processor the model itself."""
    if job.device == CPU:
        return job
    import torch

    # In TF32, torch's choice for convolutions, answers are off by more than a rotation may be.
    torch.backends.cudnn.allow_tf32 = False
    module = copy.deepcopy(job.model.module).to(job.device)
    return msgspec.structs.replace(job, model=msgspec.structs.replace(job.model, module=module))
