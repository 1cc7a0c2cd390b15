from pathlib import Path

import pytest

pytest.importorskip("timm")
import torch

from lpvit_edge import deps
from lpvit_edge.errors import MissingDependencyError, ModelError
from lpvit_edge.models import load_model


def test_a_toml_file_says_everything_at_once(tiny_project: Path) -> None:
    model = load_model(str(tiny_project / "model.toml"))
    assert model.labels == ("bright", "dark", "ok")
    assert model.preprocess.image_size == 32
    assert model.calibration == tiny_project / "calibration"
    assert not model.module.training
    assert len(model.identity.weights_sha256) == 64


def test_no_such_file_says_what_can_be_given() -> None:
    with pytest.raises(ModelError, match=r"nowhere.toml: no such model file; give a .toml file"):
        load_model("nowhere.toml")


def test_an_unknown_timm_name_lists_near_ones() -> None:
    with pytest.raises(ModelError, match="timm knows no model 'deit_smal'; near it: deit"):
        load_model("deit_smal")


def test_weights_that_do_not_fit_name_keys_and_shapes(tiny_project: Path, tmp_path: Path) -> None:
    import safetensors.torch

    weights = safetensors.torch.load_file(tiny_project / "weights.safetensors")
    del weights["norm.bias"]
    weights["head.weight"] = torch.zeros(7, 64)
    weights["extra"] = torch.zeros(2)
    safetensors.torch.save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(ModelError) as caught:
        load_model(str(tiny_project / "model.toml"), weights=tmp_path / "w.safetensors")
    message = str(caught.value)
    assert "missing norm.bias (64,)" in message
    assert "unexpected extra (2,)" in message
    assert "head.weight is (7, 64) in the file and (3, 64) in the model" in message


def test_a_pt_file_is_read_without_unpickling_code(tiny_project: Path, tmp_path: Path) -> None:
    import safetensors.torch

    weights = safetensors.torch.load_file(tiny_project / "weights.safetensors")
    torch.save({"state_dict": weights}, tmp_path / "good.pt")
    loaded = load_model(str(tiny_project / "model.toml"), weights=tmp_path / "good.pt")
    assert loaded.identity.name == "model"
    torch.save({"state_dict": weights, "hook": print}, tmp_path / "evil.pt")
    with pytest.raises(ModelError, match=r"evil.pt: not a file of tensors"):
        load_model(str(tiny_project / "model.toml"), weights=tmp_path / "evil.pt")


@pytest.mark.parametrize("content", [b"", b"garbage", b'\x08\0\0\0\0\0\0\0{"a":1}x'])
def test_a_broken_weights_file_is_refused(
    tiny_project: Path, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"w.safetensors: not a file of tensors"):
        load_model(str(tiny_project / "model.toml"), weights=tmp_path / "w.safetensors")


def test_a_model_has_the_name_that_its_file_gives_it(tiny_project: Path) -> None:
    text = (tiny_project / "model.toml").read_text()
    named = tiny_project / "named.toml"
    named.write_text(text.replace("[model]\n", '[model]\nname = "belt 3"\n', 1))
    assert load_model(str(named)).identity.name == "belt 3"
    assert load_model(str(tiny_project / "model.toml")).identity.name == "model"


def test_a_misspelt_argument_that_a_factory_hands_on_is_refused_by_name(
    tiny_project: Path, tmp_path: Path
) -> None:
    (tmp_path / "factory.py").write_text(
        "def inner(*, width): ...\n"
        "def create(**arguments): return inner(**arguments)\n"
        "def broken(**arguments): return 1 + 'a'\n"
    )
    (tmp_path / "m.toml").write_text(
        '[model]\nfactory = "factory.py:create"\nweights = "w.pt"\n[model.arguments]\nwidht = 3\n'
    )
    with pytest.raises(ModelError, match=r"does not take \[model.arguments\] .*'widht'"):
        load_model(str(tmp_path / "m.toml"))
    (tmp_path / "m.toml").write_text(
        '[model]\nfactory = "factory.py:broken"\nweights = "w.pt"\n[model.arguments]\nwidth = 3\n'
    )
    with pytest.raises(TypeError, match="unsupported operand"):  # a fault of the file, not of ours
        load_model(str(tmp_path / "m.toml"))


