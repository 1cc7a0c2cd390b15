"""The example: its images are what they claim to be, and its checkpoint classifies them."""

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from canvas import SIDE
from defects import DEFECTS
from generate import LABELS, SPLITS, draw, draw_on, label_of, write_split
from lpvit_edge.deps import require
from surfaces import SURFACES

EXAMPLE = Path(__file__).parent.parent / "examples" / "factory_line"
MODELS = ("model", "swin")  # the two TOML files


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.png"))
    }


def test_the_same_seed_draws_the_same_image() -> None:
    once = draw("crack", split="train", index=3, seed=1)
    again = draw("crack", split="train", index=3, seed=1)
    assert once.shape == (SIDE, SIDE, 3)
    assert once.dtype == np.uint8
    np.testing.assert_array_equal(once, again)


@pytest.mark.parametrize(
    "other",
    [
        {"split": "train", "index": 3, "seed": 2},
        {"split": "train", "index": 4, "seed": 1},
        {"split": "heldout", "index": 3, "seed": 1},
    ],
    ids=["seed", "index", "split"],
)
def test_seed_index_and_split_each_change_the_image(other: dict[str, Any]) -> None:
    assert not np.array_equal(draw("crack", split="train", index=3, seed=1), draw("crack", **other))


def test_an_image_does_not_depend_on_how_many_are_written(tmp_path: Path) -> None:
    write_split(tmp_path / "few", "heldout", 12)
    write_split(tmp_path / "many", "heldout", 25)
    few, many = digests(tmp_path / "few"), digests(tmp_path / "many")
    assert len(few) == 12
    assert len(many) == 25
    assert few.items() <= many.items()


def test_the_command_writes_balanced_class_folders(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLE / "generate.py"), "--out", str(tmp_path)]
    subprocess.run([*command, "--calibration", "20", "--heldout", "30"], check=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["calibration", "heldout"]
    for split, each in (("calibration", 2), ("heldout", 3)):
        assert sorted(p.name for p in (tmp_path / split).iterdir()) == list(LABELS)
        assert {len(list((tmp_path / split / label).iterdir())) for label in LABELS} == {each}


def test_no_image_is_in_two_splits(tmp_path: Path) -> None:
    for split in SPLITS:
        write_split(tmp_path, split, 40)
    found = digests(tmp_path)
    assert len(found) == 120
    assert len(set(found.values())) == 120


def defect_pixels(surface: str, label: str, *, seed: int) -> npt.NDArray[np.bool_]:
    """Where a bad part differs from the good part under it by more than 8 of 255."""
    good = SURFACES[surface](np.random.default_rng(seed), 0.1)
    bad = DEFECTS[label](good, np.random.default_rng(seed), 0.7)
    changed: npt.NDArray[np.bool_] = np.abs(bad - good).max(axis=2) > 8 / 255
    return changed


@pytest.mark.parametrize("label", sorted(DEFECTS))
@pytest.mark.parametrize("surface", sorted(SURFACES))
def test_every_defect_shows_on_every_surface_and_leaves_the_rest_alone(
    surface: str, label: str
) -> None:
    for seed in range(8):
        share = defect_pixels(surface, label, seed=seed).mean()
        assert 0.002 < share < 0.5, f"seed {seed}: {share:.4f} of the pixels changed"


@pytest.mark.parametrize("label", sorted(DEFECTS))
def test_the_mean_colour_does_not_give_a_class_away(label: str) -> None:
    def means(of: str) -> npt.NDArray[np.float64]:
        rngs = (np.random.default_rng([5, k]) for k in range(40))
        return np.array([draw_on("painted_plate", of, rng=r).mean() for r in rngs])

    good, bad = means("ok"), means(label)
    assert abs(bad.mean() - good.mean()) < good.std()


def described(model: str) -> dict[str, Any]:
    tomllib = require("tomllib" if sys.version_info >= (3, 11) else "tomli")
    document: dict[str, Any] = tomllib.loads((EXAMPLE / f"{model}.toml").read_text())
    return document


@pytest.mark.parametrize("model", MODELS)
def test_the_model_file_names_the_generators_classes_in_the_models_order(model: str) -> None:
    document = described(model)
    assert tuple(document["data"]["labels"]) == LABELS
    assert document["model"]["arguments"]["num_classes"] == len(LABELS)
    assert document["preprocess"]["image_size"] == SIDE


@pytest.mark.parametrize("model", MODELS)
def test_the_checkpoint_is_small_enough_to_carry(model: str) -> None:
    assert 1e6 < (EXAMPLE / described(model)["model"]["weights"]).stat().st_size <= 25e6


@pytest.mark.parametrize("model", MODELS)
def test_the_checkpoint_classifies_fresh_heldout_images(model: str) -> None:
    torch = require("torch")
    import model as factory
    from train import accuracy

    wanted = described(model)["model"]
    module, _, function = wanted["factory"].partition(":")
    assert module == "model.py"
    network = getattr(factory, function)(**wanted["arguments"])
    weights = require("safetensors.torch").load_file(EXAMPLE / wanted["weights"])
    network.load_state_dict(weights, strict=True)
    numbers = range(2000, 2200)  # beyond the 2,000 whose accuracy the README gives
    images = np.stack([draw(label_of(i), split="heldout", index=i) for i in numbers])
    with torch.inference_mode():
        score = accuracy(network, images, [label_of(i) for i in numbers])
    assert score >= 0.90


def test_the_model_refuses_patches_its_stem_cannot_make() -> None:
    from model import ConvStem

    with pytest.raises(ValueError, match="use patch_size=12"):
        ConvStem(img_size=100, patch_size=12)


def test_the_swin_answers_for_every_image() -> None:
    torch = require("torch")
    from model import create_swin

    model = create_swin(len(LABELS)).eval()
    with torch.inference_mode():
        assert model(torch.zeros(3, 3, SIDE, SIDE)).shape == (3, len(LABELS))
