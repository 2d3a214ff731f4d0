"""Where ``dlm`` begins: Ctrl-C ends it in a sentence from the first import on."""

import sys

from workflows.exit_codes import EXIT_INTERRUPTED


def main() -> None:
    """The command line; interrupted while it is being imported, nothing has begun."""
    try:
        from workflows.cli import main as run  # noqa: PLC0415 - importing it is what may be interrupted
    except KeyboardInterrupt:
        sys.stderr.write("interrupted before anything had begun\n")
        sys.exit(EXIT_INTERRUPTED)
    run()


if __name__ == "__main__":
    main()
