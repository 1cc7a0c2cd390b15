"""The pruning benchmark: what its rows say, and that every method prunes what it is asked for."""

from pathlib import Path

import pytest

pytest.importorskip("timm")
torch = pytest.importorskip("torch")

from torch import Tensor  # noqa: E402

from benchmarks import pruning  # noqa: E402
from benchmarks.pruning import Cell, cells, measured  # noqa: E402
from benchmarks.pruning_equal import (  # noqa: E402
    Network,
    beside,
    designed,
    front,
    halved,
    packed,
    unpacked,
)
from benchmarks.pruning_methods import METHODS  # noqa: E402
from benchmarks.pruning_rows import Row, Store, paired_drop  # noqa: E402
from benchmarks.pruning_sparsegpt import sweep  # noqa: E402
from benchmarks.pruning_subject import Subject  # noqa: E402
from benchmarks.pruning_table import markdown, replaced  # noqa: E402
from lpvit_edge.errors import MismatchError  # noqa: E402
from lpvit_edge.layers import walk  # noqa: E402
from lpvit_edge.pattern import parse_pattern  # noqa: E402
from tests.test_pruning_peers import vit  # noqa: E402

OWN = ("magnitude", "lpvit", "sparsegpt", "uniform", "allocated", "allocated_as_it_is")


@pytest.fixture(scope="module")
def subject() -> Subject:
    """A small random transformer and noise: enough to see what is zero afterwards."""
    torch.manual_seed(0)
    model = vit().eval()
    images = torch.randn(48, 3, 32, 32)
    classes = torch.arange(48) % 5
    half = (images[:24], classes[:24])
    return Subject(
        "tiny",
        model,
        walk(model, image_size=32),
        half,
        (images[24:], classes[24:]),
        ("64x1", "64x16", "2:4"),
    )


@pytest.mark.parametrize(
    ("method", "pattern"),
    [(m, p) for m in OWN for p in ("64x1", "64x16", "2:4") if p in METHODS[m].patterns],
)
def test_each_method_removes_the_share_it_is_asked_for(
    subject: Subject, method: str, pattern: str
) -> None:
    row = measured(subject, Cell(method=method, pattern=pattern, sparsity=0.5))
    assert row.reason is None
    assert row.reached == pytest.approx(0.5, abs=0.03)
    assert row.accuracy is not None
    assert row.seconds is not None


def test_blocks_are_pruned_in_a_rotated_model_and_2_4_in_the_model_as_it_is(
    subject: Subject,
) -> None:
    assert 0.0 <= subject.divergence(subject.logits(subject.rotated.module)) < 1e-6
    tokens = "pos_embed"  # which no method prunes
    for pattern, kept in (("64x1", subject.rotated), ("2:4", subject)):
        model = METHODS["uniform"].prunes(subject, parse_pattern(pattern), 0.5).model
        assert torch.equal(model.state_dict()[tokens], kept.module.state_dict()[tokens])
        assert subject.divergence(subject.logits(model)) > 1e-6


def test_an_absent_library_is_named_and_not_dropped(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruning, "installed", lambda package: None)
    row = measured(subject, Cell(method="modelopt_sparsegpt", pattern="2:4", sparsity=0.5))
    assert row.accuracy is None
    assert row.reason == "nvidia-modelopt is not installed"


def test_the_grid_leaves_out_what_a_method_does_not_know() -> None:
    grid = list(cells(("64x1", "2:4"), ("lpvit", "uniform"), (0.5, 0.6)))
    assert [(c.method, c.pattern, c.sparsity) for c in grid] == [
        ("lpvit", "64x1", 0.5),
        ("uniform", "64x1", 0.5),
        ("lpvit", "64x1", 0.6),
        ("uniform", "64x1", 0.6),
        ("uniform", "2:4", 0.5),
    ]


def test_a_drop_counts_the_images_lost_and_won() -> None:
    dense = torch.tensor([True] * 90 + [False] * 10)
    pruned = torch.tensor([False] * 6 + [True] * 84 + [True] * 2 + [False] * 8)
    found = paired_drop(dense, pruned)
    assert (found["lost"], found["won"]) == (6, 2)
    assert found["drop"] == pytest.approx(4.0)
    assert found["drop_low"] < 0.0 < 4.0 < found["drop_high"] < 11.0


