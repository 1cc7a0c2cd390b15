"""Train one of the factory line's models from scratch on a CPU, and measure it on held-out images.

    python examples/factory_line/train.py --out runs/factory_line --architecture vit

The learning rate follows the steps, so a run that is paused or shares its machine learns the same.
An interrupted run goes on where its last checkpoint was when the same command is given again.
"""

import argparse
import math
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from generate import DEFAULT_SEED, LABELS, draw, label_of, write_split
from model import ARCHITECTURES

Images = npt.NDArray[np.uint8]  # (images, SIDE, SIDE, 3)

WARM_UP = 0.05  # of the whole training
AVERAGING = 0.99  # per step: the saved weights are the mean of about the last hundred steps
ROUND_STEPS = 80


def drawn(split: str, count: int, *, cache: Path) -> Images:
    """The first `count` images of a split, drawn once and kept as a .npy file."""
    path = cache / f"{split}_{count}_{DEFAULT_SEED}.npy"
    if not path.exists():
        with ProcessPoolExecutor() as pool:
            images = pool.map(partial(_drawn_one, split), range(count), chunksize=256)
            np.save(path, np.stack(list(images)))
    loaded: Images = np.load(path)
    return loaded


def _drawn_one(split: str, index: int) -> npt.NDArray[np.uint8]:
    return draw(label_of(index), split=split, index=index)


def preprocessed(images: Images) -> torch.Tensor:
    """Images (B, SIDE, SIDE, 3) of 0..255 -> (B, 3, SIDE, SIDE) of -1..1, as model.toml says."""
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    return (tensor / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def batches(
    images: Images, *, batch: int, first_step: int
) -> Iterator[tuple[Images, torch.Tensor]]:
    """Endless shuffled batches, each turned and mirrored as a whole; a step decides its batch."""
    labels = torch.tensor([LABELS.index(label_of(i)) for i in range(len(images))])
    steps = len(images) // batch
    step = first_step
    while True:
        epoch, place = divmod(step, steps)
        order = np.random.default_rng([DEFAULT_SEED, epoch]).permutation(len(images))
        for start in range(place, steps):
            chosen = order[start * batch : (start + 1) * batch]
            yield _turned(images[chosen], way=step % 8), labels[chosen]
            step += 1


def _turned(images: Images, *, way: int) -> Images:
    """One of the square's eight symmetries; every class stays what it is under all of them."""
    turned = np.rot90(images, k=way % 4, axes=(1, 2))
    return np.ascontiguousarray(turned[:, :, ::-1] if way >= 4 else turned)


def rate_factor(done: float) -> float:
    """Share of the highest learning rate when the fraction `done` of the training is over."""
    if done < WARM_UP:
        return done / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (done - WARM_UP) / (1 - WARM_UP))))


def accuracy(model: nn.Module, images: Images, labels: list[str]) -> float:
    """Fraction of images whose largest logit is their label's."""
    model.eval()
    right = 0
    with torch.inference_mode():
        for start in range(0, len(images), 100):
            found = model(preprocessed(images[start : start + 100])).argmax(1).tolist()
            wanted = labels[start : start + 100]
            right += sum(LABELS[f] == w for f, w in zip(found, wanted, strict=True))
    return right / len(images)


def read_split(folder: Path) -> tuple[Images, list[str]]:
    """Images and class names of a folder of class folders."""
    files = sorted(folder.glob("*/*.png"))
    images = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    return images, [file.parent.name for file in files]


class Recipe(NamedTuple):
    """What decides the weights: the same recipe, images and thread count give the same model."""

    architecture: str
    steps: int
    batch: int
    rate: float
    bfloat16: bool


