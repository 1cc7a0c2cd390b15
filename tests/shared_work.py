"""Everything that several processes may share, on one small project: run by test_distributed.py.

As a script: python tests/shared_work.py PROJECT FOLDER, alone or under `accelerate launch`.
"""

import sys
from pathlib import Path

import msgspec
import numpy as np

from lpvit_edge import distributed, files, finetune, prune_step, steps
from lpvit_edge.evaluate import answers
from tests.test_finetune import PLAN, allocation_for
from tests.test_optimize import make_job


def work(project: Path, folder: Path) -> None:
    """Sensitivity, pruning in a basis of its own, accuracy and fine-tuning, into a folder."""
    job = make_job(project, folder, images=96)
    curves = steps.sensitivity(job)
    allocation = msgspec.structs.replace(allocation_for(job), basis_sha256=curves.basis_sha256)
    files.save(allocation, job.path("allocation.json"))
    prune_step.prune(job, allocation)
    found = answers(job.model.module, job.heldout, job.model.preprocess, what="accuracy")
    np.save(folder / f"answers.{distributed.rank()}.npy", found)
    pruned = job.path("model.safetensors").read_bytes()
    files.write_atomic(job.path("pruned.safetensors"), pruned)
    plan = msgspec.structs.replace(PLAN, epochs=1, batch=16)
    finetune.finetune(job, allocation, job.calibration, plan)
    distributed.leave()


if __name__ == "__main__":
    work(Path(sys.argv[1]), Path(sys.argv[2]))
