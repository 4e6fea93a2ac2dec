"""`python -m anew ...` is the same program as `anew ...`."""

from anew.cli import main

if __name__ == "__main__":
    main()
