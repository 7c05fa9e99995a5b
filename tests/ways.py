"""The ways in which people call a model, each as one function from a model to what it gives.

A way is run twice, without the patch and with it, and must give the same; `test_ways.py` walks the table.
"""

from __future__ import annotations

import copy
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from tiny_models import FAMILIES, VISION, tiny_model, tokens, with_image
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Cache,
    DynamicCache,
    PreTrainedModel,
    StaticCache,
    pipeline,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, QuantizedLayer

OLD = transformers.__version__.startswith("5.0.")
LENGTH = 200
BLOCKS = {"block_q": 16, "block_k": 16, "min_length": 0}


@dataclass(frozen=True)
class Way:
    """`run(model, family)` gives a tensor; logits and losses are compared closely, token ids exactly."""

    run: Callable[[PreTrainedModel, str], Tensor]
    make: Callable[[str], PreTrainedModel] = tiny_model
    oracle: Callable[[str], Tensor] | None = None  # None: what the same model gives without the patch
    ours: bool = True  # must run in our kernel: False where the previous implementation serves it, counted
    elsewhere: tuple[str, ...] = ()  # families for which it is so
    only: tuple[str, ...] | None = None  # families it is about
    gpu: bool = False  # transformers itself needs one for it


def padded(rows: list[Tensor], side: str = "left") -> dict[str, Tensor]:
    """Rows of different lengths as a batch with its mask."""
    width = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
    for b, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[b, place], mask[b, place] = row, 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


@torch.no_grad()
def logits(model: PreTrainedModel, **inputs: Any) -> Tensor:
    return model(**inputs).logits


@torch.no_grad()
def in_chunks(model: PreTrainedModel, inputs: dict[str, Tensor], sizes: list[int], cache: Any = None) -> Tensor:
    """Logits of a prompt that arrives in several calls with one cache."""
    parts, start = [], 0
    for size in sizes:
        stop = start + size
        chunk = {"input_ids": inputs["input_ids"][:, start:stop]}
        if "attention_mask" in inputs:
            chunk["attention_mask"] = inputs["attention_mask"][:, :stop]
            chunk["position_ids"] = inputs["position_ids"][:, start:stop]
        result = model(**chunk, past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        parts.append(result.logits)
        start = stop
    return torch.cat(parts, 1)


def _ragged(side: str = "left") -> dict[str, Tensor]:
    ids = tokens(3, LENGTH)
    return padded([ids[0], ids[1, :131], ids[2, :77]], side)


def _one_prompt(model: PreTrainedModel, family: str) -> Tensor:
    return logits(model, input_ids=tokens(1, LENGTH))


def _batch(model: PreTrainedModel, family: str) -> Tensor:
    return logits(model, input_ids=tokens(3, LENGTH))


def _padded(side: str) -> Callable[[PreTrainedModel, str], Tensor]:
    def run(model: PreTrainedModel, family: str) -> Tensor:
        batch = _ragged(side)
        return logits(model, **batch)[batch["attention_mask"].bool()]

    return run


def _packed(model: PreTrainedModel, family: str) -> Tensor:
    positions = torch.cat([torch.arange(90), torch.arange(110)])[None]
    return logits(model, input_ids=tokens(1, LENGTH), position_ids=positions, use_cache=False)


def _chunked(model: PreTrainedModel, family: str) -> Tensor:
    return in_chunks(model, {"input_ids": tokens(2, LENGTH)}, [50, 101, 3, 46])


def _chunked_left_padding(model: PreTrainedModel, family: str) -> Tensor:
    ids = tokens(2, LENGTH)
    batch = padded([ids[0], ids[1, :130]])
    return in_chunks(model, batch, [90, 110])[batch["attention_mask"].bool()]


def _cached_prefix(model: PreTrainedModel, family: str) -> Tensor:
    """One prefix, computed once, and two prompts that go on from it."""
    ids = tokens(1, LENGTH)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :120], use_cache=True).past_key_values
        others = tokens(2, 80, seed=5)
        each = [model(input_ids=row[None], past_key_values=copy.deepcopy(cache)).logits for row in others]
    return torch.cat(each)


