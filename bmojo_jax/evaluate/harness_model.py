"""The model class that EleutherAI's lm-evaluation-harness asks (lm-eval 0.4.13, without torch).

    loglikelihood          of a continuation after a context, and whether greedy decoding gives it
    loglikelihood_rolling  of a whole text
    generate_until         the greedy continuation up to a stop string

Its conventions: spaces that end a context belong to the continuation, whose tokens are those of
both as one text beyond as many as the context has by itself. Ours: every text starts with the
boundary, as documents do in training, and nothing is cut off or windowed: a text of any length is
read in one pass from its start, through the recurrent form where it is long.
"""

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from bmojo_jax.checkpoint import Trained
from bmojo_jax.evaluate import scoring

_MAX_TOKENS = 256  # of a generated text, unless the task says


class HarnessModel(TemplateLM):
    """A trained model for `lm_eval.simple_evaluate(model=HarnessModel(trained), ...)`."""

    def __init__(self, trained: Trained) -> None:
        super().__init__()
        self._trained = trained

    @property
    def eot_token_id(self) -> int:
        return self._trained.tokenizer.boundary_id

    @property
    def tokenizer_name(self) -> str:
        """Tells caches of requests apart."""
        return f"bmojo_jax-{self._trained.tokenizer.fingerprint()}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        del add_special_tokens, kwargs  # the boundary is put before contexts as they are scored
        return self._trained.tokenizer.encode(string).tolist()

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        del disable_tqdm, kwargs
        scored = scoring.log_likelihoods(
            self._trained,
            [
                scoring.Request(self._framed(context), continuation)
                for _, context, continuation in requests
            ],
        )
        results = [(score.log_p, score.is_greedy) for score in scored]
        for (texts, _, _), result in zip(requests, results, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        tokens = [(None, [self.eot_token_id], self.tok_encode(*x.args)) for x in requests]
        results = [
            log_p for log_p, _ in self._loglikelihood_tokens(tokens, disable_tqdm=disable_tqdm)
        ]
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations.

        Raises:
          ValueError: a request wants sampling or several beams.
        """
        del disable_tqdm
        texts = [""] * len(requests)
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(_settings(request.arguments[1]), []).append(i)
        for (max_tokens, stop), members in groups.items():
            prompts = [self._framed(self.tok_encode(requests[i].arguments[0])) for i in members]
            found = scoring.greedy(self._trained, prompts, max_tokens=max_tokens, stop=stop)
            for i, text in zip(members, found, strict=True):
                texts[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return texts

    def _framed(self, ids: list[int]) -> list[int]:
        return ids if ids[:1] == [self.eot_token_id] else [self.eot_token_id, *ids]


def _settings(arguments: dict[str, Any]) -> tuple[int, tuple[str, ...]]:
    """Most tokens, and stop strings."""
    if arguments.get("do_sample", False):  # without it, temperature and the like mean nothing
        raise ValueError("generation_kwargs: do_sample=True must be False; only greedy decoding")
    if arguments.get("num_beams", 1) != 1:
        raise ValueError(f"generation_kwargs: num_beams={arguments['num_beams']} must be 1")
    until = arguments.get("until") or []
    stop = (until,) if isinstance(until, str) else tuple(until)
    return int(arguments.get("max_gen_toks", _MAX_TOKENS)), stop