def test_equal_answers_still_leave_an_interval() -> None:
    right = torch.ones(2000, dtype=torch.bool)
    found = paired_drop(right, right)
    assert found["drop"] == 0.0
    assert found["drop_low"] == pytest.approx(-found["drop_high"])
    assert 0.05 < found["drop_high"] < 0.2


def test_the_interval_holds_the_truth_nineteen_times_in_twenty() -> None:
    generator = torch.Generator().manual_seed(1)
    held = 0
    for _ in range(400):
        dense = torch.rand(2000, generator=generator) < 0.97
        flipped = torch.rand(2000, generator=generator)
        pruned = torch.where(dense, flipped >= 0.012, flipped < 0.1)
        found = paired_drop(dense, pruned)
        truth = 100 * (0.97 * 0.012 - 0.03 * 0.1)
        held += found["drop_low"] <= truth <= found["drop_high"]
    assert 0.92 <= held / 400 <= 0.98


def row(**more: object) -> Row:
    fields = {"model": "m", "method": "uniform", "pattern": "64x1", "sparsity": 0.6}
    return Row(**{**fields, **more})  # type: ignore[arg-type]


def test_finished_rows_are_found_again_and_other_images_refused(tmp_path: Path) -> None:
    path = tmp_path / "pruning.json"
    first = Store(path, {"m": {"heldout_sha256": "a"}})
    first.note("m", sensitivity_seconds=1.5)
    first.add(row(accuracy=0.9, drop=1.0))
    again = Store(path, {"m": {"heldout_sha256": "a"}})
    assert again.document["facts"]["m"]["sensitivity_seconds"] == 1.5
    assert row() in again
    assert row(sparsity=0.7) not in again
    again.forget("uniform", models=["other"])
    assert row() in again
    again.forget("uniform", models=["m"])
    assert row() not in again
    with pytest.raises(MismatchError, match="another heldout_sha256"):
        Store(path, {"m": {"heldout_sha256": "b"}})


def document(*rows: Row) -> dict[str, object]:
    """What the benchmark leaves on disk, with the dense model's row."""
    dense = row(method="dense", pattern="dense", sparsity=0.0, accuracy=0.97, drop=0.0)
    return {
        "commands": ["python -m benchmarks.pruning"],
        "versions": {"torch": "2"},
        "threads": 2,
        "facts": {"m": {"heldout_images": 2000}},
        "rows": [
            {name: getattr(found, name) for name in Row.__struct_fields__}
            for found in (dense, *rows)
        ],
    }


def test_the_page_says_by_how_much_a_goal_is_missed_and_keeps_what_stands_around() -> None:
    missed = row(accuracy=0.962, drop=0.8, drop_low=0.2, drop_high=1.4)
    text = replaced("# Title\n", markdown(document(missed)))
    assert "64x1 at 60%, uniform, at most 0.3 points: missed by 0.50 points" in text
    assert "0.80 (0.20 to 1.40)" in text
    assert replaced(text + "after\n", "new").startswith("# Title")
    assert "after" in replaced(text + "after\n", "new")
    assert "0.80" not in replaced(text, "new")


def test_each_of_our_plans_is_held_against_lpvits_masks_by_itself() -> None:
    drops = {"lpvit": 2.5, "uniform": 0.7, "allocated": 0.1}
    rows = (
        row(method=method, pattern="64x64", drop=drop, drop_low=drop - 0.5, drop_high=drop + 0.5)
        for method, drop in drops.items()
    )
    text = markdown(document(*rows))
    judged = "uniform missed, 4 times (0.70); allocated met, 25 times (0.10)"
    assert f"64x64 at 60%, LPViT's drop (2.50) at least 10 times ours: {judged}" in text


