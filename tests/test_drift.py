"""The drift watch: numbers against their sources, alarms that must and must not come."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from lpvit_edge import files
from lpvit_edge.drift.covariance import distance_per_feature, ledoit_wolf, whitening
from lpvit_edge.drift.diagnosis import diagnose
from lpvit_edge.drift.evidence import Evidence, bets, rank_bounds, smoothed_p
from lpvit_edge.drift.image_statistics import image_statistics
from lpvit_edge.drift.own_past import OwnPast, label_bets
from lpvit_edge.drift.reference import (
    Reference,
    ReferenceNote,
    Seen,
    build_reference,
    load_reference,
    rows_of,
    save_reference,
    softmax,
)
from lpvit_edge.drift.rules import Rules, read_rules
from lpvit_edge.drift.watch import DriftWatch
from lpvit_edge.errors import DataError, FileFormatError, MismatchError, UnknownOptionError

FEATURES, CLASSES = 6, 3
Statistics = tuple[float, float, float, float, float]
USUAL: Statistics = (0.5, 0.12, 2.0, 0.34, 0.33)
SPREAD: Statistics = (0.05, 0.02, 0.3, 0.01, 0.01)


def frames(
    count: int,
    seed: int,
    *,
    at: float = 0.0,
    statistics: Statistics = (0, 0, 0, 0, 0),
    mix: tuple[float, ...] = (0.4, 0.3, 0.3),
) -> Seen:
    """Frames of three classes; `at` moves the embedding, `statistics` by so many deviations."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(CLASSES, count, p=mix)
    features = rng.standard_normal((count, FEATURES)) + at
    features[np.arange(count), labels] += 6
    logits = 8 * np.eye(CLASSES)[labels] + rng.standard_normal((count, CLASSES))
    numbers = np.array(USUAL) + SPREAD * (rng.standard_normal((count, 5)) + statistics)
    return Seen(
        features=features.astype(np.float32),
        probabilities=softmax(logits),
        statistics=numbers.astype(np.float32),
    )


@pytest.fixture(scope="module")
def reference() -> Reference:
    return build_reference(frames(300, 1), frames(900, 2))[0]


def first_alarm(watch: DriftWatch, seen: Seen, level: str = "red") -> int | None:
    for number, frame in enumerate(rows_of(seen), start=1):
        if watch.add(*frame).raised == level:
            return number
    return None


def skewed(rows: int, columns: int) -> NDArray[np.float64]:
    i, j = np.arange(rows)[:, None], np.arange(columns)[None]
    X = np.sin(0.37 * i * (1 + j % 3)) + 0.5 * np.cos(0.11 * i * j)
    return np.asarray(X - X.mean(axis=0))


def test_the_shrunk_covariance_is_that_of_scikit_learn() -> None:
    """Values of sklearn.covariance.ledoit_wolf(X, assume_centered=True), scikit-learn 1.9.1."""
    S, rho = ledoit_wolf(skewed(40, 60))
    assert rho == pytest.approx(0.1012487876211391, rel=1e-9)
    assert [S[0, 0], S[0, 1], S[5, 19]] == pytest.approx(
        [0.5103033671753209, 0.06836990250758825, 0.04710391387795228], rel=1e-9
    )
    S, rho = ledoit_wolf(skewed(40, 60)[:, :8])
    assert rho == pytest.approx(0.12249836593658216, rel=1e-9)
    assert [S[0, 0], S[0, 1], S[2, 7]] == pytest.approx(
        [0.5147868578890558, 0.06675340221502254, 0.053883589164452586], rel=1e-9
    )


def test_the_distance_is_mahalanobis_distance_over_the_features() -> None:
    covariance, _ = ledoit_wolf(skewed(40, 8))
    x, mean = np.arange(8.0), np.ones(8)
    expected = (x - mean) @ np.linalg.inv(covariance) @ (x - mean) / 8
    assert distance_per_feature(x, mean, whitening(covariance)) == pytest.approx(expected, rel=1e-4)