def test_a_misspelt_key_in_the_toml_is_refused_by_name(tiny_project: Path, tmp_path: Path) -> None:
    text = (tiny_project / "model.toml").read_text()
    (tmp_path / "m.toml").write_text(text.replace("image_size", "imagesize"))
    with pytest.raises(ModelError, match=r"unknown field `imagesize`"):
        load_model(str(tmp_path / "m.toml"))
    (tmp_path / "m.toml").write_text("[model\n")
    with pytest.raises(ModelError, match=r"m.toml: "):
        load_model(str(tmp_path / "m.toml"))


FACTORY = """
from torch import nn

def create(width=8):
    return nn.Sequential(nn.Flatten(), nn.Linear(48, width), nn.Linear(width, 2))

def wrong():
    return 3
"""


def write_factory(folder: Path, factory: str) -> str:
    (folder / "net.py").write_text(FACTORY)
    (folder / "m.toml").write_text(
        f'[model]\nfactory = "{factory}"\nweights = "w.pt"\n[model.arguments]\n'
        "[preprocess]\nimage_size = 4\n"
    )
    return str(folder / "m.toml")


def test_a_users_own_module_comes_from_a_file_beside_the_toml(tmp_path: Path) -> None:
    path = write_factory(tmp_path, "net.py:create")
    torch.save(
        {k: torch.zeros(s) for k, s in {"1.weight": (8, 48), "1.bias": (8,)}.items()}
        | {"2.weight": torch.zeros(2, 8), "2.bias": torch.zeros(2)},
        tmp_path / "w.pt",
    )
    assert load_model(path).preprocess.image_size == 4


def test_a_misspelt_argument_is_refused_by_name(tmp_path: Path) -> None:
    path = write_factory(tmp_path, "net.py:create")
    text = Path(path).read_text().replace("[model.arguments]", "[model.arguments]\nwidht = 3")
    Path(path).write_text(text)
    with pytest.raises(ModelError, match=r"\{'widht': 3\}: .*unexpected keyword argument 'widht'"):
        load_model(path)


def test_a_factory_may_import_its_neighbours_and_hold_dataclasses(tmp_path: Path) -> None:
    path = write_factory(tmp_path, "net.py:create")
    (tmp_path / "neighbour_of_net.py").write_text("WIDTH = 8\n")
    extra = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "from neighbour_of_net import WIDTH\n@dataclass\nclass C:\n    x: int = WIDTH\n"
    )
    (tmp_path / "net.py").write_text(extra + FACTORY)
    with pytest.raises(ModelError, match="no such weights file"):
        load_model(path)


@pytest.mark.parametrize("line", ["image_size = 0", "std = [0.5, 0.0, 0.5]", "crop_fraction = 0.0"])
def test_impossible_preprocessing_is_refused(tiny_project: Path, tmp_path: Path, line: str) -> None:
    key = line.split()[0]
    kept = [x for x in (tiny_project / "model.toml").read_text().splitlines() if key not in x]
    (tmp_path / "m.toml").write_text("\n".join([*kept, line]))
    with pytest.raises(ModelError, match=rf"preprocess.{key}"):
        load_model(str(tmp_path / "m.toml"))


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("net.py:absent", "has no function 'absent'"),
        ("other.py:create", "no such Python file"),
        ("no_such_package.module:create", "cannot import no_such_package.module"),
        ("net.py:wrong", "returned int, expected a torch nn.Module"),
    ],
)
def test_a_factory_that_cannot_be_used_says_why(tmp_path: Path, factory: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(write_factory(tmp_path, factory))


def test_a_torchvision_of_another_build_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(deps, "import_module", broken)
    with pytest.raises(MissingDependencyError, match="are not from the same build"):
        deps.require("timm")


def test_it_is_explained_too_when_the_users_own_file_imports_it(tmp_path: Path) -> None:
    path = write_factory(tmp_path, "net.py:create")
    text = 'raise RuntimeError("operator torchvision::nms does not exist")'
    (tmp_path / "net.py").write_text(text)
    with pytest.raises(MissingDependencyError, match="are not from the same build"):
        load_model(path)
