import sys

from pipeline.errors import NumericsError, UserError
from pipeline.harness.command import run_harness

if __name__ == "__main__":
    try:
        run_harness()
    except (UserError, NumericsError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 3)