def test_embeddings_that_do_not_vary_are_refused() -> None:
    with pytest.raises(DataError, match="do not vary"):
        whitening(ledoit_wolf(np.zeros((60, 4)))[0])


def test_p_values_of_usual_frames_are_uniform() -> None:
    rng = np.random.default_rng(0)
    counts = np.zeros((1, 1024), np.int64)
    found = []
    for _ in range(4000):
        place = np.array([int(rng.integers(300, 310))])  # ten values only: ties everywhere
        found.append(float(smoothed_p(counts, place, rng.random(1))[0]))
        counts[0, place] += 1
    below = [np.mean(np.array(found) <= q) for q in (0.01, 0.1, 0.5, 0.9)]
    assert below == pytest.approx([0.01, 0.1, 0.5, 0.9], abs=0.03)


@pytest.mark.parametrize("n", [20, 200])
def test_bounds_by_rank_hold_for_all_ranks_at_once(n: int) -> None:
    rng = np.random.default_rng(1)
    bounds = rank_bounds(n, delta=0.05)
    tails = np.sort(rng.random((2000, n)), axis=1)  # true P(score >= s) at the reference's scores
    broken = (tails > bounds[:-1]).any(axis=1).mean()
    assert broken <= 0.05
    assert bounds[-1] == 1.0
    assert bounds[0] == pytest.approx(1 - (0.05 / n) ** (1 / n), abs=1e-6)  # closed form at rank 0


def test_a_bet_is_fair_against_a_uniform_p_value() -> None:
    p = (np.arange(1_000_000) + 0.5) / 1_000_000
    # The strongest bet has an integrable pole at 0, which a grid sees a little too small.
    assert bets(p).mean(axis=0) == pytest.approx(np.ones(9), abs=0.15)
    assert (bets(p).mean(axis=0) <= 1 + 1e-6).all()
    assert label_bets(p).mean(axis=0) == pytest.approx(np.ones(21), abs=1e-4)
    assert label_bets(p).min() > 0.0  # nobody is ruined by one frame


def test_evidence_minus_frames_stays_level_while_nothing_changes() -> None:
    """R_n - n is a martingale: over many lines the mean of R_50 is at most 50."""
    rng = np.random.default_rng(2)
    levels = []
    for _ in range(300):
        evidence = Evidence()
        for _ in range(50):
            p = rng.random(7)
            evidence.add(p, p, 1 - p)
        levels.append(evidence.level().mean())
    assert np.median(levels) < 50
    assert np.mean(levels) < 100  # heavy tails: the mean of 300 lines is itself uncertain


def test_a_healthy_line_raises_no_alarm_whatever_its_mix_of_classes(reference: Reference) -> None:
    watch = DriftWatch(reference, Rules(watch_labels=False))
    healthy = frames(6000, 3, mix=(0.97, 0.02, 0.01))
    assert first_alarm(watch, healthy, "yellow") is None
    assert first_alarm(watch, frames(3000, 4, mix=(0.02, 0.01, 0.97)), "yellow") is None


def test_a_class_that_comes_more_often_is_yellow_and_never_red(reference: Reference) -> None:
    watch = DriftWatch(reference, Rules(hold=10_000))
    assert first_alarm(watch, frames(1000, 3, mix=(0.97, 0.02, 0.01)), "yellow") is None
    number = first_alarm(watch, frames(2000, 4, mix=(0.87, 0.02, 0.11)), "yellow")
    assert number is not None
    assert number < 500
    after = frames(2000, 5, mix=(0.87, 0.02, 0.11))
    assert first_alarm(watch, after, "red") is None
    state = watch.add(*next(rows_of(after)))
    assert (state.level, state.cause) == ("yellow", "class mix")
    marked = [watch.add(*frame).strange for frame in rows_of(after)]
    rising = after.probabilities.argmax(axis=1) == 2
    assert marked == rising.tolist()  # the sample for labelling is of that class


