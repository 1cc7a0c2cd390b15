"""An interrupted pruning goes on behind the layers it has finished."""

from pathlib import Path

import msgspec
import pytest

pytest.importorskip("timm")
import torch
from torch import nn

from lpvit_edge import partial
from lpvit_edge.errors import FileFormatError
from lpvit_edge.layers import Walk, walk
from lpvit_edge.models import load_model
from lpvit_edge.pattern import parse_pattern
from lpvit_edge.prune import Form, Settings, prune
from lpvit_edge.records import ModelIdentity
from lpvit_edge.solve import solve_layer

Subject = tuple[nn.Module, Walk, torch.Tensor]
FORM = Form(pattern=parse_pattern("16x4"), sparsity=0.5)


@pytest.fixture(scope="module")
def subject(tiny_project: Path) -> Subject:
    model = load_model(str(tiny_project / "model.toml")).module
    images = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return model, walk(model, image_size=32), images


def whole(subject: Subject, settings: Settings) -> dict[str, torch.Tensor]:
    model, walked, images = subject
    forms = {shape.name: FORM for shape in walked.layers}
    *_, (_, pruned) = prune(model, walked, forms, images, settings=settings)
    return pruned.state_dict()


@pytest.mark.parametrize(("permute", "solved_again"), [(False, 3), (True, 4)])
def test_what_was_finished_is_taken_and_the_rest_comes_out_the_same(
    subject: Subject,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    permute: bool,
    solved_again: int,
) -> None:
    """Where layers may be reordered together, a half-finished stage is done again as a whole."""
    model, walked, images = subject
    settings = Settings(permute=permute)
    forms = {shape.name: FORM for shape in walked.layers}
    expected = whole(subject, settings)
    interrupted = partial.keeping(
        prune(model, walked, forms, images, settings=settings), tmp_path, digest="a"
    )
    for _ in range(5):
        next(interrupted)
    done = partial.kept(tmp_path, digest="a")
    assert len(done) == 5
    solved: list[str] = []

    def counted(layer: nn.Linear, *args: object) -> object:
        solved.append(str(layer))
        return solve_layer(layer, *args)  # type: ignore[arg-type]

    monkeypatch.setattr("lpvit_edge.prune.solve_layer", counted)
    again = list(prune(model, walked, forms, images, settings=settings, done=done))
    assert len(solved) == solved_again
    assert [entry.layer for entry, _ in again] == [shape.name for shape in walked.layers]
    for name, value in again[-1][1].state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def test_layers_made_from_something_else_are_not_taken(subject: Subject, tmp_path: Path) -> None:
    model, walked, images = subject
    identity = ModelIdentity(name="m", weights_sha256="w", image_size=32)
    settings = Settings()
    digests = {
        partial.made_from(i, allocation_sha256=a, images_sha256=c, settings=s, weighed=w)
        for i, a, c, s, w in (
            (identity, "a", "c", settings, False),
            (
                msgspec.structs.replace(identity, weights_sha256="other"),
                *("a", "c", settings, False),
            ),
            (identity, "other", "c", settings, False),
            (identity, "a", "other", settings, False),
            (identity, "a", "c", Settings(damping=0.5), False),
            (identity, "a", "c", settings, True),
        )
    }
    assert len(digests) == 6
    entry, pruned = next(prune(model, walked, {walked.layers[0].name: FORM}, images))
    partial.keep(tmp_path, entry, pruned, digest="a")
    assert list(partial.kept(tmp_path, digest="a")) == [entry.layer]
    assert partial.kept(tmp_path, digest="b") == {}
    partial.clear(tmp_path)
    assert partial.kept(tmp_path, digest="a") == {}


def test_a_damaged_file_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "blocks.0.attn.qkv.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not a header")
    with pytest.raises(FileFormatError, match=r"qkv.safetensors: not a pruned layer .*delete"):
        partial.kept(tmp_path, digest="a")
