"""Faults planted in tasks: other masks, other questions, other sums than are said."""

from tests.support.mutants.mutant import Planted

TASKS: tuple[Planted, ...] = (
    Planted(
        "pipeline/tasks/likelihoods",
        "masks by the place in the piece",
        "own = [Request(context, answer, mask_id(number))",
        "own = [Request(context, answer, mask_id(len(records)))",
    ),
    Planted(
        "pipeline/tasks/likelihoods",
        "masks of its own for each choice",
        "own = [Request(context, answer, mask_id(number))",
        "own = [Request(context, answer, mask_id(number, len(answer)))",
    ),
    Planted(
        "pipeline/tasks/likelihoods",
        "all rows of a text with the masks of its first",
        "mask_id(number, len(parts[number]))",
        "mask_id(number)",
    ),
    Planted(
        "pipeline/tasks/likelihoods",
        "characters for bytes",
        '"bytes": [len(choice.encode()) for choice in choices]',
        '"bytes": [len(choice) for choice in choices]',
    ),
    Planted(
        "pipeline/tasks/tables",
        "questions that failed among those that count",
        '"n": len(counted),',
        '"n": len(records),',
    ),
    Planted("pipeline/tasks/tables", "pass@1 for pass@k", 'r["passed"], k)', 'r["passed"], 1)'),
    Planted(
        "pipeline/tasks/tables",
        "an interval of pass@k that closes near 0 and 1",
        "list(mean_interval(shares, weights)) if",
        'row["interval"] if',
    ),
    Planted(
        "pipeline/tasks/tables", "a mean for a ratio", "value = math.fsum(sums) / size", "value = sums[0] / sizes[0]"
    ),
    Planted("pipeline/tasks/tables", "a spread that is too small", "* n / (n - 1)) / size", ") / size"),
    Planted(
        "pipeline/tasks/tables",
        "the error of a sum for that of a mean",
        '_root([error_of_difference(r["deviations"][r["answer"]]) for r in records]) / len(records)',
        '_root([error_of_difference(r["deviations"][r["answer"]]) for r in records])',
    ),
    Planted(
        "pipeline/tasks/tables",
        "noise of a share as if each choice had masks of its own",
        "error_of_difference(*scaled)",
        "math.hypot(*map(error_of_difference, scaled))",
    ),
    Planted("pipeline/tasks/pieces", "the last question in no piece", "*edges, len(costs)]", "*edges, len(costs) - 1]"),
    Planted(
        "pipeline/tasks/run",
        "records in the order in which pieces were cut",
        'found.sort(key=lambda record: record["number"])',
        "found.sort(key=lambda record: 0)",
    ),
    Planted(
        "pipeline/tasks/run",
        "ids of one tokenizer read with another",
        'is_same = load_manifest(tokenizer).fingerprint == load_manifest(inputs["tokenizer"]).fingerprint',
        "is_same = True",
    ),
    Planted("pipeline/tasks/run", "a file that has changed", 'if file.sha256 != shard["sha256"]:', "if False:"),
    Planted("pipeline/tasks/run", "programs refused after the weights", "if config.runs_programs:", "if False:"),
    Planted("pipeline/tasks/generations", "one program several times", "mask_id(number, sample)", "mask_id(number)"),
    Planted(
        "pipeline/tasks/generations",
        "texts that go on behind their end",
        "ids = before_end(drawn, model.vocabulary.special.eos_token_id)",
        "ids = drawn",
    ),
    Planted(
        "pipeline/tasks/generations",
        "a question that cannot be filled ends its task",
        "return why_not(model, canvas, sampling)",
        'return ""',
    ),
    Planted("pipeline/tasks/fit", "a token more than there is room for", "length > room:", "length > room + 1:"),
    Planted(
        "pipeline/tasks/fit", "answers that leave a prompt no room", "if length == record.seq_len and", "if False and"
    ),
    Planted(
        "pipeline/tasks/fit",
        "no room for prompts that are empty",
        'any(question.get("prompt") for question in file.questions)',
        'task.kind != "samples"',
    ),
    Planted("pipeline/tasks/fit", "answers as long as rows", "record.seq_len // 2)", "record.seq_len)"),
    Planted(
        "pipeline/inference/pairs",
        "an answer without its first letters",
        "both[len(before) :] if both[: len(before)] == before else encode(answer)",
        "both[len(before) :] or encode(answer)",
    ),
    Planted("pipeline/inference/model", "one model open at a time", "@lru_cache(maxsize=2)", "@lru_cache(maxsize=1)"),
)