def test_a_mix_of_classes_that_ends_takes_no_other_evidence_with_it() -> None:
    own, generator = OwnPast(2), np.random.default_rng(9)
    for _ in range(500):
        own.add(0, float(generator.chisquare(6)) / 6, generator)
    for number in range(60):
        own.add(number % 2, 100.0, generator)
    outliers, labels = own.level()
    own.clear_labels()
    assert labels > 1e3
    assert own.level().tolist() == [outliers, 0.0]


def test_the_ranks_of_labels_are_uniform_while_nothing_changes() -> None:
    own, generator = OwnPast(3), np.random.default_rng(7)
    found = np.array(
        [
            own.add(int(generator.choice(3, p=(0.9, 0.07, 0.03))), 1.0, generator)
            for _ in range(4000)
        ]
    )
    for quantile in (0.01, 0.1, 0.5, 0.9):
        assert (found <= quantile).mean(axis=0) == pytest.approx([quantile] * 4, abs=0.03)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_rare_class_that_comes_five_times_as_often_is_found_within_a_thousand_frames(
    seed: int,
) -> None:
    """Bets by powers of the p-value needed 1.9 times as many frames (benchmarks/drift.py)."""
    own, generator = OwnPast(10), np.random.default_rng(seed)
    shares = np.full(10, 0.007)
    shares[0] += 1 - shares.sum()
    for label in generator.choice(10, 6000, p=shares):
        own.add(int(label), 1.0, generator)
    assert own.level()[1] < 1e5
    shares[[0, 7]] += [-0.028, 0.028]
    levels = []
    for label in generator.choice(10, 1000, p=shares):
        own.add(int(label), 1.0, generator)
        levels.append(own.level()[1])
    assert max(levels) > 1e6
    assert own.rising() == 7


def test_the_share_of_strange_frames_is_that_of_the_window(reference: Reference) -> None:
    watch = DriftWatch(reference, Rules(window=16, yellow_at=1e14, red_at=1e14))
    seen = frames(60, 6)
    seen.features[::3] += 20.0
    states = [watch.add(*frame) for frame in rows_of(seen)]
    for last in (5, 20, 59):
        window = states[max(0, last - 15) : last + 1]
        assert states[last].strange_share == sum(s.strange for s in window) / len(window)
    assert 0.2 < states[-1].strange_share < 0.5


def test_outliers_of_all_classes_together_are_evidence() -> None:
    own, generator = OwnPast(2), np.random.default_rng(8)
    for number in range(1000):
        own.add(number % 2, float(generator.chisquare(6)) / 6, generator)
    usual = own.level()[0]
    for number in range(300):
        scale = 3.0 if number % 10 == 0 else 1.0  # a tenth of the frames lies far out
        own.add(number % 2, scale * float(generator.chisquare(6)) / 6, generator)
    assert own.level()[0] > 100 * max(usual, 1.0)
    own.clear()
    assert own.level().max() == 0.0


@pytest.mark.parametrize(
    ("cause", "at", "statistics"),
    [
        ("light", 0.5, (-2.0, 0, 0.3, 0, 0)),
        ("focus", 0.5, (0, -1.0, -1.5, 0, 0)),
        ("material", 2.0, (-2.0, 1.0, 1.0, 2.0, -2.0)),
        ("unknown content", 2.0, (0, 0, 0, 0, 0)),
    ],
)
def test_a_change_is_found_soon_and_called_by_its_cause(
    reference: Reference, cause: str, at: float, statistics: Statistics
) -> None:
    watch = DriftWatch(reference, Rules())
    assert first_alarm(watch, frames(500, 5), "yellow") is None
    changed = frames(400, 6, at=at, statistics=statistics)
    number = first_alarm(watch, changed)
    assert number is not None
    assert number < 100
    state = watch.add(*next(rows_of(changed)))
    assert (state.level, state.cause) == ("red", cause)
    assert state.text


