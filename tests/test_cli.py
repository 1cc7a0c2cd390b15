import subprocess
import sys


def test_help_lists_the_verbs_without_any_optional_library() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "lpvit_edge", "--help"], capture_output=True, text=True, check=True
    )
    assert "Measure this device" in done.stdout
