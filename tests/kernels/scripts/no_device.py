"""Every CUDA binding fails cleanly where no device is seen; the addresses would not survive being touched."""

from hicache_kernels import _native as n

CALLS = {
    "update_": lambda: n.cuda_update_(64, 16, 3, 1, 1024, 2, 64, 0, 0, 0),
    "forecast": lambda: n.cuda_forecast(64, 16, 3, 1, 1024, 64, 0, 0, 3, 64, 0, 0),
    "update_forecast_": lambda: n.cuda_update_forecast_(64, 16, 3, 1, 1024, 64, 0, 64, 0, 0, 3, 64, 0, 0),
    "gated_sum": lambda: n.cuda_gated_sum(
        64, 16, 3, 1, 0, 1, 1, 4, 16, 1, 64, 0, 0, 0, 64, 0, 0, 3, 64, 0, 0
    ),
}  # fmt: skip
for op, call in CALLS.items():
    try:
        call()
    except RuntimeError as error:
        message = str(error)
    else:
        message = "no error"
    assert message.startswith(op + ": cudaGetDevice failed: cudaError"), message
assert n.launches() == 0
