"""What several tests share: a tiny model with its images, as a user would have them."""

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.trt import served

if TYPE_CHECKING:
    from tests.broker import Broker, Subscriber

LABELS = ("bright", "dark", "ok")

library, driver, trt, engine = served.library, served.driver, served.trt, served.engine


@pytest.fixture(scope="session")
def tiny_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model.toml, weights, and class folders: the shape of a user's project.

    The model is a ViT of 2 blocks of width 64 with random weights, at 32 px.
    """
    timm = pytest.importorskip("timm")
    safetensors = pytest.importorskip("safetensors.torch")
    import torch

    folder = tmp_path_factory.mktemp("project")
    torch.manual_seed(0)
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **arguments)
    safetensors.save_file(model.state_dict(), folder / "weights.safetensors")
    for split, seed, count in (("calibration", 1, 8), ("heldout", 2, 4)):
        write_images(folder / split, seed=seed, per_class=count)
    (folder / "model.toml").write_text(
        textwrap.dedent(
            """
            [model]
            timm = "vit_tiny_patch16_224"
            weights = "weights.safetensors"
            [model.arguments]
            num_classes = 3
            img_size = 32
            patch_size = 8
            embed_dim = 64
            depth = 2
            num_heads = 2
            [data]
            calibration = "calibration"
            heldout = "heldout"
            labels = ["bright", "dark", "ok"]
            [preprocess]
            image_size = 32
            mean = [0.5, 0.5, 0.5]
            std = [0.5, 0.5, 0.5]
            """
        )
    )
    return folder


def write_images(folder: Path, *, seed: int, per_class: int) -> None:
    """Class folders of noise around a level that differs between the classes."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(seed)
    for label, level in zip(LABELS, (200, 50, 120), strict=True):
        (folder / label).mkdir(parents=True)
        for index in range(per_class):
            pixels = generator.normal(level, 30, (40, 36, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{index:03d}.png")


@pytest.fixture
def broker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Iterator[Broker]":
    """A running Mosquitto with a user."""
    from tests.broker import PASSWORD, Broker

    folder = tmp_path / "mosquitto"
    folder.mkdir()
    monkeypatch.setenv("MQTT_PASSWORD", PASSWORD)
    broker = Broker(folder)
    yield broker
    broker.kill()


@pytest.fixture
def subscriber(broker: "Broker") -> "Iterator[Subscriber]":
    """Somebody who reads all that the broker passes on."""
    from tests.broker import Subscriber

    subscriber = Subscriber(broker.port)
    yield subscriber
    subscriber.close()


@pytest.fixture
def trt_that_builds(
    driver: Any, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """A tensorrt module whose plans ONNX Runtime computes, on a fake driver."""
    pytest.importorskip("onnxruntime")
    from lpvit_engines.tensorrt.device import opened
    from tests.trt.fake_builder import building_tensorrt

    module = building_tensorrt(driver=driver)

    def here(_: str = "") -> Any:
        return opened(driver.path)

    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr("lpvit_engines.tensorrt.plugin.register", lambda trt: None)
    monkeypatch.setattr("lpvit_engines.tensorrt.device.opened", here)
    monkeypatch.setattr("lpvit_engines.tensorrt.engine.opened", here)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    return module
