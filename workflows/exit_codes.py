"""With what ``dlm`` ends, for everybody who must know it before anything is imported."""

EXIT_USAGE, EXIT_FAILED, EXIT_DRIFT, EXIT_UNSCHEDULABLE, EXIT_INTERRUPTED = 2, 3, 4, 5, 75
