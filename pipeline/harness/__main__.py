import sys

from pipeline.errors import UserError
from pipeline.harness.command import run_harness

if __name__ == "__main__":
    try:
        run_harness()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
