"""Keys of a context and queries of questions about it, as a model's layers have them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparseprefill.context import prepare_context
from sparseprefill.evals.context_questions import make_questions
from sparseprefill.huggingface import patch_model
from sparseprefill.patterns.fixed_context import ContextKeys


class _Watching:
    """A context method that chooses everything, and keeps what it is shown."""

    def __init__(self, sink: int, local: int) -> None:
        self.sink, self.local = sink, local
        self.indexes: list[_Seen] = []

    def check_length(self, length: int) -> None:
        """Any will do."""

    def index_layer(self, keys: ContextKeys) -> _Seen:
        """Keep the keys."""
        self.indexes.append(_Seen(keys))
        return self.indexes[-1]

    def calibrate(self, indexes: Any, length: int) -> None:
        """Nothing to do."""

    def load_index(self, *_: Any) -> Any:
        """It is not kept in files."""
        raise NotImplementedError("this method is for looking on")


class _Seen:
    def __init__(self, keys: ContextKeys) -> None:
        kv_heads, middle = keys.key.shape[:2]
        self.keys = keys
        self.order = torch.arange(middle).expand(kv_heads, -1)
        self.asked: list[Tensor] = []

    def choose(self, query: Tensor, real: Tensor, queries: Tensor, edge_lse: Tensor) -> Tensor:
        """Everything; the queries are kept."""
        self.asked.append(query[:, real].cpu())
        return torch.ones(*query.shape[:2], self.order.shape[1], dtype=torch.bool)

    def tensors(self) -> dict[str, Tensor]:
        """None."""
        return {}

    def to(self, device: torch.device) -> _Seen:
        """The order goes there."""
        self.order = self.order.to(device)
        return self


@torch.no_grad()
def question_heads(
    model: PreTrainedModel, tokenizer: Any, length: int, *, questions: int = 20, train: int = 4096, most: int = 256,
    sink: int = 16, local: int = 128, seed: int = 1,
) -> list[tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """For each layer and KV head: keys between sink and local window, queries of the context, queries of questions.

    At most `train` and `most` queries, evenly spaced.
    """
    made = make_questions(tokenizer, length, questions, margin=(sink + 64, local + 64), seed=str(seed))
    method = _Watching(sink, local)
    context = prepare_context(model, made.context, method, progress=False)
    with patch_model(model, context=context, observe=False):
        inputs = context.inputs(list(made.asked))
        ids = inputs["input_ids"][:, len(context) :]
        place = (inputs["attention_mask"].cumsum(1) - 1)[:, len(context) :].clamp(min=0)
        model(
            input_ids=ids, attention_mask=inputs["attention_mask"], position_ids=place,
            past_key_values=inputs["past_key_values"],
        )  # fmt: skip
    found = []
    for seen in method.indexes:
        kv_heads = seen.order.shape[0]
        learnt = seen.keys.query.unflatten(0, (kv_heads, -1)).flatten(1, 2)
        some = torch.linspace(0, learnt.shape[1] - 1, min(train, learnt.shape[1])).round().to(torch.int64)
        asked = torch.cat(seen.asked, 1)
        own = torch.linspace(0, asked.shape[1] - 1, min(most, asked.shape[1])).round().to(torch.int64)
        for head in range(kv_heads):
            found.append((seen.keys.key[head].contiguous(), learnt[head, some], asked[head, own].float()))
    return found
