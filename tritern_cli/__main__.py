"""``python -m tritern_cli``, where the script ``tritern`` is not on the path."""

from .app import main

if __name__ == "__main__":
    main()
