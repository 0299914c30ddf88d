"""The kernels: functions for Triton only. ``cuda`` and the modules beside it launch them."""
