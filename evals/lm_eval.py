"""lm-evaluation-harness on a patched model: the model type `sparseprefill`, and its tasks for several methods at once.

`python -m sparseprefill.lm_eval` is the harness' own command line with that model type. In this module the bare name
`lm_eval` is the harness.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from sparseprefill.evals.loading import load_model
from sparseprefill.evals.methods import MethodSpec
from sparseprefill.patterns.methods import METHODS
from sparseprefill.reports import PatchReport

MODEL_TYPE = "sparseprefill"
"""What `--model` calls it."""

INSIDE = "inside"
"""As `pretrained`: the small model that ships with the package."""

_GIB = 1 << 30


def require_harness() -> None:
    """Raise ImportError with the way out where lm-evaluation-harness is not installed."""
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise ImportError('lm-evaluation-harness is missing: pip install "sparseprefill[evals]"') from error


def register() -> None:
    """Let the harness of this process know the model type `sparseprefill`. Calling it again does nothing."""
    require_harness()
    import lm_eval.models  # noqa: F401  # fills the registry, which otherwise happens only while it is empty
    from lm_eval.api.registry import register_model

    register_model(MODEL_TYPE)(model_class())


@functools.cache
def model_class() -> Any:
    """`SparsePrefillLM`, the class behind the model type; made on the first call, for its base is the harness' own.

    SparsePrefillLM(pretrained="inside", *, method=None, ...) takes, as `--model_args`:

    - pretrained: a hub name, a folder, or a loaded model (then with its `tokenizer`); `inside`, and nothing, is the
      model that ships with the package. `dtype`, `device`, `trust_remote_code`: see `load_model`.
    - method: a name of `sparseprefill methods`, alone or as block_sparse:keep=0.2; its options may also be arguments
      of their own. "dense" is the stock model; without one, the default of `patch_model`.
    - min_length, last_rows_dense, dense_layers, block_q, block_k, impl, observe, min_mass: see `patch_model`. Here
      min_length is 0: quality is measured where a run would pay and where it would not. `auto` asks the cost model.
    - batch_size, max_length, truncation, add_bos_token, prefix_token_id, softmax_dtype, logits_cache, think_end_token,
      enable_thinking, chat_template_args: as of the harness' `hf`. batch_size is a number.
    - max_logits_gib: a log-likelihood keeps logits of the scored tokens alone, of `batch_size` prompts at a time. Where
      these exceed this size (the harness holds them twice) the run is refused before it begins.

    Prompts of a log-likelihood are batched with prompts of their own length, so none is padded: the harness pads on the
    right and passes no mask, and what a method sees as the last queries would be padding. `generate_until` pads on the
    left with a mask, which the patched attention honours.

    The harness' response cache (`--use_cache`) knows nothing of the method: give each a file of its own.
    """
    require_harness()
    from lm_eval.models.huggingface import HFLM

    class SparsePrefillLM(HFLM):  # type: ignore[misc]  # the harness has no types
        """See `sparseprefill.evals.lm_eval.model_class`."""

        def __init__(
            self,
            pretrained: str | PreTrainedModel | None = INSIDE,
            *,
            method: str | None = None,
            tokenizer: Any = None,
            dtype: str = "auto",
            device: str | None = None,
            trust_remote_code: bool = False,
            batch_size: int | str = 1,
            max_batch_size: int | None = None,
            max_length: int | None = None,
            max_logits_gib: float = 8.0,
            truncation: bool = False,
            add_bos_token: bool | None = None,
            prefix_token_id: int | None = None,
            softmax_dtype: str | None = None,
            logits_cache: bool = True,
            think_end_token: str | int | None = None,
            enable_thinking: bool | None = None,
            chat_template_args: dict[str, Any] | None = None,
            min_length: int | str | None = 0,
            last_rows_dense: int = 0,
            dense_layers: Sequence[int] = (),
            block_q: int = 64,
            block_k: int = 64,
            impl: str = "auto",
            observe: bool = False,
            min_mass: float | None = None,
            **options: Any,
        ) -> None:
            _check_alone()
            rows = _batch_rows(batch_size, max_batch_size)
            self.spec = _method_of(method, options, _arguments(SparsePrefillLM))
            if max_logits_gib <= 0:
                raise ValueError(f"max_logits_gib must be above 0, got {max_logits_gib}")
            if isinstance(pretrained, PreTrainedModel):
                if tokenizer is None or isinstance(tokenizer, str):
                    raise ValueError("a loaded model comes with its loaded tokenizer: give both")
                if dtype != "auto" or device is not None:
                    raise ValueError("dtype and device belong to loading: a loaded model has them")
                model = pretrained
            else:
                if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
                    raise ValueError(f"device={device}: there is no GPU that torch can use here; leave it out, or cpu")
                name = None if pretrained in (None, INSIDE) else str(pretrained)
                model, own = load_model(name, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
                if isinstance(tokenizer, str):
                    own = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=trust_remote_code)
                tokenizer = own if tokenizer is None or isinstance(tokenizer, str) else tokenizer
            with _quiet("lm_eval.models.huggingface"):  # it warns that arguments may be ignored; here none is
                super().__init__(
                    pretrained=model, tokenizer=tokenizer, batch_size=rows, max_length=max_length,
                    truncation=truncation, add_bos_token=add_bos_token, prefix_token_id=prefix_token_id,
                    softmax_dtype=softmax_dtype, logits_cache=logits_cache, think_end_token=think_end_token,
                    enable_thinking=enable_thinking, chat_template_args=chat_template_args,
                )  # fmt: skip
            if self.backend != "causal":
                raise ValueError(f"{type(model).__name__} is no decoder-only language model: use the harness' own hf")
            self.source = Path(str(model.name_or_path)).name
            self.max_logits_bytes = int(max_logits_gib * _GIB)
            self._scored: int | None = None  # logits that the running log-likelihood needs, from the end
            accepted = inspect.signature(model.forward).parameters
            self._takes_scored, self._takes_cache = "logits_to_keep" in accepted, "use_cache" in accepted
            self.settings = {
                "min_length": None if min_length == "auto" else min_length, "last_rows_dense": last_rows_dense,
                "dense_layers": tuple(dense_layers), "block_q": block_q, "block_k": block_k, "impl": impl,
                "observe": observe, "min_mass": min_mass,
            }  # fmt: skip
            self._stack = contextlib.ExitStack()
            self.patch = self._stack.enter_context(self.spec.applied(model, **self.settings))

        def remove(self) -> None:
            """Give the model back as it was."""
            self._stack.close()

        def report(self) -> PatchReport | None:
            """What the patched layers did so far; None for the stock model."""
            return None if self.patch is None else self.patch.report()

        def get_model_info(self) -> dict[str, Any]:
            """What the harness writes beside its results: the model, the method, and how many calls ran sparsely."""
            from sparseprefill import __version__

            found: dict[str, Any] = {
                "model_source": self.source, "model_num_parameters": self.model.num_parameters(),
                "model_dtype": str(self.model.dtype).removeprefix("torch."), "sparseprefill": __version__,
                "method": self.spec.label,
            }  # fmt: skip
            report = self.report()
            if report is not None:
                found["method_settings"] = self.settings
                found["sparse_calls"], found["previous_calls"] = report.sparse_calls, report.previous_calls
                found["decision"], found["density"], found["kept_mass"] = (
                    report.decision, report.density, report.kept_mass,
                )  # fmt: skip
            return found

        def _model_call(self, inps: Any, attn_mask: Any = None, labels: Any = None) -> Any:
            if attn_mask is not None or labels is not None:
                raise NotImplementedError("encoder-decoder models are not served")
            settings: dict[str, Any] = {}
            if self._scored is not None and self._takes_scored:
                settings["logits_to_keep"] = self._scored
            if self._takes_cache:
                settings["use_cache"] = False
            with torch.no_grad():
                return self.model(inps, **settings).logits

        def _loglikelihood_tokens(
            self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[tuple[float, bool]]:
            from tqdm import tqdm

            groups: dict[int, list[int]] = {}
            for place, (_, context, continuation) in enumerate(requests):
                tokens = min(len(context) + len(continuation), self.max_length + 1) - 1
                groups.setdefault(tokens, []).append(place)
            scored = {
                tokens: min(tokens, max(len(requests[place][2]) for place in places))
                for tokens, places in groups.items()
            }
            for tokens, places in groups.items():
                kept = scored[tokens] if self._takes_scored else tokens
                self._check_logits(min(len(places), self.batch_size), kept, tokens)
            answers: list[Any] = [None] * len(requests)
            with tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
                for tokens in sorted(groups, reverse=True):
                    places, self._scored = groups[tokens], scored[tokens]
                    try:
                        found = super()._loglikelihood_tokens([requests[place] for place in places], disable_tqdm=True)
                    finally:
                        self._scored = None
                    for place, answer in zip(places, found, strict=True):
                        answers[place] = answer
                    bar.update(len(places))
            return answers

        def _check_logits(self, rows: int, kept: int, tokens: int) -> None:
            vocabulary = self.model.get_output_embeddings().weight.shape[0]
            size = rows * kept * vocabulary * self.model.dtype.itemsize
            if size > self.max_logits_bytes:
                raise ValueError(
                    f"the logits of {rows} x {kept} scored tokens (prompts of {tokens}) take {size / _GIB:.1f} GiB, "
                    f"twice, and max_logits_gib is {self.max_logits_bytes / _GIB:g}: choose a smaller batch_size, a "
                    "smaller max_length (perplexity then has shorter windows), or raise max_logits_gib"
                )

    return SparsePrefillLM


def _check_alone() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "the model type sparseprefill runs in one process, and this is one of several (WORLD_SIZE): each would do "
            "all the work. Start it without accelerate launch or torchrun"
        )


def _batch_rows(batch_size: int | str, max_batch_size: int | None) -> int:
    if max_batch_size is not None:
        raise ValueError("max_batch_size goes with batch_size=auto, which is not offered here: give batch_size")
    if not str(batch_size).isdecimal() or int(batch_size) < 1:
        raise ValueError(f"batch_size must be a whole number above 0, got {batch_size!r}: there is no auto here")
    return int(batch_size)


def _arguments(cls: Any) -> list[str]:
    parameters = inspect.signature(cls.__init__).parameters.values()
    return [each.name for each in parameters if each.name != "self" and each.kind is not each.VAR_KEYWORD]


def _method_of(method: str | None, options: dict[str, Any], arguments: list[str]) -> MethodSpec:
    """The method with the options of its text and of the arguments together. Raises ValueError before a model loads."""
    from sparseprefill.prefill import named_method, options_of, resolve_method

    method, options = named_method(method, None, options)
    spec = MethodSpec.parse(method)
    if spec.name not in METHODS:
        resolve_method(spec.name)  # the error that names the nearest
    known = options_of(spec.name, {**spec.options, **options}.get("inner"))
    for name in options:
        if name in spec.options:
            raise ValueError(f"{name} is given twice: in method={method} and as an argument")
        if name not in known:
            raise ValueError(
                f"{name!r} is neither an argument of the model type {MODEL_TYPE} ({', '.join(arguments)}) nor an "
                f"option of the method {spec.name} ({', '.join(known) or 'it has none'})"
            )
    spec = MethodSpec(spec.name, spec.options | options)
    resolve_method(spec.name, **spec.options)
    return spec


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """No warnings of one logger."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
