"""The one statement of tritern's version."""

__version__ = "0.1.0"
