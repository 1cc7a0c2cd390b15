from pathlib import Path

import numpy as np
import pytest

from lpvit_edge.errors import DataError
from lpvit_edge.images import (
    Preprocess,
    content_sha256,
    overlap,
    read_all,
    read_image,
    refuse_alike,
    scan_folder,
    take,
)
from tests.conftest import LABELS, write_images

Image = pytest.importorskip("PIL.Image")
SMALL = Preprocess(image_size=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def test_class_folders_become_targets_in_the_order_of_the_labels(tmp_path: Path) -> None:
    write_images(tmp_path / "a", seed=0, per_class=2)
    images = scan_folder(tmp_path / "a", labels=("ok", "dark", "bright"))
    assert [path.parent.name for path in images.paths] == ["bright"] * 2 + ["dark"] * 2 + ["ok"] * 2
    assert images.targets == (2, 2, 1, 1, 0, 0)


def test_an_empty_folder_says_what_is_expected(tmp_path: Path) -> None:
    (tmp_path / "ok").mkdir()
    with pytest.raises(DataError, match=r"no image in it .*<folder>/<class>/<image>"):
        scan_folder(tmp_path, labels=LABELS)
    with pytest.raises(DataError, match="no such folder"):
        scan_folder(tmp_path / "nowhere", labels=LABELS)


def test_class_folders_that_the_model_does_not_know_are_named(tmp_path: Path) -> None:
    write_images(tmp_path, seed=0, per_class=1)
    with pytest.raises(DataError, match=r"\['bright'\] are none of the model's 2 classes"):
        scan_folder(tmp_path, labels=("dark", "ok"))


def test_a_corrupt_image_is_skipped_and_named(tmp_path: Path) -> None:
    write_images(tmp_path, seed=0, per_class=2)
    good = (tmp_path / "ok/000.png").read_bytes()
    (tmp_path / "ok/cut.png").write_bytes(good[:200])
    (tmp_path / "ok/text.jpg").write_text("not an image")
    batch = read_all(scan_folder(tmp_path, labels=LABELS), SMALL)
    assert batch.images.shape == (6, 3, 32, 32)
    assert batch.targets is not None
    assert batch.targets.tolist() == [0, 0, 1, 1, 2, 2]
    assert len(batch.skipped) == 2
    assert "cut.png: not a readable image" in batch.skipped[0]
    assert "text.jpg: not a readable image" in batch.skipped[1]


def test_a_16_bit_image_keeps_its_greys(tmp_path: Path) -> None:
    Image.fromarray(np.full((32, 32), 32768, np.uint16)).save(tmp_path / "a.png")
    pixels = read_image(tmp_path / "a.png", SMALL)
    assert pixels == pytest.approx(np.full((3, 32, 32), 128 / 127.5 - 1), abs=0.005)


def test_an_image_of_32_bits_is_refused_by_its_mode(tmp_path: Path) -> None:
    Image.fromarray(np.full((32, 32), 0.5, np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(DataError, match=r"a.tiff: not a readable image \(mode 'F'"):
        read_image(tmp_path / "a.tiff", SMALL)


def test_a_folder_of_corrupt_images_only_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no")
    with pytest.raises(DataError, match="none of 1 files is a readable image"):
        read_all(scan_folder(tmp_path, labels=None), SMALL)


@pytest.mark.parametrize("size", [(40, 40), (57, 41), (31, 90), (320, 200)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop_fraction", [1.0, 0.9])
def test_preprocessing_is_timms_to_within_one_grey_level(
    tmp_path: Path, size: tuple[int, int], interpolation: str, crop_fraction: float
) -> None:
    timm_data = pytest.importorskip("timm.data")
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    ours = read_image(
        tmp_path / "a.png",
        Preprocess(
            image_size=32,
            mean=mean,
            std=std,
            interpolation=interpolation,  # type: ignore[arg-type]
            crop_fraction=crop_fraction,
        ),
    )
    transform = timm_data.create_transform(
        (3, 32, 32), interpolation=interpolation, crop_pct=crop_fraction, mean=mean, std=std
    )
    theirs = transform(Image.open(tmp_path / "a.png")).numpy()
    grey = np.abs(ours - theirs) * np.array(std)[:, None, None] * 255
    assert grey.max() <= 1.0


def test_a_subset_keeps_every_class(tmp_path: Path) -> None:
    write_images(tmp_path, seed=0, per_class=10)
    images = take(scan_folder(tmp_path, labels=LABELS), 6)
    assert images.targets == (0, 0, 1, 1, 2, 2)


def test_images_in_both_sets_are_found_by_content(tmp_path: Path) -> None:
    write_images(tmp_path / "a", seed=0, per_class=2)
    write_images(tmp_path / "b", seed=1, per_class=2)
    a, b = (scan_folder(tmp_path / name, labels=LABELS) for name in "ab")
    assert overlap(a, b) == ()
    (tmp_path / "b/ok/copy.png").write_bytes((tmp_path / "a/dark/001.png").read_bytes())
    b = scan_folder(tmp_path / "b", labels=LABELS)
    assert [path.name for path in overlap(b, a)] == ["copy.png"]


def test_the_digest_of_a_set_changes_when_an_image_changes_its_class(tmp_path: Path) -> None:
    write_images(tmp_path, seed=0, per_class=2)
    before = content_sha256(scan_folder(tmp_path, labels=LABELS))
    (tmp_path / "ok/000.png").rename(tmp_path / "dark/002.png")
    assert content_sha256(scan_folder(tmp_path, labels=LABELS)) != before


def test_the_digest_of_a_set_does_not_depend_on_its_place(tmp_path: Path) -> None:
    for name in "ab":
        write_images(tmp_path / name, seed=0, per_class=2)
    a, b = (content_sha256(scan_folder(tmp_path / name, labels=LABELS)) for name in "ab")
    assert a == b
    (tmp_path / "b/ok/000.png").unlink()
    assert content_sha256(scan_folder(tmp_path / "b", labels=LABELS)) != a


def test_images_all_alike_are_refused_after_looking_at_few(tmp_path: Path) -> None:
    preprocess = Preprocess(image_size=8)
    for index in range(3):
        Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / f"{index}.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    folder = scan_folder(tmp_path, labels=None)
    with pytest.raises(DataError, match="all 4 images are alike"):
        refuse_alike(folder, preprocess)
    Image.new("RGB", (8, 8), (9, 9, 8)).save(tmp_path / "2.png")
    refuse_alike(folder, preprocess)