def _several_turns(model: PreTrainedModel, family: str) -> Tensor:
    """The second turn of a left-padded batch is left-padded again: holes in the middle of the cache."""
    ids = tokens(2, 300)
    first, second = padded([ids[0, :120], ids[1, :70]]), padded([ids[0, 120:170], ids[1, 70:160]])
    mask = torch.cat([first["attention_mask"], second["attention_mask"]], 1)
    both = {
        "input_ids": torch.cat([first["input_ids"], second["input_ids"]], 1), "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }  # fmt: skip
    return in_chunks(model, both, [120, 90])[mask.bool()]


def _static_cache(model: PreTrainedModel, family: str) -> Tensor:
    cache = StaticCache(config=model.config, max_cache_len=300)
    return in_chunks(model, {"input_ids": tokens(1, LENGTH)}, [96, 104], cache)


_ATTENTION = (DynamicLayer, DynamicSlidingWindowLayer)


class RoundedLayer(QuantizedLayer):
    """transformers' quantized cache with a quantizer of our own: four bits a number, a scale for each token."""

    def _quantize(self, tensor: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        scale = tensor.abs().amax(-1, keepdim=True).clamp(min=1e-6) / 7
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, packed: tuple[Tensor, Tensor]) -> Tensor:
        whole, scale = packed
        return whole * scale


def _quantized_cache(model: PreTrainedModel, family: str) -> Tensor:
    cache = DynamicCache(config=model.config)
    if not cache.layers:  # made one by one
        layers = [RoundedLayer(residual_length=32) for _ in range(model.config.get_text_config().num_hidden_layers)]
    else:
        layers = [RoundedLayer(residual_length=32) if type(old) in _ATTENTION else old for old in cache.layers]
    return in_chunks(model, {"input_ids": tokens(1, LENGTH)}, [96, 104], Cache(layers=layers))


def _offloaded_cache(model: PreTrainedModel, family: str) -> Tensor:
    cache = DynamicCache(config=model.config, offloading=True)
    return in_chunks(model.cuda(), {"input_ids": tokens(1, LENGTH).cuda()}, [96, 104], cache)


def _no_cache(model: PreTrainedModel, family: str) -> Tensor:
    return logits(model, input_ids=tokens(2, LENGTH), use_cache=False)


def _generate(**options: Any) -> Callable[[PreTrainedModel, str], Tensor]:
    def run(model: PreTrainedModel, family: str) -> Tensor:
        ids = tokens(2, 100)
        batch = padded([ids[0], ids[1, :60]])
        del batch["position_ids"]
        torch.manual_seed(7)
        return model.generate(**batch, **{"max_new_tokens": 5, "do_sample": False, **options})

    return run


def _generate_one(**options: Any) -> Callable[[PreTrainedModel, str], Tensor]:
    """For what transformers does with one prompt at a time only."""

    def run(model: PreTrainedModel, family: str) -> Tensor:
        made = {name: value(family) if callable(value) else value for name, value in options.items()}
        torch.manual_seed(7)
        return model.generate(tokens(1, 100), max_new_tokens=5, do_sample=False, **made)

    return run


def _labels(model: PreTrainedModel, family: str) -> Tensor:
    ids = tokens(2, LENGTH)
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).loss


def _hidden_states(model: PreTrainedModel, family: str) -> Tensor:
    with torch.no_grad():
        return torch.stack(model(input_ids=tokens(2, LENGTH), output_hidden_states=True).hidden_states)


def _last_logits(model: PreTrainedModel, family: str) -> Tensor:
    return logits(model, input_ids=tokens(2, LENGTH), logits_to_keep=1)


def _embeddings(model: PreTrainedModel, family: str) -> Tensor:
    return logits(model, inputs_embeds=model.get_input_embeddings()(tokens(2, LENGTH)).detach())


def _mask_4d(kind: torch.dtype) -> Callable[[PreTrainedModel, str], Tensor]:
    def run(model: PreTrainedModel, family: str) -> Tensor:
        allowed = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
        allowed[100:, :20] = False
        mask = allowed[None, None]
        if kind != torch.bool:
            mask = torch.zeros(1, 1, LENGTH, LENGTH).masked_fill(~mask, torch.finfo(kind).min)
        return logits(model, input_ids=tokens(1, LENGTH), attention_mask=mask)

    return run


def _prefill_and_decode(call: Callable[..., Any]) -> Tensor:
    with torch.no_grad():
        first = call(input_ids=tokens(2, LENGTH), use_cache=True)
        second = call(input_ids=tokens(2, 1), past_key_values=first.past_key_values)
    return torch.cat([first.logits, second.logits], 1)


