"""`python -m anew ...` is the same program as `anew ...`."""

from anew.cli.main import main

if __name__ == "__main__":
    main()
