"""``python -m sparsecc`` is the ``sparsecc`` command."""

from sparsecc.cli import main

if __name__ == "__main__":
    main()
