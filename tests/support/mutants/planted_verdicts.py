"""Faults planted in what judges code under test, and in what compares runs: a program let through, a chance missed."""

from tests.support.mutants.mutant import Planted

VERDICTS: tuple[Planted, ...] = (
    Planted(
        "pipeline/sandbox/runner",
        "passed whatever was said",
        "if code == 0 and answer == word:",
        "if code == 0:",
    ),
    Planted("pipeline/sandbox/runner", "a word that can be guessed", "secrets.token_hex(16)", '"0" * 32'),
    Planted("pipeline/sandbox/runner", "a killed launcher is our own fault", " or process.returncode < 0", ""),
    Planted("pipeline/sandbox/runner", "its folder stays", "delete_tree(folder)", "pass"),
    Planted(
        "pipeline/sandbox/runner",
        "a loop that takes all signals was killed",
        'report["cpu_s"] >= limits.cpu_s',
        'report["cpu_s"] > 9 * limits.cpu_s',
    ),
    Planted("pipeline/sandbox/driver", "the environment stays", "os.environ.clear()", "pass"),
    Planted("pipeline/sandbox/driver", "a fork may say the word", "if getpid() != here:", "if False:"),
    Planted("pipeline/sandbox/launcher", "any number of processes", '"NPROC": num_processes,', ""),
    Planted("pipeline/sandbox/launcher", "any amount of memory", '"AS": limits["memory_bytes"],', ""),
    Planted("pipeline/sandbox/launcher", "output is kept whole", "data[: kept[name] - len(said[name])]", "data"),
    Planted("pipeline/sandbox/namespaces", "the network stays", " | kernel.CLONE_NEWNET", ""),
    Planted("pipeline/sandbox/namespaces", "a folder without a limit", "size={disk_bytes},", ""),
    Planted(
        "pipeline/sandbox/namespaces",
        "what is seen can be written",
        "kernel.set_read_only(str(target), recursive=True)",
        "pass",
    ),
    Planted("pipeline/sandbox/seccomp", "sockets", '"socket": (41, 198)', '"socket": (999, 999)'),
    Planted(
        "pipeline/sandbox/seccomp", "memory of no process", '"memfd_create": (319, 279)', '"memfd_create": (999, 999)'
    ),
    Planted(
        "pipeline/sandbox/seccomp",
        "namespaces by clone",
        "_NEW_NAMESPACES, 0, 1), deny, allow]",
        "0, 0, 1), deny, allow]",
    ),
    Planted(
        "pipeline/sandbox/leftovers",
        "links are followed",
        "if not entry.is_dir(follow_symlinks=False):",
        "if not entry.is_dir():",
    ),
    Planted("pipeline/sandbox/humaneval", "nothing is checked", "check({problem.entry_point})", "check"),
    Planted(
        "pipeline/sandbox/pass_at_k",
        "with replacement",
        "return (subsets - math.comb(num_samples - num_passed, k)) / subsets",
        "return 1 - (1 - num_passed / num_samples) ** k",
    ),
    Planted(
        "pipeline/sandbox/isolation",
        "weaker isolation without permission",
        "if not allow_unsandboxed:",
        "if False:",
    ),
    Planted(
        "workflows/comparison",
        "errors as if questions did not pair",
        "(second - first) ** 2 for first, second",
        "second**2 + first**2 for first, second",
    ),
    Planted("workflows/comparison", "no correction of the spread", "squares * n / (n - 1)", "squares"),
    Planted(
        "workflows/comparison", "a normal law of few questions", "t_quantile(float(n - 1))", "t_quantile(math.inf)"
    ),
    Planted("workflows/comparison", "McNemar of one side", "2 * tail / 2**n", "tail / 2**n"),
    Planted("workflows/comparison", "ties count for the first", "sum(one > other for", "sum(one >= other for"),
    Planted(
        "workflows/comparison",
        "bounds against what is exact",
        "elif are_bounds[0] == are_bounds[1]:",
        "elif True:",
    ),
    Planted(
        "workflows/comparison",
        "held-out bounds against what is exact",
        "if figures[0].is_exact != figures[1].is_exact:",
        "if False:",
    ),
    Planted("workflows/comparison", "replicates that do not pair", "if len(rates[0]) == len(rates[1]):", "if False:"),
    Planted("workflows/comparison", "the error of the first answer", 'found[record["answer"]]', "found[0]"),
    Planted("workflows/comparison", "other questions are compared", "if hashes[0] != hashes[1]:", "if False:"),
    Planted("workflows/comparison", "failed questions count", 'and "failed" not in b[number]', ""),
)
