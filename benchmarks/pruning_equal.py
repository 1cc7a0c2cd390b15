"""Whether an allocated network loses at most half of what a uniform one no faster loses.

    python -m benchmarks.pruning_equal benchmarks/results/pruning_latency.json

writes the tables of pruning_latency.md; what stands outside its two markers stays.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from benchmarks.pruning_table import replaced
from lpvit_edge.files import write_atomic

MIXED = "mixed"
_DRAWS, _SEED = 20_000, 0


class Network(msgspec.Struct, frozen=True, kw_only=True):
    """One pruned network, timed and scored."""

    plan: str  # uniform | allocated
    pattern: str
    sparsity: float  # of uniform; allocated for the latency of that (mixed: in ms)
    forms: dict[str, str]
    gone: list[str]  # what was taken out of the exported graph
    latency_ms: float
    mad_ms: float  # median absolute deviation
    share: float  # of the dense latency, measured
    predicted_share: float
    trial_share: float | None  # of the network that allocation times before pruning
    drop: float
    drop_low: float
    drop_high: float
    lost: int
    won: int
    distortion: float  # predicted rise of the loss, all layers added up
    loss_rise: float  # on the calibration images
    divergence: float | None = None  # of the answers from the dense ones, mean over held-out images
    right: str  # which held-out images it has right, packed
    dense_right: str


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """2 drop(allocated) - drop(uniform) in points with its 95 % interval: halved where <= 0."""

    excess: float
    low: float
    high: float
    words: str


def packed(right: Tensor) -> str:
    """Bools (n,) as hexadecimal digits; n is a multiple of 8."""
    return np.packbits(right.numpy()).tobytes().hex()


def unpacked(digits: str) -> Tensor:
    """What `packed` packed."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(digits), dtype=np.uint8))
    return torch.from_numpy(bits.astype(bool))


def beside(uniform: Network, networks: Sequence[Network], *, pattern: str) -> Network | None:
    """The slowest network allocated in a pattern that was measured no slower; None if none was."""
    allocated = [
        n
        for n in networks
        if n.plan == "allocated" and n.pattern == pattern and n.latency_ms <= uniform.latency_ms
    ]
    return max(allocated, key=lambda n: n.latency_ms, default=None)


def designed(uniform: Network, networks: Sequence[Network]) -> Network | None:
    """The network allocated in the same pattern for this one's predicted latency."""
    key = ("allocated", uniform.pattern, uniform.sparsity)
    return next((n for n in networks if (n.plan, n.pattern, n.sparsity) == key), None)


def front(networks: Sequence[Network]) -> list[Network]:
    """The uniform networks that no other one beats in latency and in accuracy at once."""
    uniform = sorted((n for n in networks if n.plan == "uniform"), key=lambda n: n.latency_ms)
    best: list[Network] = []
    for network in uniform:
        if not best or network.drop < best[-1].drop:
            best.append(network)
    return best


def halved(uniform: Network, allocated: Network) -> Verdict:
    """Judge one pair on the same images; the interval is a bootstrap over images."""
    dense = unpacked(uniform.dense_right).int()
    u, a = (unpacked(n.right).int() for n in (uniform, allocated))
    z = (dense - 2 * a + u).numpy()  # 2 (dense - a) - (dense - u), for each image
    values, counts = np.unique(z, return_counts=True)
    draws = np.random.default_rng(_SEED).multinomial(len(z), counts / len(z), size=_DRAWS)
    low, high = np.quantile(100.0 * draws @ values / len(z), (0.025, 0.975))
    excess = 100.0 * float(z.mean())
    if uniform.drop_low <= 0.0:
        words = "nothing to halve"
    elif excess > 0.0:
        words = "not halved" if low <= 0.0 else "not halved, by the whole interval"
    else:
        words = "halved" if high > 0.0 else "halved, by the whole interval"
    return Verdict(excess=excess, low=float(low), high=float(high), words=words)


def markdown(document: dict[str, Any]) -> str:
    """A chapter for each model, a table for each pattern, one for all patterns mixed."""
    models = [name for name in document if name != "schema"]
    return "\n\n".join(part for model in models for part in _model(model, document[model]))