def test_a_slow_change_is_found_though_each_step_looks_usual(reference: Reference) -> None:
    watch = DriftWatch(reference, Rules())
    for step in range(50):  # to 3.3 standard deviations
        drifted = frames(50, 100 + step, statistics=(-step / 15, 0, 0, 0, 0))
        if first_alarm(watch, drifted) is not None:
            assert watch.add(*next(rows_of(drifted))).cause == "light"
            return
    pytest.fail("there was no alarm")


def test_an_alarm_ends_when_the_line_is_as_before(reference: Reference) -> None:
    watch = DriftWatch(reference, Rules(hold=300))
    assert first_alarm(watch, frames(200, 7, at=3.0)) is not None
    state = [watch.add(*frame) for frame in rows_of(frames(800, 8))][-1]
    assert (state.level, state.cause, state.raised) == ("green", None, None)


def test_one_strange_frame_is_marked_and_raises_nothing(reference: Reference) -> None:
    watch = DriftWatch(reference, Rules())
    usual = watch.add(*next(rows_of(frames(1, 9))))
    odd = watch.add(*next(rows_of(frames(1, 10, at=4.0))))
    assert (usual.strange, odd.strange) == (False, True)
    assert odd.distance > 5 * usual.distance
    assert odd.level == "green"


def test_frames_of_another_model_are_refused(reference: Reference) -> None:
    watch = DriftWatch(reference, Rules())
    with pytest.raises(MismatchError, match=r"\(2,\) features and \(3,\) classes"):
        watch.add(np.zeros(2, np.float32), np.full(3, 1 / 3, np.float32), np.zeros(5, np.float32))


def test_classes_with_few_images_share_a_category() -> None:
    heldout = frames(400, 11, mix=(0.9, 0.06, 0.04))
    reference, _ = build_reference(frames(300, 1), heldout)
    assert reference.category_of.tolist() == [1, 0, 0]
    assert (reference.counts.sum(axis=2) == reference.counts[:, :1].sum(axis=2)).all()
    assert reference.counts[:, 0].sum() == 400


def test_a_reference_needs_enough_images() -> None:
    with pytest.raises(DataError, match="20 held-out images are too few"):
        build_reference(frames(300, 1), frames(20, 2))