def test_the_sweep_makes_up_for_what_it_removes() -> None:
    torch.manual_seed(0)
    W = torch.randn(64, 64)
    x = torch.randn(4000, 64) @ (torch.eye(64) + 3.0 * torch.randn(64, 64) / 8)
    H = (x.T @ x).double() / len(x)
    pattern = parse_pattern("2:4")
    swept = sweep(W, H, pattern, 0.5)
    assert int(torch.count_nonzero(swept.reshape(64, 16, 4), dim=2).max()) == 2
    magnitudes = W.abs().reshape(64, 16, 4)
    kept = torch.zeros_like(magnitudes).scatter(2, magnitudes.topk(2, dim=2).indices, 1.0)
    masked = W * kept.reshape(64, 64)

    def error(V: Tensor) -> float:
        D = (V - W).double()
        return float(((D @ H) * D).sum())

    assert error(swept) < 0.8 * error(masked)


DENSE = torch.ones(2000, dtype=torch.bool)


def network(plan: str, latency_ms: float, *, wrong: int, first: int = 0) -> Network:
    """A network that has `wrong` neighbouring images wrong; the dense one has all right."""
    right = DENSE.clone()
    right[first : first + wrong] = False
    drop = paired_drop(DENSE, right)
    return Network(
        plan=plan,
        pattern="64x64",
        sparsity=0.5,
        forms={},
        gone=[],
        latency_ms=latency_ms,
        mad_ms=0.01,
        share=latency_ms / 10,
        predicted_share=latency_ms / 10,
        trial_share=None,
        **{name: drop[name] for name in ("drop", "drop_low", "drop_high", "lost", "won")},
        distortion=0.0,
        loss_rise=0.0,
        right=packed(right),
        dense_right=packed(DENSE),
    )


def test_answers_packed_come_back_as_they_were() -> None:
    right = torch.rand(2000, generator=torch.Generator().manual_seed(0)) < 0.9
    assert torch.equal(unpacked(packed(right)), right)


@pytest.mark.parametrize(
    ("uniform", "allocated", "words", "excess"),
    [
        (60, 10, "halved, by the whole interval", -2.0),
        (60, 29, "halved", -0.1),
        (60, 31, "not halved", 0.1),
        (60, 60, "not halved, by the whole interval", 3.0),
        (1, 0, "nothing to halve", -0.05),
    ],
)
def test_half_the_drop_is_judged_on_the_same_images(
    uniform: int, allocated: int, words: str, excess: float
) -> None:
    verdict = halved(
        network("uniform", 5.0, wrong=uniform), network("allocated", 5.0, wrong=allocated)
    )
    assert verdict.words == words
    assert verdict.excess == pytest.approx(excess)
    assert verdict.low <= verdict.excess <= verdict.high


def test_images_lost_by_both_networks_widen_the_interval_less_than_others() -> None:
    uniform = network("uniform", 5.0, wrong=60)
    same = halved(uniform, network("allocated", 5.0, wrong=30))
    others = halved(uniform, network("allocated", 5.0, wrong=30, first=1000))
    assert same.excess == others.excess == pytest.approx(0.0)
    assert same.high - same.low < 0.8 * (others.high - others.low)


def test_the_slowest_allocated_network_that_is_no_slower_is_set_beside() -> None:
    networks = [network("allocated", ms, wrong=1) for ms in (4.0, 4.9, 5.1)]
    found = beside(network("uniform", 5.0, wrong=9), networks, pattern="64x64")
    assert found is networks[1]
    assert beside(network("uniform", 3.9, wrong=9), networks, pattern="64x64") is None
    assert beside(network("uniform", 5.0, wrong=9), networks, pattern="mixed") is None
    assert designed(network("uniform", 1.0, wrong=9), networks) is networks[0]  # by what was asked


def test_a_uniform_network_that_another_beats_in_both_is_not_on_the_front() -> None:
    fast, good, beaten = (
        network("uniform", 4.0, wrong=9),
        network("uniform", 6.0, wrong=2),
        network("uniform", 5.0, wrong=12),
    )
    assert front([beaten, good, fast, network("allocated", 1.0, wrong=0)]) == [fast, good]
