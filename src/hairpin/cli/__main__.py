"""``python -m hairpin.cli``: the ``hairpin`` command, for torchrun and folders not installed."""

from hairpin.cli.app import main

if __name__ == "__main__":
    main()