def _model(model: str, section: dict[str, Any]) -> Iterator[str]:
    networks = msgspec.convert(section["networks"], list[Network])
    yield f"## {model}"
    yield f"    {section['command']}"
    doubts = "; ".join(section["profile_reasons"]) or "nothing speaks against it"
    unstable = section["unstable"]
    calls = f"{len(unstable)} of them called unstable" if unstable else "all stable"
    yield (
        f"Dense {section['dense_ms']:.2f} ± {section['dense_mad_ms']:.2f} ms (median and median "
        f"absolute deviation), {section['threads']} thread(s), OpenVINO; networks "
        f"timed in turns, {calls}. The profile: {doubts}."
    )
    for pattern in dict.fromkeys(n.pattern for n in networks if n.plan == "uniform"):
        of = [n for n in networks if n.plan == "uniform" and n.pattern == pattern]
        yield f"### {pattern}, at equal measured latency"
        yield _table([(u, beside(u, networks, pattern=pattern)) for u in of])
        yield f"### {pattern}, at equal predicted latency"
        yield _table([(u, designed(u, networks)) for u in of])
    if any(n.pattern == MIXED for n in networks):
        yield "### All patterns mixed, against the uniform networks that no other one beats"
        yield _table([(u, beside(u, networks, pattern=MIXED)) for u in front(networks)])
    yield _trials(networks)


def _table(pairs: Sequence[tuple[Network, Network | None]]) -> str:
    lines = [
        "| uniform | measured | its drop | divergence, x 1000 | allocated, measured | its drop "
        "| divergence, x 1000 | 2 x allocated - uniform | |",
        "|---" * 9 + "|",
    ]
    for u, a in pairs:
        left = f"| {u.pattern} {u.sparsity:.0%} | {_latency(u)} | {_drop(u)} | {_divergence(u)} |"
        if a is None:
            lines.append(f"{left} none was as fast | | | | |")
            continue
        v = halved(u, a)
        lines.append(
            f"{left} {_latency(a)} | {_drop(a)} | {_divergence(a)} "
            f"| {v.excess:.2f} ({v.low:.2f} to {v.high:.2f}) | {v.words} |"
        )
    return "\n".join(lines)


def _latency(n: Network) -> str:
    return f"{n.latency_ms:.2f} ± {n.mad_ms:.2f} ms"


def _drop(n: Network) -> str:
    return f"{n.drop:.2f} ({n.drop_low:.2f} to {n.drop_high:.2f})"


def _divergence(n: Network) -> str:
    return "" if n.divergence is None else f"{1000 * n.divergence:.2f}"


def _trials(networks: Sequence[Network]) -> str:
    """What allocation times before pruning, against what is exported afterwards."""
    pairs = [(n, n.trial_share / n.share) for n in networks if n.trial_share is not None]
    ratios = np.array([ratio for _, ratio in pairs])
    shrunk = np.array([ratio for n, ratio in pairs if n.gone])
    text = (
        f"The network with magnitude masks that allocation times beforehand took "
        f"{np.median(ratios):.3f} times as long as the exported one (median of {len(ratios)}, "
        f"{ratios.min():.3f} to {ratios.max():.3f})"
    )
    if len(shrunk):
        text += f"; where something was taken out of the graph, {np.median(shrunk):.3f} times "
        text += f"({len(shrunk)} networks, {shrunk.min():.3f} to {shrunk.max():.3f})"
    predicted = np.array([n.predicted_share / n.share for n in networks])
    return text + (
        f". The profile predicted {np.median(predicted):.3f} times the measured share (median of "
        f"{len(predicted)} networks, {predicted.min():.3f} to {predicted.max():.3f})."
    )


def page(path: Path) -> None:
    """Write the Markdown page beside the results."""
    beside_it = path.with_suffix(".md")
    text = beside_it.read_text(encoding="utf-8") if beside_it.exists() else ""
    document = json.loads(path.read_text(encoding="utf-8"))
    write_atomic(beside_it, replaced(text, markdown(document)).encode())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("results", type=Path)
    page(parser.parse_args().results)


if __name__ == "__main__":
    main()
