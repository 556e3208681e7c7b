"""`python -m weightline`: the command line by way of this interpreter, whatever is on the path."""

from weightline.cli.main import main

if __name__ == "__main__":
    main()
