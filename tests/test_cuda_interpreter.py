"""The Triton source under Triton's interpreter, against float64."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("triton") is None or find_spec("torch") is None:
    pytest.skip("Triton's interpreter needs triton and torch", allow_module_level=True)

import numpy as np

from benchmarks.gpu_records import Setting
from lpvit_engines.cuda.half import Bits
from tests.cuda.interpret import CASES, GUARD, GUARD_ROWS, TUNED, name_of
from tests.cuda.layers import Case, assert_close, layer

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bits]:
    """Every case, computed by one process that interprets."""
    output = tmp_path_factory.mktemp("interpreted") / "results.npz"
    paths = os.pathsep.join(str(ROOT / folder) for folder in (".", "engines", "profilers"))
    subprocess.run(
        [sys.executable, "-m", "tests.cuda.interpret", str(output)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths},
        check=True,
    )
    with np.load(output, allow_pickle=False) as found:
        return dict(found)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_source_computes_the_layer(case: Case, results: dict[str, Bits]) -> None:
    found = results[str(case)][:-GUARD_ROWS]
    # The interpreter cuts float32 off to bfloat16 (1.0070 becomes 1.0); a GPU rounds.
    assert_close(found, case, layer(case).expected, truncates=case.dtype == "bfloat16")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_source_writes_nothing_past_the_last_token(
    case: Case, results: dict[str, Bits]
) -> None:
    assert (results[str(case)][-GUARD_ROWS:] == GUARD).all()


@pytest.mark.parametrize("tuned", TUNED, ids=name_of)
def test_every_kind_of_setting_that_the_tuning_tries_computes_the_layer(
    tuned: tuple[Setting, Case], results: dict[str, Bits]
) -> None:
    """Tiles, persistent CTAs and split-K, with rows that are empty and parts that get nothing."""
    case, found = tuned[1], results[name_of(tuned)]
    assert_close(
        found[:-GUARD_ROWS], case, layer(case).expected, truncates=case.dtype == "bfloat16"
    )
    assert (found[-GUARD_ROWS:] == GUARD).all()
