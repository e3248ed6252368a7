"""Which block of a model each of its features is of."""

from __future__ import annotations

from hicache.adapters.base import ModuleAdapter


def layers_of(adapter: ModuleAdapter) -> tuple[str | None, ...]:
    """The block of every feature that modules' outputs make up, such as ``"transformer_blocks.3"``.

    None where outputs of several blocks are added up in one feature (docs/algorithm.md, "Shared gates
    collapse").
    """
    paths = {module: path for path, module in adapter.module.named_modules()}
    blocks: dict[int, set[str]] = {}
    for output in adapter.outputs():
        for feature, _ in output.features:
            blocks.setdefault(feature, set()).add(_block(paths[output.module]))
    features = range(max(blocks) + 1)
    return tuple(next(iter(found)) if len(found := blocks.get(i, set())) == 1 else None for i in features)


def check_layers(adapter: ModuleAdapter | None, by_feature: bool) -> None:
    """Check that every feature of a model is of one block: what a basis with rows by feature needs.

    Args:
        adapter: knows the model; nothing is checked where nobody does.
        by_feature: see :class:`hicache.Basis`; nothing is checked without.

    Raises:
        ValueError: some are sums of several.
    """
    if by_feature and adapter is not None and None in layers_of(adapter)[: adapter.num_features({})]:
        raise ValueError(
            f"hicache: the blocks of {type(adapter.module).__name__} share their gates, so their outputs are "
            "kept as sums of all layers, and the basis has a row for every layer: use another basis"
        )


def _block(path: str) -> str:
    """The path down to the block: a list's name, and its place there."""
    parts = path.split(".")
    return ".".join(parts[: next((i + 1 for i, part in enumerate(parts) if part.isdigit()), len(parts))])
