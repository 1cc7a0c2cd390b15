"""What cannot be pruned, refused in words before anything costly happens."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lpvit_edge.errors import PruningError
from lpvit_edge.pattern import COMMON, TWO_FOUR_SPARSITY, Pattern, parse_pattern
from lpvit_edge.records import LayerShape
from lpvit_edge.solve import Form


def refuse_poor_calibration(layers: tuple[LayerShape, ...], images: Tensor) -> None:
    """Raise PruningError for images (n, 3, S, S) from which no layer can be repaired."""
    if not bool(torch.isfinite(images).all()):
        raise PruningError("the calibration images hold NaN or Inf; check the preprocessing")
    if len(images) > 1 and bool((images == images[:1]).all()):
        raise PruningError(
            f"all {len(images)} calibration images are alike; take images as they come from the "
            "line, of every class"
        )
    refuse_few_images(layers, len(images))


def refuse_broken_weights(model: nn.Module) -> None:
    """Raise PruningError naming the first parameter that holds NaN or Inf.

    To be called before images run: what lies behind such a parameter is NaN, too.
    """
    broken = [
        (name, value)
        for name, value in model.named_parameters()
        if not bool(torch.isfinite(value).all())
    ]
    if not broken:
        return
    name, value = broken[0]
    count = int((~torch.isfinite(value)).sum())
    among = f" (it is the first of {len(broken)} such parameters)" if len(broken) > 1 else ""
    raise PruningError(
        f"{name}: {count} of its {value.numel()} values {'is' if count == 1 else 'are'} NaN or "
        f"Inf{among}; take a checkpoint whose weights are finite"
    )


def refuse_few_images(layers: tuple[LayerShape, ...], count: int) -> None:
    """Raise PruningError when so few images cannot give every Hessian its full rank."""
    neediest = max(layers, key=lambda layer: layer.in_features / layer.tokens)
    tokens = neediest.tokens * count
    if tokens < neediest.in_features:
        needed = -(-neediest.in_features // neediest.tokens)
        raise PruningError(
            f"{neediest.name}: {count} calibration images give {tokens} tokens, fewer than "
            f"its {neediest.in_features} inputs; use at least {needed} images, better {8 * needed}"
        )


def refuse_useless_patterns(layers: tuple[LayerShape, ...], patterns: Iterable[str]) -> None:
    """Raise PruningError, naming the sizes and what would fit, for a pattern that fits no layer."""
    sizes = dict.fromkeys((layer.out_features, layer.in_features) for layer in layers)
    for text in patterns:
        pattern = parse_pattern(text)
        if any(pattern.fits(*size) for size in sizes):
            continue
        fitting = [known for known in COMMON if any(parse_pattern(known).fits(*s) for s in sizes)]
        raise PruningError(
            f"pattern {text} divides none of the {len(layers)} prunable layers (out_features x "
            f"in_features: {', '.join(f'{rows} x {cols}' for rows, cols in sizes)}); rows must "
            f"divide the first number and columns the second, such as {', '.join(fitting)}"
        )


def refuse_misfits(layers: tuple[LayerShape, ...], forms: Mapping[str, Form]) -> None:
    """Raise PruningError, naming the layer, for a form that is not there for it."""
    shapes = {layer.name: layer for layer in layers}
    for name, form in forms.items():
        if name not in shapes:
            raise PruningError(f"{name}: the model has no such prunable layer")
        if form.pattern.kind == "2:4" and form.sparsity != TWO_FOUR_SPARSITY:
            raise PruningError(
                f"{name}: sparsity {form.sparsity} in 2:4, which has one only: {TWO_FOUR_SPARSITY}"
            )
        shape = shapes[name]
        if not form.pattern.fits(shape.out_features, shape.in_features):
            raise PruningError(
                f"{name}: {form.pattern} does not divide its weight "
                f"({shape.out_features} x {shape.in_features}); {_way_out(form.pattern, shape)}"
            )


def _way_out(pattern: Pattern, shape: LayerShape) -> str:
    if pattern.kind == "2:4":
        return f"leave it dense: 2:4 needs inputs by fours, not {shape.in_features}"
    return f"choose rows dividing {shape.out_features} and columns dividing {shape.in_features}"