def _compiled(model: PreTrainedModel, family: str) -> Tensor:
    """The compiler's front end, without a code generator."""
    torch.compiler.reset()
    return _prefill_and_decode(torch.compile(model, backend="eager", dynamic=True))


def _eager(family: str) -> Tensor:
    return _prefill_and_decode(tiny_model(family))


def _threads(model: PreTrainedModel, family: str) -> Tensor:
    """Four prompts of different lengths at once."""
    results: dict[int, Any] = {}

    def call(n: int) -> None:
        try:
            results[n] = logits(model, input_ids=tokens(1, 80 + 30 * n, seed=n))
        except BaseException as error:
            results[n] = error

    threads = [threading.Thread(target=call, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results.values():
        if isinstance(result, BaseException):
            raise result
    return torch.cat([results[n] for n in range(4)], 1)


def _autocast(model: PreTrainedModel, family: str) -> Tensor:
    """Judged in test_huggingface against float32; here that it is served at all, and finitely."""
    with torch.autocast("cpu", torch.bfloat16):
        return logits(model, input_ids=tokens(1, LENGTH)).isfinite().all(-1).long()


def _bfloat16(model: PreTrainedModel, family: str) -> Tensor:
    return logits(model, input_ids=tokens(1, LENGTH)).isfinite().all(-1).long()


def _image(model: PreTrainedModel, family: str) -> Tensor:
    return logits(model, **with_image(family, tokens(2, LENGTH)))


def _image_then_text(model: PreTrainedModel, family: str) -> Tensor:
    """The image in the first chunk, a second chunk of text alone on top of its cache."""
    inputs = with_image(family, tokens(1, 100))
    with torch.no_grad():
        first = model(**inputs, use_cache=True)
        more = {"token_type_ids": torch.zeros(1, 60, dtype=torch.int64)} if family == "gemma3" else {}
        second = model(input_ids=tokens(1, 60, seed=3), past_key_values=first.past_key_values, **more)
    return torch.cat([first.logits, second.logits], 1)


def _pipeline(model: PreTrainedModel, family: str) -> Tensor:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(128)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2")
    prompt = " ".join(f"w{n}" for n in tokens(1, 90)[0].tolist())
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    answer = pipe(prompt, max_new_tokens=3, do_sample=False)[0]["generated_text"]
    assert answer.startswith(prompt)
    return torch.tensor([int(word) for word in answer.replace(" ", "").split("w")[1:]])


def _other_seed(family: str) -> PreTrainedModel:
    return tiny_model(family, seed=1)


def _lora(family: str) -> Any:
    from peft import LoraConfig, get_peft_model

    model = tiny_model(family)
    names = {name.rpartition(".")[2] for name, _ in model.named_modules() if "vision" not in name}
    targets = sorted(names & {"q_proj", "v_proj", "qkv_proj", "q_b_proj", "kv_b_proj"})
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    return adapted.eval()


def _layers(model: PreTrainedModel) -> tuple[str, Any]:
    """Name and list of the layers of the language model."""
    return next((n, m) for n, m in model.named_modules() if n.endswith("layers") and "vision" not in n)


def _device_map(family: str) -> PreTrainedModel:
    """Split over two places: one layer's weights lie on the disk and come only while it runs."""
    kind = AutoModelForImageTextToText if family in VISION else AutoModelForCausalLM
    folder = tempfile.TemporaryDirectory(prefix="sparseprefill-")
    whole = tiny_model(family)
    whole.save_pretrained(folder.name)
    places = {f"{_layers(whole)[0]}.1": "disk"}
    for name, _ in whole.named_modules():  # all the rest, by modules that do not hold the split one
        if name and not any(name == p or name.startswith(f"{p}.") or p.startswith(f"{name}.") for p in places):
            places[name] = "cpu"
    model = kind.from_pretrained(
        folder.name, device_map=places, offload_folder=f"{folder.name}/offload", attn_implementation="eager"
    )
    model.offload_folder = folder  # lives as long as the model
    return model.eval()


def _offloaded_weights(family: str) -> PreTrainedModel:
    """A device map that splits the model: some layers' weights come only while they run."""
    from accelerate import cpu_offload

    model = tiny_model(family)
    cpu_offload(_layers(model)[1][1], execution_device="cpu")
    return model


# quantized weights come in blocks of 64: widths that are multiples of it
_WIDE = {
    "intermediate_size": 128, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "head_dim": 32,
    "q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 32,
    "linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_num_key_heads": 4,
}  # fmt: skip


def _wide(family: str) -> dict[str, Any]:
    if family in VISION:
        return {"text_config": {**FAMILIES[family]["text_config"], "intermediate_size": 128}}
    return {name: width for name, width in _WIDE.items() if name in FAMILIES[family] or name == "intermediate_size"}


def _quantized_weights(bits: int) -> Callable[[str], PreTrainedModel]:
    def make(family: str) -> PreTrainedModel:
        from transformers import BitsAndBytesConfig

        whole = ["lm_head", "visual", "vision_tower", "multi_modal_projector", "in_proj_ba", "shared_expert_gate"]
        quantization = BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, llm_int8_skip_modules=whole)
        kind = AutoModelForImageTextToText if family in VISION else AutoModelForCausalLM
        with tempfile.TemporaryDirectory() as folder:
            tiny_model(family, **_wide(family)).save_pretrained(folder)
            return kind.from_pretrained(
                folder, quantization_config=quantization, attn_implementation="eager", dtype=torch.float32
            ).eval()

    return make


def _under(implementation: str) -> Callable[[str], PreTrainedModel]:
    def make(family: str) -> PreTrainedModel:
        return tiny_model(family, implementation=implementation)

    return make


def _over(model: PreTrainedModel, family: str) -> Tensor:
    """A prefill of ours, then a step of decoding by the implementation below."""
    with torch.compiler.set_stance("force_eager"):  # flex needs a C++ compiler on the CPU otherwise
        return _prefill_and_decode(model)


def _half(family: str) -> PreTrainedModel:
    return tiny_model(family).bfloat16()


WAYS: dict[str, Way] = {
    "one prompt": Way(_one_prompt),
    "batch": Way(_batch),
    "batch, left padding": Way(_padded("left")),
    "batch, right padding": Way(_padded("right")),
    "packed sequences": Way(_packed, elsewhere=("llama4_text",)),  # its chunked layers
    "chunked prefill": Way(_chunked),
    "chunked prefill, left padding": Way(_chunked_left_padding),
    "cached prefix": Way(_cached_prefix),
    "several turns, left padding": Way(_several_turns),
    "no cache": Way(_no_cache),
    "static cache": Way(_static_cache),
    "quantized cache": Way(_quantized_cache),
    "offloaded cache": Way(_offloaded_cache, gpu=True),
    "generate": Way(_generate()),
    "generate, prefill_chunk_size": Way(_generate_one(prefill_chunk_size=48)),
    "generate, sampling": Way(_generate(do_sample=True, top_k=20)),
    "generate, beams": Way(_generate(num_beams=3)),
    "generate, static cache": Way(_generate(cache_implementation="static", disable_compile=True)),
    "generate, assisted": Way(_generate_one(assistant_model=_other_seed)),
    "generate, prompt lookup": Way(_generate_one(prompt_lookup_num_tokens=3)),
    "labels": Way(_labels),
    "output_hidden_states": Way(_hidden_states),
    "logits_to_keep": Way(_last_logits),
    "inputs_embeds": Way(_embeddings),
    "4-D float mask": Way(_mask_4d(torch.float32), ours=False),
    "4-D bool mask": Way(_mask_4d(torch.bool), make=_under("sdpa"), ours=False),
    "torch.compile": Way(_compiled, oracle=_eager),
    "threads": Way(_threads),
    "pipeline": Way(_pipeline),
    "autocast": Way(_autocast),
    "bfloat16": Way(_bfloat16, make=_half),
    "over sdpa": Way(_over, make=_under("sdpa"), oracle=_eager),
    "over flex_attention": Way(_over, make=_under("flex_attention"), oracle=_eager),
    "PEFT adapter": Way(_batch, make=_lora),
    "device_map split": Way(_generate(), make=_device_map),
    "offloaded weights": Way(_generate(), make=_offloaded_weights),
    "8-bit weights": Way(_generate(), make=_quantized_weights(8)),
    "4-bit weights": Way(_generate(), make=_quantized_weights(4)),
    "image in the prompt": Way(_image, only=VISION, elsewhere=("gemma3",)),  # its image tokens look ahead
    "image, then a turn of text": Way(_image_then_text, only=VISION),
}  # fmt: skip
