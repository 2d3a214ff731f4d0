"""Faults planted in the samplers: what their papers and peers warn of, one line each."""

from tests.support.mutants.mutant import Planted

SAMPLERS: tuple[Planted, ...] = (
    Planted(
        "samplers/proposal",
        "the draw in float32, which cuts the tails off",
        "    probs = allowed.softmax(dim=-1)",
        "    probs = allowed.float().softmax(dim=-1)",
    ),
    Planted(
        "samplers/proposal", "top_p without the token that reaches it", "- ordered < proposal.top_p", "< proposal.top_p"
    ),
    Planted("samplers/proposal", "entropy of the wrong sign", "return -entropy, entropy", "return entropy, entropy"),
    Planted(
        "samplers/planned",
        "a pass for all rows wherever one reveals something",
        "ask = canvas.ask(places, rows, 0, turn, times)",
        "ask = Ask(places, canvas.xt, canvas.rows, 0, turn, None)",
    ),
    Planted(
        "samplers/planned",
        "reveals one step late",
        "step = torch.searchsorted(-shares[1:]",
        "step = torch.searchsorted(-shares",
    ),
    Planted(
        "samplers/planned",
        "first hitting in rising order of u",
        "_ranks(canvas.is_open, -u)",
        "_ranks(canvas.is_open, u)",
    ),
    Planted(
        "samplers/quotas",
        "the remainder of an even split in the last steps",
        "(steps < num_masks[:, None] % self.num_steps)",
        "(steps >= self.num_steps - num_masks[:, None] % self.num_steps)",
    ),
    Planted(
        "samplers/quotas",
        "s/t in place of 1 - s/t",
        "share = 1.0 - times[step + 1] / times[step]",
        "share = times[step + 1] / times[step]",
    ),
    Planted(
        "samplers/confident",
        "a threshold that may take none",
        "((score > self.tau) & is_open).sum(dim=1).clamp(min=1)",
        "((score > self.tau) & is_open).sum(dim=1)",
    ),
    Planted("samplers/confident", "the bound of n for n - 1", "self.factor / (n + 1)", "self.factor / n"),
    Planted(
        "samplers/confident",
        "the largest entropy is lost too",
        "entropy.cumsum(dim=1) - entropy.cummax(dim=1).values",
        "entropy.cumsum(dim=1)",
    ),
    Planted(
        "samplers/loop",
        "what has no score is scored as well",
        "grid = torch.full(shape, -torch.inf,",
        "grid = torch.full(shape, 0.0,",
    ),
    Planted(
        "samplers/remask",
        "reveals without what is taken back",
        "(alpha_s - (1.0 - own) * alpha_t)",
        "(alpha_s - alpha_t)",
    ),
    Planted(
        "samplers/remask",
        "confidence of the wrong sign",
        "doubt = torch.where(is_token, -sureness, -torch.inf)",
        "doubt = torch.where(is_token, sureness, -torch.inf)",
    ),
    Planted(
        "samplers/remask",
        "tokens scored as if drawn anew",
        "is_tempered=self.is_tempered, held=held",
        "is_tempered=self.is_tempered, held=None",
    ),
    Planted("samplers/speculative", "a chain followed where it was left", ".cumprod(dim=1).sum(dim=1)", ".sum(dim=1)"),
    Planted(
        "samplers/contexts",
        "a prefix that never grows old",
        "turn // self.refresh_every if self.refresh_every else 0",
        "turn // self.refresh_every if self.refresh_every > 1 else 0",
    ),
    Planted(
        "samplers/contexts",
        "the window at the start of the row",
        "return select // width * seq_len + select % width + start",
        "return select // width * seq_len + select % width",
    ),
    Planted(
        "samplers/blocks",
        "ends of the prompt end a row",
        "(xt[:, left:right] == eos_token_id) & is_mask[:, left:right]",
        "xt[:, left:right] == eos_token_id",
    ),
    Planted(
        "samplers/loop",
        "noise of the place in the batch",
        "self.sample_ids[:, None], positions",
        "torch.arange(len(self.xt))[:, None], positions",
    ),
    Planted(
        "samplers/loop",
        "frames of passes that a row did not need",
        "is_busy.append(nfe > before)",
        "is_busy.append(nfe >= before)",
    ),
    Planted(
        "samplers/guidance",
        "what must be given is masked with the prompt",
        "self._is_prompt[:, : self.num_given] = False",
        "self._is_prompt[:, :0] = False",
    ),
    Planted(
        "samplers/blocks",
        "places of the window told as those of the row",
        "change(logits, places // width * seq_len + places % width + left)",
        "change(logits, places)",
    ),
    Planted("samplers/next_tokens", "a row that has ended goes on to cost", "nfe += ~has_ended", "nfe += 1"),
    Planted(
        "samplers/next_tokens",
        "noise of the place in the batch",
        "torch.arange(num_rows) if sample_ids is None else sample_ids.cpu()",
        "torch.arange(num_rows)",
    ),
    Planted(
        "samplers/next_tokens",
        "the prompt without its first token",
        "last = (canvas.rows + 1) * seen.shape[1] - 1",
        "last = canvas.rows * seen.shape[1]",
    ),
)
