"""Faults planted in what asks a model: batches of unlike rows, greedy answers, ends of text, workers, the harness."""

from tests.support.mutants.mutant import Planted

HARNESS: tuple[Planted, ...] = (
    Planted("samplers/padding", "padding before a row is seen", "(positions >= 0) & (positions <", "(positions <"),
    Planted(
        "samplers/padding",
        "positions count from the beginning of the batch",
        "positions.clamp(min=0).to(device)",
        "(0 * positions + torch.arange(width)).to(device)",
    ),
    Planted(
        "samplers/blocks", "noise by the place in the batch", "first_position=left - before", "first_position=left"
    ),
    Planted(
        "samplers/blocks",
        "a pass for a prompt that is not there",
        "is_over | (before == start).to(xt.device)",
        "is_over",
    ),
    Planted(
        "samplers/guidance",
        "the first token of the batch in place of a row's",
        "if self.padding is None else self.padding.positions",
        "if self.padding is None else torch.arange(xt.shape[1])",
    ),
    Planted(
        "samplers/next_tokens", "next tokens by the place in the batch", "first_position=-shift", "first_position=0"
    ),
    Planted(
        "pipeline/inference/filling",
        "a change of logits is told places of the batch",
        "places % width - before.to(device)[rows]",
        "places % width",
    ),
    Planted("pipeline/inference/filling", "batches mostly of padding", "_MOST_PADDING = 0.25", "_MOST_PADDING = 0.9"),
    Planted(
        "pipeline/inference/greedy",
        "tokens behind the one that is asked for are shown",
        "into[place : row.stop] = model.mask_token_id",
        "into[place] = model.mask_token_id",
    ),
    Planted(
        "pipeline/inference/greedy",
        "the first token decides",
        "min(row.size, 2 * num_asked[number] or 1)",
        "min(row.size, 1)",
    ),
    Planted(
        "pipeline/inference/greedy",
        "all logits of a batch at once",
        "sizes, batch_rows, most)",
        "sizes, batch_rows, 1 << 60)",
    ),
    Planted("pipeline/inference/stops", "a text ends with its last stop", "text[: min(", "text[: max("),
    Planted(
        "pipeline/inference/workers", "two workers are one", "if self._num_workers == 1:", "if self._num_workers < 3:"
    ),
    Planted(
        "pipeline/harness/config",
        "tasks that say nothing are drawn from",
        'asked.get("temperature", 0.0) > 0',
        'asked.get("temperature", 0.0) >= 0',
    ),
    Planted(
        "pipeline/harness/config",
        "passes behind the end of an answer",
        'not settings.get("suppresses_eos", False)',
        "False",
    ),
    Planted(
        "pipeline/harness/config",
        "a batch size of 1 says nothing",
        "    return int(batch_size)",
        "    return int(batch_size) if int(batch_size) > 1 else None",
    ),
    Planted(
        "pipeline/harness/addresses",
        "masks by the number of a document",
        "json.dumps(instance.doc, sort_keys=True, default=str)",
        "str(instance.doc_id)",
    ),
    Planted(
        "pipeline/harness/addresses",
        "tasks share their masks",
        "json.dumps([self.task, self.document, *words])",
        "json.dumps([self.document, *words])",
    ),
    Planted(
        "pipeline/harness/pieces",
        "the end of a text before every context",
        "before=given[0] if given else None",
        "before=None",
    ),
    Planted(
        "pipeline/harness/pieces",
        "pieces in the order of the requests",
        "sorted(set(requests), key=_by_length)",
        "dict.fromkeys(requests)",
    ),
    Planted(
        "pipeline/harness/pieces",
        "answers to a model of blocks counted as if masked whole",
        "block_size or len(request.answer)",
        "len(request.answer)",
    ),
    Planted(
        "pipeline/harness/generation",
        "more tokens than the task wants",
        "min(at_most, config.own.length or at_most)",
        "config.own.length or at_most",
    ),
    Planted(
        "pipeline/harness/generation",
        "prompts lose their end",
        "prompt.ids[-(model.record.seq_len - prompt.length) :]",
        "prompt.ids[: model.record.seq_len - prompt.length]",
    ),
)
