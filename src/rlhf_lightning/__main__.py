"""Entry point of the command line `rlhf`."""

from rlhf_lightning.cli.main import main

if __name__ == "__main__":
    main()
