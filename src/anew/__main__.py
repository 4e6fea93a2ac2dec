"""`python -m anew` and the command `anew`."""

import sys


def main() -> None:
    """Run the command line. Ctrl-C ends it quietly, also while its modules are being imported."""
    try:
        from anew.cli.main import main as run_command_line

        run_command_line()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
