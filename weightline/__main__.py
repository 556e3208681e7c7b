"""Runs the command line as `python -m weightline`, with this interpreter."""

from weightline.cli.main import main

if __name__ == "__main__":
    main()