def test_a_reference_comes_back_from_disk_and_a_damaged_one_does_not(
    reference: Reference, tmp_path: Path
) -> None:
    save_reference(
        reference, tmp_path, onnx_sha256="0" * 64, engine="fake", images=(300, 900), shrinkage=0.1
    )
    loaded, note = load_reference(tmp_path)
    assert (note.features, note.classes, note.heldout_images) == (FEATURES, CLASSES, 900)
    for name in Reference.__struct_fields__:
        assert np.array_equal(getattr(loaded, name), getattr(reference, name))
    arrays = tmp_path / "reference.safetensors"
    arrays.write_bytes(arrays.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(FileFormatError, match="not the file that reference"):
        load_reference(tmp_path)


def test_arrays_that_do_not_fit_the_note_are_named(reference: Reference, tmp_path: Path) -> None:
    import msgspec

    broken = msgspec.structs.replace(reference, means=np.full_like(reference.means, np.nan))
    save_reference(
        broken, tmp_path, onnx_sha256="0" * 64, engine="fake", images=(300, 900), shrinkage=0.1
    )
    with pytest.raises(FileFormatError, match="means holds numbers that are not finite"):
        load_reference(tmp_path)


def picture(seed: int = 0, side: int = 96) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    coarse = np.kron(rng.uniform(60, 160, (side // 4, side // 4, 3)), np.ones((4, 4, 1)))
    return coarse.astype(np.uint8)


def test_dimming_takes_brightness_alone_and_blurring_takes_sharpness() -> None:
    usual = image_statistics(picture())
    dimmed = image_statistics((picture() * 0.7).astype(np.uint8))
    assert dimmed / usual == pytest.approx([0.7, 1, 1, 1, 1], abs=0.02)
    averaged = (picture().astype(float) + np.roll(picture(), 1, 0) + np.roll(picture(), 1, 1)) / 3
    blurred = image_statistics(averaged.astype(np.uint8))
    assert blurred[0] == pytest.approx(usual[0], abs=0.01)
    assert blurred[2] < 0.7 * usual[2]


def test_statistics_of_a_flat_picture_and_of_a_large_one_are_finite() -> None:
    assert np.isfinite(image_statistics(np.full((8, 8, 3), 7, np.uint8))).all()
    assert np.isfinite(image_statistics(np.zeros((2, 300, 3), np.uint8))).all()
    large = image_statistics(picture(side=1200))
    assert large == pytest.approx(image_statistics(picture(1, side=1200)), rel=0.1)


def test_a_change_without_a_shape_is_unknown_content() -> None:
    rng = np.random.default_rng(0)
    assert diagnose(rng.standard_normal((200, 5)), np.ones(200, bool)) == "unknown content"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[drift]\nyelow_at = 3.0", "unknown field `yelow_at`"),
        ("[drift]\nyellow_at = 1e9", "red needs at least as much evidence"),
        ("[drift", "rules.toml"),
        ("[drift]\nwindow = 2", "window"),
    ],
)
def test_rules_that_say_nothing_sensible_are_refused(
    text: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "rules.toml").write_text(text)
    with pytest.raises(UnknownOptionError, match=message):
        read_rules(tmp_path / "rules.toml")


def test_a_file_without_a_drift_table_gives_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "rules.toml").write_text("[sinks]\n")
    assert read_rules(tmp_path / "rules.toml") == Rules()


def test_the_reference_is_made_with_the_engine_that_runs(tmp_path: Path) -> None:
    from PIL import Image

    from lpvit_edge.drift.build import write_reference
    from lpvit_edge.images import Preprocess, scan_folder

    for split, count, seed in (("calibration", 60, 0), ("heldout", 60, 100)):
        (tmp_path / split).mkdir()
        for number in range(count):
            pixels = picture(seed + number, side=8)
            Image.fromarray(pixels).save(tmp_path / split / f"{number:03d}.png")
    onnx = tmp_path / "bundle" / "model.onnx"
    onnx.parent.mkdir()
    onnx.write_bytes(b"the fake engine reads no file")
    note = write_reference(
        onnx,
        calibration=scan_folder(tmp_path / "calibration", labels=None),
        heldout=scan_folder(tmp_path / "heldout", labels=None),
        preprocess=Preprocess(image_size=4),
        engine="fake",
        threads=1,
    )
    assert note is not None
    reference, found = load_reference(onnx.parent)
    assert found == note
    again = write_reference(
        onnx,
        calibration=scan_folder(tmp_path / "calibration", labels=None),
        heldout=scan_folder(tmp_path / "heldout", labels=None),
        preprocess=Preprocess(image_size=4),
        engine="fake",
        threads=1,
        name="dense_reference",
    )
    assert again == files.load(ReferenceNote, onnx.parent / "dense_reference.json")
    assert load_reference(onnx.parent)[1] == note  # the other one is still there
    assert (note.features, note.classes, note.calibration_images) == (3, 3, 60)
    assert reference.counts[:, 0].sum() == 60


def test_too_few_images_leave_no_reference_and_say_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    from lpvit_edge.drift.build import write_reference
    from lpvit_edge.images import Preprocess, scan_folder

    Image.fromarray(picture(side=8)).save(tmp_path / "one.png")
    (tmp_path / "model.onnx").write_bytes(b"")
    (tmp_path / "reference.json").write_text("of an earlier model")
    images = scan_folder(tmp_path, labels=None)
    preprocess = Preprocess(image_size=4)
    note = write_reference(
        tmp_path / "model.onnx",
        calibration=images,
        heldout=images,
        preprocess=preprocess,
        engine="fake",
        threads=1,
    )
    assert note is None
    assert "no drift reference: 1 calibration images are too few" in capsys.readouterr().err
    assert not (tmp_path / "reference.json").exists()
