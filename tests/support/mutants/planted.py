"""Faults written by hand: what a person gets wrong in exactly these formulas, one line each."""

from collections.abc import Mapping

from tests.support.mutants.mutant import Mutant, Planted
from tests.support.mutants.planted_answers import ANSWERS
from tests.support.mutants.planted_conversions import CONVERSIONS
from tests.support.mutants.planted_harness import HARNESS
from tests.support.mutants.planted_imports import IMPORTS
from tests.support.mutants.planted_samplers import SAMPLERS


def planted(sources: Mapping[str, str], faults: tuple[Planted, ...] | None = None) -> list[Mutant]:
    """The planted faults of these modules, in their order.

    Raises ValueError if an old text does not occur exactly once, spans lines or is not changed.
    """
    mutants = []
    for fault in PLANTED if faults is None else faults:
        if fault.module not in sources:
            continue
        source = sources[fault.module]
        count = source.count(fault.old)
        if count != 1:
            raise ValueError(f"planted {fault.name!r}: {fault.old!r} occurs {count} times in {fault.module}, not once")
        if "\n" in fault.old + fault.new or fault.old == fault.new:
            raise ValueError(f"planted {fault.name!r}: {fault.old!r} -> {fault.new!r} is not a change of one line")
        start = len(source[: source.index(fault.old)].encode())
        mutants.append(Mutant(fault.module, source, start, start + len(fault.old.encode()), fault.new, fault.name))
    return mutants


