"""`python -m longnet` is the command, which torchrun starts with `-m longnet`."""

from longnet.cli.main import main

if __name__ == "__main__":
    main()
