"""``python -m convince`` is the command line; ``torchrun -m convince train`` uses several processes."""

from convince.cli import main

if __name__ == "__main__":
    main()
