"""The model "dlm" of lm-evaluation-harness: likelihoods, rolling likelihoods and generation, by all kinds of models.

The harness sees one process: requests are handed to workers in here, in pieces that depend on the requests alone.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import LM
from lm_eval.utils import simple_parse_args_string
from tqdm import tqdm

from pipeline.artifact import load_manifest
from pipeline.errors import NumericsError, UserError
from pipeline.harness.accounts import Accounts
from pipeline.harness.addresses import address_of, repetitions
from pipeline.harness.config import check_model, read_config, with_theirs
from pipeline.harness.generation import Prompt, Wish, Written, cut_prompts, wish_of, write
from pipeline.harness.pieces import begins_with, cut_requests, masked_copies, next_token_request, one_copy
from pipeline.inference.greedy import are_greedy
from pipeline.inference.likelihood import LikelihoodConfig, Request, Score, ScoreError, score, why_unguided
from pipeline.inference.model import OpenModel, read_about
from pipeline.inference.pairs import encode_pair
from pipeline.inference.sampling import SamplingConfig
from pipeline.inference.stops import before_stops
from pipeline.inference.workers import Workers

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

_log = logging.getLogger(__name__)
_LIKELIHOODS = {
    "masked_nelbo": "bound by exact counts of masks",
    "block_nelbo": "bound by the chain over blocks",
    "autoregressive_nll": "exact",
}


class DenoiserLM(LM):
    """Interchange weights and their tokenizer, with the settings in model_args.

    A model of next tokens is asked as the harness's own are, but that an answer is never scored in part, where a token
    would hold its beginning and the end of its context (pipeline/inference/pairs.py), that a rolling likelihood never
    counts the token that a tokenizer begins texts with, which is no part of the text, and that the mask is never drawn.
    """

    def __init__(self, **given: Any) -> None:
        super().__init__()
        self._config = read_config(given)
        own = self._config.own
        weights, tokenizer = Path(own.weights), Path(own.tokenizer)
        self._record, self._vocabulary = read_about(weights, tokenizer)
        check_model(self._config, self._record, self._vocabulary.special)
        self._is_autoregressive = self._record.objective == "autoregressive_nll"
        self._begin = begins_with(self._vocabulary.tokenizer) if self._is_autoregressive else ()
        self._fingerprint = load_manifest(weights).fingerprint
        self._workers = Workers(weights, tokenizer, own.device, own.workers)
        self._accounts = Accounts(own.details)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "DenoiserLM":
        """As the harness makes a model from a dictionary; a device may stand in it too."""
        return cls(**with_theirs(arg_dict, **_theirs(additional_config)))

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> "DenoiserLM":
        """As the harness makes a model from "name=value,name=value"."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def loglikelihood(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p of each answer or a bound on it, whether it is the greedy one); choices of a document share masks."""
        self._refuse_greedy_tasks(requests)
        asked = [self._request(instance) for instance in requests]
        scores = self._scores(list(zip(requests, asked, strict=True)), "likelihoods", disable_tqdm)
        lines = [_figures(scores[request]) for request in asked]
        self._account("loglikelihood", requests, lines)
        greedy = dict.fromkeys(asked, False)
        if self._config.own.is_greedy:
            greedy = self._ask(are_greedy, asked, one_copy, "greedy answers", disable_tqdm)
        return self._kept(
            "loglikelihood", requests, [(-line["nats"], greedy[one]) for one, line in zip(asked, lines, strict=True)]
        )

    def loglikelihood_rolling(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[float]:
        """log p of each text or a bound on it: every token once, in rows of the length that the model was trained on.

        A row of a bound sees itself alone (of a shifted model, the token before it too); a model of next tokens sees as
        much as it can.
        """
        texts = [self._rows(instance) for instance in requests]
        asked = [(instance, row) for instance, rows in zip(requests, texts, strict=True) for row in rows]
        scores = self._scores(asked, "rows of text", disable_tqdm)
        lines = [_figures(*(scores[row] for row in rows)) | {"num_cut": 0} for rows in texts]
        self._account("loglikelihood_rolling", requests, lines)
        return self._kept("loglikelihood_rolling", requests, [-line["nats"] for line in lines])

    def generate_until(self, requests: "list[Instance]", disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to the first of the strings that a task ends answers with."""
        wishes = [wish_of(_words(instance)[1], self._config, self._record) for instance in requests]
        prompts = [
            Prompt(
                (*self._begin, *self._encode(_words(instance)[0])), wish.length, address_of(instance).number(repetition)
            )
            for instance, wish, repetition in zip(requests, wishes, repetitions(requests), strict=True)
        ]
        for instance, prompt, wish in zip(requests, prompts, wishes, strict=True):
            if wish.sampling.guidance and not prompt.ids:
                raise UserError(
                    f"{_place_of(instance)}: guidance is {wish.sampling.guidance}, but the prompt is empty, which "
                    "leaves nothing to strengthen; set it to 0, or leave the document out"
                )
        written = self._write(prompts, wishes, disable_tqdm)
        lines = [{"num_passes": one.nfe, "num_cut": one.num_cut} for one in written]
        self._account("generate_until", requests, lines)
        texts = [before_stops(one.text, wish.until) for one, wish in zip(written, wishes, strict=True)]
        return self._kept("generate_until", requests, texts)

    def get_model_info(self) -> dict[str, Any]:
        """What numbers depend on, and what the harness has no place for: ends up in "config" of its results.

        The seeds that it puts there itself are of its examples in prompts, and of models that draw from torch.
        """
        likelihood, sampling = self._config.likelihood, self._config.sampling_of({})
        return {
            "model_weights": self._fingerprint,
            "model_objective": self._record.objective,
            "model_seq_len": self._record.seq_len,
            "likelihood": _LIKELIHOODS[self._record.objective],
            "likelihood_num_masks": likelihood.num_masks,
            "likelihood_guidance": likelihood.guidance,
            "likelihood_noise_seed": likelihood.noise_seed,
            "likelihood_batch_rows": likelihood.batch_rows,
            "generation_noise_seed": sampling.noise_seed,
            "generation_batch_rows": sampling.batch_rows,
            "workers": self._config.own.workers,
            "accounts": self._accounts.told(),
        }

    @property
    def tokenizer_name(self) -> str:
        """Asked for with chat templates alone."""
        raise _no_chat()

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Refused."""
        raise _no_chat()

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """None; refused where one is asked for."""
        if chat_template:
            raise _no_chat()
        return None

    def close(self) -> None:
        """End the workers; they also end with this process."""
        self._workers.close()

    def _request(self, instance: "Instance") -> Request:
        context, answer = _words(instance)
        context_ids, ids = encode_pair(self._encode, context, answer)
        room = self._record.seq_len - self._record.target_offset
        if not 0 < len(ids) <= room:
            raise UserError(
                f"{_place_of(instance)}: the answer {answer[:40]!r} has {len(ids)} tokens; the model takes from 1 to "
                f"{room}. Leave the document out"
            )
        number = address_of(instance).number()
        if self._is_autoregressive:
            return next_token_request(self._begin, context_ids, ids, number)
        return Request(tuple(context_ids), tuple(ids), number)

    def _encode(self, text: str) -> list[int]:
        return self._vocabulary.tokenizer.encode(text, add_special_tokens=False).ids

    def _rows(self, instance: "Instance") -> list[Request]:
        (text,) = _words(instance)
        ids, address = tuple(self._encode(text)), address_of(instance)
        size = self._record.seq_len - self._record.target_offset
        num_seen, before = self._record.target_offset, None
        if self._is_autoregressive:
            num_seen, before = size, self._begin[0] if self._begin else None
        return [
            Request(ids[max(0, start - num_seen) : start], ids[start : start + size], address.number(start), (), before)
            for start in range(0, len(ids), size)
        ]

    def _scores(
        self, asked: "Sequence[tuple[Instance, Request]]", what: str, disable_tqdm: bool
    ) -> dict[Request, Score]:
        """Of each request; UserError for what guidance has no effect on, all that is rolling among it."""
        for instance, request in asked:
            if reason := why_unguided(request, self._config.likelihood, self._record):
                raise UserError(f"{_place_of(instance)}: {reason}")
        of_bound = partial(
            masked_copies, num_masks=self._config.likelihood.num_masks, block_size=self._record.block_size
        )
        num_copies, requests = one_copy if self._is_autoregressive else of_bound, [request for _, request in asked]
        try:
            return self._ask(score, requests, num_copies, what, disable_tqdm)
        except ScoreError as error:
            instance, _ = asked[requests.index(error.request)]
            raise NumericsError(f"{_place_of(instance)}: {error}") from None

    def _ask(
        self,
        ask: Any,
        requests: Sequence[Request],
        num_copies: Callable[[Request], int],
        what: str,
        disable_tqdm: bool,
    ) -> dict[Request, Any]:
        config = self._config.likelihood
        pieces = cut_requests(requests, num_copies, config.batch_rows)
        with tqdm(total=len(pieces), desc=f"Pieces of {what}", disable=disable_tqdm) as bar:
            found = self._workers.map(partial(_asked, ask=ask, config=config), pieces, bar.update)
        return {
            request: one
            for piece, answers in zip(pieces, found, strict=True)
            for request, one in zip(piece, answers, strict=True)
        }

    def _write(self, prompts: Sequence[Prompt], wishes: Sequence[Wish], disable_tqdm: bool) -> list[Written]:
        by_config: dict[SamplingConfig, list[Prompt]] = {}
        for prompt, wish in zip(prompts, wishes, strict=True):
            by_config.setdefault(wish.sampling, []).append(prompt)
        found: dict[tuple[SamplingConfig, Prompt], Written] = {}
        for config, some in by_config.items():
            pieces = cut_prompts(some, config.batch_rows)
            with tqdm(total=len(pieces), desc="Batches of prompts", disable=disable_tqdm) as bar:
                answers = self._workers.map(partial(write, config=config), pieces, bar.update)
            for piece, written in zip(pieces, answers, strict=True):
                found |= {(config, prompt): one for prompt, one in zip(piece, written, strict=True)}
        return [found[wish.sampling, prompt] for prompt, wish in zip(prompts, wishes, strict=True)]

    def _account(self, kind: str, requests: "Sequence[Instance]", lines: Sequence[Mapping[str, Any]]) -> None:
        self._accounts.add(kind, requests, lines, adds_up=kind == "loglikelihood_rolling")
        for task, (num_cut, total) in self._accounts.cut(kind).items():
            _log.warning(
                "task %s: %d of %d contexts are longer than the rows of %d tokens that the model was trained on; their "
                "beginning was cut", task, num_cut, total, self._record.seq_len,
            )  # fmt: skip

    def _kept(self, kind: str, requests: "Sequence[Instance]", answers: list[Any]) -> list[Any]:
        """The answers, in the harness's cache too if it has one."""
        for instance, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial(kind, instance.args, answer)
        return answers

    def _refuse_greedy_tasks(self, requests: "Sequence[Instance]") -> None:
        """A document with one answer alone is asked whether that is the greedy one; a False would be a wrong number."""
        if self._config.own.is_greedy is not None:
            return
        tasks_of_choices = {instance.task_name for instance in requests if instance.idx > 0}
        for instance in requests:
            if instance.task_name not in tasks_of_choices and instance.task_name is not None:
                raise UserError(
                    f"task {instance.task_name} has one answer for a document: its accuracy is whether greedy decoding "
                    "gives it, which takes a pass for each token. Set is_greedy=true in model_args, or "
                    "is_greedy=false to do without (its acc is then 0)"
                )


def _words(instance: "Instance") -> tuple[Any, ...]:
    return instance.args


def _place_of(instance: "Instance") -> str:
    return f"task {instance.task_name}, document {instance.doc_id}"


def _asked(model: OpenModel, piece: Sequence[Request], ask: Any, config: LikelihoodConfig) -> Any:
    return ask(model, piece, config)


def _figures(*scores: Score) -> dict[str, Any]:
    """Of rows with masks of their own that make up one text."""
    return {
        "nats": sum(one.nats for one in scores),
        "mc_se": sum(one.mc_se**2 for one in scores) ** 0.5,
        "num_passes": sum(one.num_passes for one in scores),
        "num_cut": sum(one.num_cut for one in scores),
    }


def _theirs(given: dict[str, Any] | None) -> dict[str, Any]:
    return {name: (given or {}).get(name) for name in ("device", "batch_size", "max_batch_size")}


def _no_chat() -> UserError:
    return UserError(
        "a chat template is asked for, but the model dlm has none: its prompts are plain text. Leave "
        "apply_chat_template out"
    )
