"""``python -m indrnn`` is ``indrnn-train``; ``torchrun -m indrnn`` starts it in several processes."""

from .cli.train import main

if __name__ == "__main__":
    main()
