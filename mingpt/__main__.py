"""``python -m mingpt``, the same as the command ``mingpt``."""

from mingpt.cli import main

if __name__ == "__main__":
    main()
