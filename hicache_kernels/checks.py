"""What the arguments of the ops must be, and the words when they are not.

Every registered op checks with one function of these before a kernel sees an address, and so does its fake
when torch.compile traces it: a wrong argument is an error, however an op was called. Of each function, the
part under ``if in_memory`` needs addresses, which a fake tensor has not.

Every check costs a tenth of a microsecond or two at each call: words are made only for an error.
"""

from __future__ import annotations

from torch import Tensor


def check_update(op: str, orders: Tensor, inv_gap: Tensor, filled: int, in_memory: bool) -> None:
    """Raise unless :func:`hicache_kernels.update_` can run on these."""
    _check_orders(op, orders)
    _check_gap(op, inv_gap, filled, orders)
    if in_memory:
        _check_apart(op, "orders", _regions(op, orders=orders, inv_gap=inv_gap))


def check_forecast(op: str, orders: Tensor, coeffs: Tensor, out: Tensor, in_memory: bool) -> None:
    """Raise unless :func:`hicache_kernels.forecast` can run on these."""
    _check_orders(op, orders)
    _check_coeffs(op, coeffs, orders)
    _check_row(op, out, orders)
    if in_memory:
        _check_apart(op, "out", _regions(op, orders=orders, coeffs=coeffs, out=out))


def check_update_forecast(
    op: str, orders: Tensor, inv_gap: Tensor, coeffs: Tensor, filled: int, out: Tensor, in_memory: bool
) -> None:
    """Raise unless :func:`hicache_kernels.update_forecast_` can run on these."""
    _check_orders(op, orders)
    _check_gap(op, inv_gap, filled, orders)
    _check_coeffs(op, coeffs, orders, filled)
    _check_row(op, out, orders)
    if in_memory:
        regions = _regions(op, orders=orders, inv_gap=inv_gap, coeffs=coeffs, out=out)
        _check_apart(op, "out", regions)
        _check_apart(op, "orders", regions)


def check_gated_sum(
    op: str,
    base: Tensor,
    orders: Tensor,
    gates: Tensor | None,
    coeffs: Tensor,
    out: Tensor,
    in_memory: bool,
) -> None:
    """Raise unless :func:`hicache_kernels.gated_sum` can run on these."""
    _check_gated_sum(op, base, orders, gates, coeffs, None, 0, out, in_memory)


def check_gated_sum_update(
    op: str,
    base: Tensor,
    orders: Tensor,
    gates: Tensor | None,
    coeffs: Tensor,
    inv_gap: Tensor,
    filled: int,
    out: Tensor,
    in_memory: bool,
) -> None:
    """Raise unless :func:`hicache_kernels.gated_sum` can run on these, an update pending."""
    _check_gated_sum(op, base, orders, gates, coeffs, inv_gap, filled, out, in_memory)


def _check_gated_sum(
    op: str,
    base: Tensor,
    orders: Tensor,
    gates: Tensor | None,
    coeffs: Tensor,
    inv_gap: Tensor | None,
    filled: int,
    out: Tensor,
    in_memory: bool,
) -> None:
    _check_orders(op, orders)
    if orders.ndim != 3 or orders.shape[1] < 1:
        raise ValueError(
            f"{op}: expected orders [K, num_features, slot] with num_features >= 1, got shape "
            f"{tuple(orders.shape)}"
        )
    if base.ndim < 2 or not base.is_contiguous():
        raise ValueError(f"{op}: expected a contiguous base [batch, ..., channels], got {_layout(base)}")
    if not base.dtype.is_floating_point:
        raise ValueError(f"{op}: expected a floating-point base, got {base.dtype}")
    _check_device(op, "base", base, orders)
    if orders.shape[2] < base.numel():
        raise ValueError(f"{op}: expected slots of at least {base.numel()} elements, got {orders.shape[2]}")
    if gates is not None:
        expected = (orders.shape[1], base.shape[0], base.shape[-1])
        if gates.shape != expected or gates.dtype != base.dtype or not gates.is_contiguous():
            raise ValueError(
                f"{op}: expected contiguous gates {expected} of {base.dtype}, got shape "
                f"{tuple(gates.shape)} of {gates.dtype} with strides {gates.stride()}"
            )
        _check_device(op, "gates", gates, orders)
    if inv_gap is not None:
        _check_gap(op, inv_gap, filled, orders)
    _check_coeffs(op, coeffs, orders, None if inv_gap is None else filled)
    if not _is_like(out, base, base.shape):
        raise _unlike(op, out, base, base.shape)
    if in_memory:
        regions = _regions(op, base=base, orders=orders, gates=gates, coeffs=coeffs, inv_gap=inv_gap, out=out)
        if regions.get("out") == regions.get("base"):  # in place: every element is read before it is written
            regions.pop("base", None)
        _check_apart(op, "out", regions)
        if inv_gap is not None:
            _check_apart(op, "orders", regions)


