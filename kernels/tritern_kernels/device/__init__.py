"""The kernels: functions for Triton alone. ``cuda`` and its neighbours launch them."""