PLANTED: tuple[Planted, ...] = (
    Planted(
        "schedules",
        "weight -alpha' instead of -alpha' / (1 - alpha)",
        "return self._rise(t) / mask_prob",
        "return self._rise(t)",
    ),
    Planted(
        "schedules",
        "weight over alpha instead of 1 - alpha",
        "return self._rise(t) / mask_prob",
        "return self._rise(t) / (1.0 - mask_prob)",
    ),
    Planted("schedules", "sign of alpha' lost", "return -slope", "return slope"),
    Planted("schedules", "alpha is the mask probability", "return 1.0 - self.mask_prob(t)", "return self.mask_prob(t)"),
    Planted(
        "schedules",
        "double epsilon: the probability shrunk, the weight not",
        "return t.clone()",
        "return (1.0 - 1e-3) * t",
    ),
    Planted(
        "schedules",
        "another cosine",
        "torch.sin(math.pi * t / 2) ** 2 / (1.0 + torch.sin(math.pi * (1.0 - t) / 2))",
        "torch.sin(math.pi * t / 2)",
    ),
    Planted("schedules", "logarithm of another base", "return torch.log1p(t) / math.log(2)", "return torch.log1p(t)"),
    Planted(
        "schedules",
        "clipped weight without the width",
        "torch.full_like(t, self.high - self.low)",
        "torch.ones_like(t)",
    ),
    Planted(
        "schedules",
        "theta_t from alpha_t instead of alpha_(t-1)",
        "betas * self.alphas()[:-1] / noised",
        "betas * self.alphas()[1:] / noised",
    ),
    Planted(
        "noise",
        "arithmetic shift for a logical one",
        "return (x >> bits) & ((1 << (64 - bits)) - 1)",
        "return x >> bits",
    ),
    Planted(
        "noise",
        "one event too many",
        "return hashes < threshold.to(hashes.device)",
        "return hashes <= threshold.to(hashes.device)",
    ),
    Planted(
        "noise",
        "strata of two ranks that stratify on their own",
        "strata[order] = torch.arange(num_places, dtype=torch.float64)",
        "strata[order] = torch.arange(num_places, dtype=torch.float64) // 2 * 2",
    ),
    Planted(
        "noise",
        "places always in the same order",
        "order = hash_permutation(num_places, noise_seed, stream, step)",
        "order = torch.arange(num_places)",
    ),
    Planted("noise", "strata without an offset", "return (strata + offset) / num_places", "return strata / num_places"),
    Planted(
        "noise",
        "the same offset at every step",
        "address = (noise_seed, Stream.OFFSET, step, stream)",
        "address = (noise_seed, Stream.OFFSET, stream)",
    ),
    Planted(
        "kernels",
        "theta with s as step size",
        "return (alpha_s - alpha_t) / (1 - alpha_t)",
        "return (1 - alpha_s) / (1 - alpha_t)",
    ),
    Planted(
        "kernels",
        "theta over alpha_t",
        "return (alpha_s - alpha_t) / (1 - alpha_t)",
        "return (alpha_s - alpha_t) / alpha_t",
    ),
    Planted(
        "kernels",
        "uniform over the mask too",
        "(1.0 - self.mask_share) / self.num_real_tokens",
        "(1.0 - self.mask_share) / self.vocab_size",
    ),
    Planted(
        "kernels",
        "posterior with q(xt | x0) for q(xt | xs)",
        "torch.where(alpha_s > 0, alpha_t / alpha_s, 1.0)",
        "torch.where(alpha_s > 0, alpha_t, 1.0)",
    ),
    Planted("kernels", "posterior with the marginal of t", "self.marginal(x0, alpha_s)", "self.marginal(x0, alpha_t)"),
    Planted(
        "blocks",
        "blocks interleaved",
        "values.repeat_interleave(block_length(values.shape[1], seq_len), dim=1)",
        "values.repeat(1, block_length(values.shape[1], seq_len))",
    ),
    Planted(
        "corruption",
        "times not lifted above t_min",
        "return t_min + (1.0 - t_min) * stratified_uniform(",
        "return (1.0 - t_min) * stratified_uniform(",
    ),
    Planted(
        "corruption",
        "last token of the prompt masked",
        "return valid & (torch.arange(seq_len, device=valid.device) >= first[:, None])",
        "return valid & (torch.arange(seq_len, device=valid.device) >= first[:, None] - 1)",
    ),
    Planted(
        "corruption",
        "padding masked",
        "return valid & (torch.arange(seq_len, device=valid.device) >= first[:, None])",
        "return torch.arange(seq_len, device=valid.device) >= first[:, None]",
    ),
    Planted(
        "corruption",
        "noise addressed by the row of the micro batch",
        "hash_words(noise_seed, Stream.MASK, step, sample_ids)",
        "hash_words(noise_seed, Stream.MASK, step, torch.arange(len(sample_ids)))",
    ),
    Planted(
        "corruption",
        "the mask drawn as a real token",
        "drawn = drawn + (drawn >= mask_token_id)",
        "drawn = drawn + (drawn > mask_token_id)",
    ),
    Planted("corruption", "one mask too many", "(rank < num_masked[..., None])", "(rank <= num_masked[..., None])"),
    Planted(
        "corruption",
        "an order taken for ranks",
        "hashes.argsort(dim=-1, stable=True).argsort(dim=-1)",
        "hashes.argsort(dim=-1, stable=True)",
    ),
    Planted(
        "corruption",
        "complement masks the prompt",
        "torch.where(maskable & (xt != mask_token_id), mask_token_id, x0)",
        "torch.where(xt != mask_token_id, mask_token_id, x0)",
    ),
    Planted(
        "masks",
        "noisy queries see their own clean block",
        "~q_clean & k_clean & (q_block > k_block)",
        "~q_clean & k_clean & (q_block >= k_block)",
    ),
    Planted(
        "masks",
        "clean half attends the noisy half",
        "q_clean & k_clean & (q_block >= k_block)",
        "q_clean & (q_block >= k_block)",
    ),
    Planted(
        "masks",
        "clean queries don't see their own block",
        "q_clean & k_clean & (q_block >= k_block)",
        "q_clean & k_clean & (q_block > k_block)",
    ),
    Planted(
        "masks",
        "noisy queries see earlier noisy blocks",
        "~q_clean & ~k_clean & (q_block == k_block)",
        "~q_clean & ~k_clean & (q_block >= k_block)",
    ),
    Planted("masks", "clean keys a half too late", "(k % seq_len) // block_size", "k // block_size"),
    Planted("masks", "annealing AND instead of OR", "(q >= k) | hash_event(", "(q >= k) & hash_event("),
    Planted("masks", "one annealing draw a key", "hash_event(prob, address, q, k)", "hash_event(prob, address, k)"),
    Planted(
        "masks",
        "either mask instead of both",
        "first(b, h, q, k) & second(b, h, q, k)",
        "first(b, h, q, k) | second(b, h, q, k)",
    ),
    Planted("masks", "earlier documents visible", "doc_ids[b, q] == doc_ids[b, k]", "doc_ids[b, q] >= doc_ids[b, k]"),
    Planted(
        "cross_entropy",
        "the mask token can be predicted",
        "logits[:, mask_token_id] = -torch.inf",
        "logits[:, mask_token_id] = 0.0",
    ),
    Planted(
        "cross_entropy",
        "a local mean",
        "return (weight * cross_entropy).sum(), cross_entropy",
        "return (weight * cross_entropy).mean(), cross_entropy",
    ),
    Planted(
        "cross_entropy",
        "gradient away from the target",
        "scatter_add_(1, wanted, -scale)",
        "scatter_add_(1, wanted, scale)",
    ),
    Planted("cross_entropy", "incoming gradient ignored", "(grad.to(scale.dtype) * scale)", "grad"),
    Planted(
        "objectives", "1/t dropped", "return self.schedule.nelbo_weight(batch.t)", "return torch.ones_like(batch.t)"
    ),
    Planted(
        "objectives",
        "discrete time without T",
        "self.schedule.discrete_weight(index.double(), self.num_timesteps).to",
        "self.schedule.discrete_weight(index.double(), 1).to",
    ),
    Planted(
        "objectives",
        "k-form without L / k",
        "total.to(batch.t.dtype) / count",
        "torch.ones_like(count, dtype=batch.t.dtype)",
    ),
    Planted(
        "objectives",
        "k-form that counts the prompt",
        "total = batch.maskable.view(blocks)",
        "total = batch.is_text.view(blocks)",
    ),
    Planted(
        "objectives",
        "CART counts masked neighbours",
        "batch.is_text & (batch.xt != batch.mask_token_id)",
        "batch.is_text",
    ),
    Planted(
        "objectives",
        "CART counts padding",
        "batch.is_text & (batch.xt != batch.mask_token_id)",
        "batch.xt != batch.mask_token_id",
    ),
    Planted("objectives", "CART a step too far", "(distance - 1).clamp(min=0)", "distance"),
    Planted(
        "objectives", "divided by the number of masks", "num_tokens=scored.sum(),", "num_tokens=batch.is_masked.sum(),"
    ),
    Planted(
        "objectives", "a local denominator", "loss_sum=head.loss_sum,", "loss_sum=head.loss_sum / targets.num_tokens,"
    ),
    Planted("objectives", "shift the wrong way", "select=places - target_offset", "select=places + target_offset"),
    Planted(
        "objectives",
        "first token scored though nothing predicts it",
        "scored[:, :target_offset] = False",
        "scored[:, :0] = False",
    ),
    Planted(
        "objectives",
        "the bound reported with the training weight",
        "None if bound is None else (bound.token_weight(batch)",
        "None if bound is None else (weighting.token_weight(batch)",
    ),
    Planted(
        "objectives",
        "autoregressive targets drop the last token, not the first",
        "scored[:, 1:] = valid[:, 1:] & valid[:, :-1]",
        "scored[:, :-1] = valid[:, 1:] & valid[:, :-1]",
    ),
    Planted(
        "objectives",
        "signal-to-noise ratio upside down",
        "return torch.log(alpha_t) - torch.log1p(-alpha_t)",
        "return torch.log1p(-alpha_t) - torch.log(alpha_t)",
    ),
    Planted("objectives", "score entropy without its constant", "ratio * (log_r - 1.0)", "ratio * log_r"),
    Planted(
        "variance",
        "importance not relative to [t_min, 1]",
        "span / ((1.0 - t_min) * schedule.nelbo_weight(t))",
        "span / schedule.nelbo_weight(t)",
    ),
    Planted("variance", "density not relative to uniform", "1.0 / (len(mass) * mass[place])", "1.0 / mass[place]"),
    Planted(
        "variance",
        "mass proportional to the moment, not to its root",
        "second_moment.double().sqrt()",
        "second_moment.double()",
    ),
    Planted(
        "variance",
        "biased variance",
        "(squares - total * total / count) / (count - 1)",
        "(squares - total * total / count) / count",
    ),
    Planted("variance", "widest intervals left out", "range(10, 20, 2)", "range(10, 18, 2)"),
    Planted(
        "variance",
        "the interval of most variance",
        "candidates[int(variances.argmin())]",
        "candidates[int(variances.argmax())]",
    ),
    Planted(
        "corpus_bound",
        "mc_se of a corpus not divided by sqrt(R)",
        "float(per_replicate.std()) / math.sqrt(num_replicates)",
        "float(per_replicate.std())",
    ),
    Planted(
        "likelihood",
        "mc_se of a row not divided by sqrt(R)",
        "nats.std(dim=0) / math.sqrt(num_orders)",
        "nats.std(dim=0)",
    ),
    Planted(
        "corpus_bound",
        "doc_se as if documents were of one length",
        "nelbo * doc_tokens",
        "nelbo * doc_tokens.double().mean()",
    ),
    Planted("likelihood", "tail below t_min left out", "if start > 0:", "if start > 1:"),
    Planted(
        "likelihood",
        "integral over [t_min, 1] taken for its mean",
        "weight = (1.0 - t_min) * schedule.nelbo_weight(t)",
        "weight = schedule.nelbo_weight(t)",
    ),
    Planted(
        "likelihood",
        "prior left out",
        "losses = losses + s.lengths * prior_loss(alpha_1, num_real_tokens)",
        "losses = losses + 0.0",
    ),
    Planted("likelihood", "prior once a row", "s.lengths * prior_loss(", "prior_loss("),
    Planted(
        "likelihood",
        "discrete bound without T",
        "weight = schedule.discrete_weight(index, num_timesteps)",
        "weight = schedule.discrete_weight(index, num_timesteps) / num_timesteps",
    ),
    Planted("corpus_bound", "counts from 0", "1 + torch.floor(u * lengths)", "torch.floor(u * lengths)"),
    Planted(
        "corpus_bound",
        "exact counts without n / k",
        "lengths.to(torch.float64) / num_masked.clamp(min=1)",
        "torch.ones_like(lengths, dtype=torch.float64)",
    ),
    Planted(
        "likelihood",
        "enumerated masks weighed as if n were k",
        "1 / (len(subset) * math.comb(",
        "1 / (lengths[row] * math.comb(",
    ),
    Planted(
        "likelihood",
        "standard error of neighbours without the 2",
        "torch.sqrt(total / 2) / num_draws",
        "torch.sqrt(total) / num_draws",
    ),
    Planted(
        "likelihood", "later tokens visible", "s.scored & (rank >= step), weight", "s.scored & (rank == step), weight"
    ),
    Planted(
        "likelihood",
        "chain over blocks instead of inside them",
        "torch.arange(s.x0.shape[1]) % block_size",
        "torch.arange(s.x0.shape[1]) // block_size",
    ),
    Planted(
        "ar_init",
        "shift by two copies of the first",
        "torch.cat([logits[:, :1], logits[:, :-1]], dim=1)",
        "torch.cat([logits[:, :1], logits[:, 1:]], dim=1)",
    ),
    Planted(
        "ar_init",
        "annealing a step late",
        "min(1.0, (step + 1) / num_anneal_steps)",
        "min(1.0, step / num_anneal_steps)",
    ),
    Planted("ar_init", "a phase one step too long", "if step < end:", "if step <= end:"),
    Planted(
        "ar_init",
        "noise on clean tokens too",
        "is_masked.to(embeddings.device).nonzero(as_tuple=True)",
        "torch.ones_like(is_masked, device=embeddings.device).nonzero(as_tuple=True)",
    ),
    Planted("ar_init", "mask noise that never fades", "max(0.0, 1.0 - step / num_steps)", "max(0.0, 1.0)"),
    Planted("upcycling", "a softmax over the chosen alone", "1.0 / moe.num_experts if", "1.0 / moe.top_k if"),
    Planted("upcycling", "the scale of the routed left out", "moe.routed_scale * (1.0 if", "(1.0 if"),
    Planted(
        "pipeline/tokenizer/mask",
        "a token given up that longer ones are made of",
        "for pair in merges if token in pair]",
        "for pair in merges if token == pair]",
    ),
    Planted("pipeline/tokenizer/mask", "a new row where one is free", "next_id < num_rows:", "next_id > num_rows:"),
    Planted(
        "pipeline/ar_init/run",
        "the old row of the mask in its own mean",
        "np.delete(np.arange(num_rows), mask) if",
        "np.arange(num_rows) if",
    ),
    Planted(
        "pipeline/ar_init/run", "both matrices of a copy divided", 'if rest == "experts.down_proj" else', "if rest else"
    ),
    Planted("pipeline/ar_init/run", "all layers with one router", "([config.init_seed, layer])", "(config.init_seed)"),
    Planted(
        "pipeline/pretrain/batches",
        "the future opened by the same draw whatever the seed",
        "ratio=ratio, noise_seed=config.noise_seed",
        "ratio=ratio, noise_seed=0",
    ),
    Planted(
        "pipeline/pretrain/batches",
        "noise of the place in the micro batch",
        "sample_ids=rows.ids, **address",
        "sample_ids=rows.ids - rows.ids[0], **address",
    ),
    Planted(
        "pipeline/pretrain/engine",
        "the mean over ranks not made up for",
        "return config.workers * config.grad_accum_steps /",
        "return config.grad_accum_steps /",
    ),
    Planted(
        "pipeline/pretrain/engine",
        "the mean over micro batches not made up for",
        "return config.workers * config.grad_accum_steps /",
        "return config.workers /",
    ),
    Planted(
        "pipeline/pretrain/engine",
        "ranks that share experts counted once",
        "return config.workers * config.grad_accum_steps /",
        "return config.workers // max(1, config.ep_size) * config.grad_accum_steps /",
    ),
    Planted(
        "pipeline/pretrain/routers",
        "experts balanced within a rank",
        "// losses.group_seqs * config.grad_accum_steps * config.workers",
        "// losses.group_seqs * config.grad_accum_steps",
    ),
    Planted(
        "pipeline/pretrain/routers",
        "experts balanced within a micro batch",
        "// losses.group_seqs * config.grad_accum_steps * config.workers",
        "// losses.group_seqs * config.workers",
    ),
    Planted(
        "pipeline/pretrain/routers",
        "groups of ranks that share experts counted once",
        "// losses.group_seqs * config.grad_accum_steps * config.workers",
        "// losses.group_seqs * config.grad_accum_steps * config.workers // max(1, config.ep_size)",
    ),
    *HARNESS,
    *IMPORTS,
    *CONVERSIONS,
    *SAMPLERS,
    *ANSWERS,
)
