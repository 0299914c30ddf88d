"""The command line, ``tritern``: a package of its own, beside ``tritern``, because importing that loads torch
and takes seconds, in which ``tritern --help`` should have answered.
"""
