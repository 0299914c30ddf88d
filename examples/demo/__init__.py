"""The parts of ``quickstart.py``: its texts, the comparison of two models, distillation, arguments."""