def train(out: Path, recipe: Recipe, *, count: int, log: Path) -> nn.Module:
    """Train for the recipe's steps; returns the model with its averaged weights."""
    images = drawn("train", count, cache=out)
    watched = drawn("calibration", 500, cache=out)
    watched_labels = [label_of(i) for i in range(len(watched))]
    torch.manual_seed(DEFAULT_SEED)
    model, average = _channels_last(recipe.architecture), _channels_last(recipe.architecture)
    average.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, weight_decay=0.05)
    step, cpu_s = _resumed(out / "checkpoint.pt", model, average, optimizer)
    begun = time.process_time() - cpu_s
    source = batches(images, batch=recipe.batch, first_step=step)
    while step < recipe.steps:
        losses = []
        for _ in range(min(ROUND_STEPS, recipe.steps - step)):
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate * rate_factor(step / recipe.steps)
            losses.append(_train_step(model, optimizer, *next(source), bfloat16=recipe.bfloat16))
            _average(average, model)
            step += 1
        cpu_s = time.process_time() - begun
        score = accuracy(average, watched, watched_labels)
        _say(
            f"{cpu_s / 60:6.1f} CPU min  step {step:5d}  images {step * recipe.batch:7d}  "
            f"loss {np.mean(losses):.4f}  accuracy on 500 calibration images {score:.3f}",
            log=log,
        )
        _keep(out / "checkpoint.pt", model, average, optimizer, step, cpu_s)
        _save_weights(average, out / f"factory_line_{recipe.architecture}.safetensors")
    return average


def _channels_last(architecture: str) -> nn.Module:
    model = ARCHITECTURES[architecture](len(LABELS))
    for weight in model.parameters():
        if weight.dim() == 4:  # the stem: 69 images/s against 60 on two x86-64 cores
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return model


def _train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Images,
    labels: torch.Tensor,
    *,
    bfloat16: bool,
) -> float:
    model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        logits = model(preprocessed(images)).float()
    loss = nn.functional.cross_entropy(logits, labels, label_smoothing=0.05)
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


def _average(average: nn.Module, model: nn.Module) -> None:
    """Move the mean weights towards the current ones; the batch norms' statistics are copied.

    (Those are running means already, and a mean that still holds their initial variance of 1
    is far off for many steps.)
    """
    with torch.no_grad():
        for mean, weight in zip(average.parameters(), model.parameters(), strict=True):
            mean.lerp_(weight, 1 - AVERAGING)
        for copy, statistic in zip(average.buffers(), model.buffers(), strict=True):
            copy.copy_(statistic)


def _keep(
    path: Path,
    model: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    cpu_s: float,
) -> None:
    states = {
        "model": model.state_dict(),
        "average": average.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "cpu_s": cpu_s,
    }
    unfinished = path.with_suffix(".partial")
    torch.save(states, unfinished)
    unfinished.replace(path)


def _resumed(
    path: Path, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, float]:
    """Steps and CPU seconds already spent, the states loaded; (0, 0) without a checkpoint."""
    if not path.exists():
        return 0, 0.0
    kept = torch.load(path, weights_only=True)
    model.load_state_dict(kept["model"])
    average.load_state_dict(kept["average"])
    optimizer.load_state_dict(kept["optimizer"])
    return kept["step"], kept["cpu_s"]


def _save_weights(model: nn.Module, path: Path) -> None:
    unfinished = path.with_suffix(".partial")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, unfinished)
    unfinished.replace(path)


def _say(line: str, *, log: Path) -> None:
    print(line, flush=True)
    with log.open("a") as file:
        file.write(line + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder for weights and caches")
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="vit")
    parser.add_argument("--steps", type=int, default=2240, help="batches to train for")
    parser.add_argument("--images", type=int, default=20000, help="training images to draw")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument("--bfloat16", action="store_true", help="autocast; needs AVX-512 BF16")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    log = given.out / "training_log.txt"
    recipe = Recipe(given.architecture, given.steps, given.batch, given.rate, given.bfloat16)
    _say(
        f"{recipe}, {given.images} images, seed {DEFAULT_SEED}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads",
        log=log,
    )
    model = train(given.out, recipe, count=given.images, log=log)
    write_split(given.out, "heldout", 2000)
    images, labels = read_split(given.out / "heldout")
    score = accuracy(model, images, labels)
    _say(f"accuracy on {len(images)} held-out images: {score:.4f}", log=log)


if __name__ == "__main__":
    main()