def _layout(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)} with strides {tensor.stride()}"


def _check_orders(op: str, orders: Tensor) -> None:
    if orders.ndim < 2 or orders.shape[0] < 1 or not orders.dtype.is_floating_point:
        raise ValueError(
            f"{op}: expected floating-point orders [K, ...] with K >= 1, got {orders.dtype} of shape "
            f"{tuple(orders.shape)}"
        )
    if orders.is_contiguous():
        return
    row = orders[0]
    if not row.is_contiguous() or (orders.shape[0] > 1 and orders.stride(0) < row.numel()):
        raise ValueError(
            f"{op}: expected orders with contiguous rows that do not overlap, got {_layout(orders)}"
        )


def _check_device(op: str, name: str, tensor: Tensor, orders: Tensor) -> None:
    if tensor.device != orders.device:
        raise ValueError(f"{op}: expected {name} on {orders.device}, as orders, got {tensor.device}")


def _check_gap(op: str, inv_gap: Tensor, filled: int, orders: Tensor) -> None:
    if inv_gap.numel() != 1 or not inv_gap.dtype.is_floating_point:
        raise ValueError(
            f"{op}: expected inv_gap to be a floating-point tensor of one number, got {inv_gap!r}"
        )
    _check_device(op, "inv_gap", inv_gap, orders)
    if not 0 <= filled < orders.shape[0]:
        raise ValueError(f"{op}: expected 0 <= filled <= {orders.shape[0] - 1}, got {filled}")


def _check_coeffs(op: str, coeffs: Tensor, orders: Tensor, filled: int | None = None) -> None:
    if not 1 <= coeffs.ndim <= 2 or not coeffs.dtype.is_floating_point:
        raise ValueError(
            f"{op}: expected coeffs to be a floating-point tensor [orders] or [orders, features], got "
            f"{coeffs!r}"
        )
    if coeffs.ndim == 2 and coeffs.shape[1] != orders.shape[1]:
        raise ValueError(
            f"{op}: expected coeffs [orders, {orders.shape[1]}], a row for each feature of orders "
            f"{tuple(orders.shape)}, got shape {tuple(coeffs.shape)}"
        )
    count = coeffs.shape[0]
    if filled is not None and count != filled + 1:
        raise ValueError(f"{op}: expected {filled + 1} coeffs (filled + 1), got {count}")
    if not 1 <= count <= orders.shape[0]:
        raise ValueError(f"{op}: expected 1 to {orders.shape[0]} coeffs, one an order, got {count}")
    _check_device(op, "coeffs", coeffs, orders)


def _check_row(op: str, out: Tensor, orders: Tensor) -> None:
    shape = orders.shape[1:]
    if not _is_like(out, orders, shape):
        raise _unlike(op, out, orders, shape)


def _is_like(out: Tensor, like: Tensor, shape: tuple[int, ...]) -> bool:
    alike: bool = out.dtype == like.dtype and out.shape == shape and out.device == like.device
    return alike and out.is_contiguous()


def _unlike(op: str, out: Tensor, like: Tensor, shape: tuple[int, ...]) -> ValueError:
    return ValueError(
        f"{op}: expected a contiguous out of shape {tuple(shape)}, {like.dtype} on {like.device}, got "
        f"{tuple(out.shape)}, {out.dtype} on {out.device} with strides {out.stride()}"
    )


def span(tensor: Tensor) -> int:
    """Bytes from the first number to past the last: rows are whole, and may be apart."""
    size = tensor.nbytes
    if not size or tensor.is_contiguous():
        return size
    rows = tensor.shape[0]
    return tensor.stride(0) * (rows - 1) * tensor.itemsize + size // rows


def _regions(op: str, **tensors: Tensor | None) -> dict[str, tuple[int, int]]:
    """Name → first address and the one past the last, of every tensor that has an element.

    Raises:
        ValueError: one starts in the middle of an element, which a GPU cannot load.
    """
    regions = {}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        begin, size = tensor.data_ptr(), span(tensor)
        if begin % tensor.itemsize:
            raise ValueError(
                f"{op}: expected {name} at an address divisible by its {tensor.itemsize} bytes a number, "
                f"got {begin:#x}"
            )
        if size:
            regions[name] = begin, begin + size
    return regions


def _check_apart(op: str, written: str, regions: dict[str, tuple[int, int]]) -> None:
    """Raise when the tensor of that name shares memory with another."""
    if written not in regions:
        return
    begin, end = regions.pop(written)
    for name, (other_begin, other_end) in regions.items():
        if begin < other_end and other_begin < end:
            # the history is found wrong last: of two, the caller made the other
            first, second = (name, written) if written == "orders" else (written, name)
            raise ValueError(f"{op}: expected {first} not to overlap {second} in memory")
