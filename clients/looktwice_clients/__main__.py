"""`python -m looktwice_clients` is `looktwice`."""

from looktwice_clients.cli import main

if __name__ == "__main__":
    main()
