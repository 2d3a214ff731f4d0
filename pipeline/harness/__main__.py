import sys
from pathlib import Path

from lm_eval.__main__ import cli_evaluate

import pipeline.harness
from pipeline.errors import UserError

_TASKS = Path(pipeline.harness.__file__).parent / "tasks"


def main() -> None:
    """The command line of lm-evaluation-harness, which knows "dlm" and the tasks of this project."""
    words = sys.argv[1:]
    if words and "--include_path" not in words and words[0] not in ("-h", "--help"):
        sys.argv += ["--include_path", str(_TASKS)]
    try:
        cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
