"""``python -m tritern_cli``, for use without the script ``tritern`` on the path."""

from .app import main

if __name__ == "__main__":
    main()
