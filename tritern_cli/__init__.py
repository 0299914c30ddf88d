"""The command line ``tritern``. It is a package of its own so that ``tritern --help`` answers at once:
importing ``tritern`` loads torch and takes seconds.
"""
