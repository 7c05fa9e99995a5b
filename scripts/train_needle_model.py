"""Train the small model that ships inside: it finds a named number anywhere in a long prompt.

    python scripts/train_needle_model.py --text FILE [FILE ...] --work build/needle --out sparseprefill/needle_model

Everything is seeded; batch n depends on (seed, n) alone, so an interrupted run that is started again with the same
arguments continues from its last checkpoint to the same result. What ships is weights and a tokenizer, not text.

The task is learned as induction. The first layer starts with heads that look exactly 1, 2, 3 and 4 tokens back (one
offset in each KV head): a constant query bias u on the fast RoPE pairs, and as key bias the same u rotated by the
offset, so that the score peaks there. Later layers then only have to learn to look for "the place where these five
tokens stood before". Lengths grow from 128 to 32k; a third of the batches repeat random tokens, the others are
needles in prose with questions all along the prompt.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from sparseprefill.prompts import Prose, draw_needles, needle_prompt, text_sentences

# tokens in a prompt, tokens in a step, steps at most, learning rate, and the mean loss of the last 20 needle answers
# (nats a token) below which the next phase begins, and the weight of the block loss (see `block_loss`)
PHASES = (
    (128, 8192, 300, 1.5e-3, 0.30, 0.0),
    (256, 8192, 400, 1.5e-3, 0.15, 0.0),
    (512, 8192, 500, 1.5e-3, 0.08, 0.0),
    (2048, 8192, 400, 1.2e-3, 0.03, 0.0),
    (8192, 8192, 75, 8e-4, 0.02, 0.0),
    (16384, 16384, 24, 4e-4, 0.0, 0.0),
    (4096, 8192, 90, 4e-4, 0.0, 0.3),
)
VOCABULARY = 2048
OFFSETS = (1, 2, 3, 4)
REPEAT, NEEDLE = 1, 2  # kinds of answer tokens
RETRIEVAL_LAYER, BLOCK, WANTED = 1, 64, 3.0  # of the block loss
END = "<|end|>"
BFLOAT16 = torch.cpu._is_amx_tile_supported()  # without AMX, float32 is the faster of the two


def train_tokenizer(sentences: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; each digit is a token of its own, a leading space belongs to the word behind it."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r" ?\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, model_max_length=32768, padding_side="left"
    )


def new_model(layers: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e12},
        attention_bias=True,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("sdpa_seen")
    for layer in model.model.layers:  # biases are for queries and keys; the output's stays at zero
        layer.self_attn.o_proj.bias.requires_grad_(False)
    plant_previous_token_heads(model)
    return model


def plant_previous_token_heads(model: LlamaForCausalLM) -> None:
    """Biases of layer 0 that make KV head n look exactly OFFSETS[n] tokens back."""
    config = model.config
    half = config.head_dim // 2
    inverse_frequency = config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)
    # squared norm a RoPE pair: the fastest pairs tell neighbours apart, the slower ones forbid far recurrences
    power = torch.zeros(half)
    power[:10] = torch.tensor([60.0, 50.0, 40.0, 20.0, 20.0, 20.0, 20.0, 20.0, 20.0, 20.0])
    amplitude = power.sqrt()
    group = config.num_attention_heads // config.num_key_value_heads
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        query = attention.q_proj.bias.view(config.num_attention_heads, 2, half)
        key = attention.k_proj.bias.view(config.num_key_value_heads, 2, half)
        query.zero_()
        key.zero_()
        for kv_head, offset in enumerate(OFFSETS):
            query[kv_head * group : (kv_head + 1) * group, 0] = amplitude
            angle = inverse_frequency * offset
            key[kv_head, 0] = amplitude * angle.cos()
            key[kv_head, 1] = amplitude * angle.sin()


SEEN: list[torch.Tensor] = []  # queries and keys of the retrieval layer in the last forward pass


def sdpa_seen(module, query, key, value, attention_mask, **kwargs):  # type: ignore[no-untyped-def]
    """Stock attention that also remembers what the block loss looks at."""
    if module.layer_idx == RETRIEVAL_LAYER:
        SEEN[:] = [query, key]
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register("sdpa_seen", sdpa_seen)
AttentionMaskInterface.register("sdpa_seen", sdpa_mask)


def block_loss(pairs: list[tuple[int, int, int]]) -> torch.Tensor:
    """Make needles visible to block means, as salient passages are in large models.

    pairs: (row of the batch, position of an answer token, position of what it copies). In every head of the retrieval
    layer, the product of the mean query of the answer's block and the mean key of its needle's block shall stand
    WANTED standard deviations above the row's other blocks.
    """
    query, key = (t.unflatten(2, (-1, BLOCK)).mean(3) for t in SEEN)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    short = []
    for row, answer, source in sorted({(r, a // BLOCK, s // BLOCK) for r, a, s in pairs}):
        if answer - source < 3 or answer < 8:  # the local window has it anyway; too few blocks to compare
            continue
        scores = torch.einsum("hd,hnd->hn", query[row, :, answer], key[row, :, : answer - 1])
        standing = (scores[:, source] - scores.mean(-1)) / (scores.std(-1) + 1e-6)
        short.append((WANTED - standing).clamp(min=0))
    return torch.cat(short).square().mean() if short else torch.zeros(())


class Batches:
    """Batch n of a run: token ids [rows, length] and for each token the kind of answer it is part of (0: none)."""

    def __init__(self, encode: Callable[[str], list[int]], pools: list[np.ndarray], seed: int) -> None:
        self.encode, self.pools, self.seed = encode, pools, seed

    def __call__(self, step: int, length: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        draw = random.Random(f"{self.seed}/{step}")
        rows = max(1, tokens // length)
        made = [
            self._repeats(draw, length) if draw.random() < 1 / 3 else self._needles(draw, length) for _ in range(rows)
        ]
        return (
            torch.from_numpy(np.stack([ids for ids, _ in made])).long(),
            torch.from_numpy(np.stack([answer for _, answer in made])),
        )

    def spread(
        self, step: int, length: int, tokens: int, haystack: list[str]
    ) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, int, int]]]:
        """A batch of a few needles far apart, and for each answer token (batch row, its position, what it copies)."""
        draw = random.Random(f"{self.seed}/spread/{step}")
        rows, kinds, pairs = [], [], []
        for row in range(max(1, tokens // length)):
            text = haystack if draw.random() < 0.5 else None
            count, index = draw.randrange(4, 9), draw.getrandbits(32)
            prompt = needle_prompt(self.encode, length, seed=-1 - self.seed, index=index, needles=count, haystack=text)
            kind = np.zeros(length, np.int8)
            for answer in prompt.answers:
                kind[answer.start : answer.stop] = NEEDLE
                wanted = prompt.token_ids[answer.start : answer.stop]
                source = round(answer.depth * length)
                while prompt.token_ids[source : source + len(wanted)] != wanted:
                    source += 1
                pairs += [(row, answer.start - 1 + n, source + n) for n in range(len(wanted))]
            rows.append(prompt.token_ids)
            kinds.append(kind)
        return torch.tensor(rows), torch.from_numpy(np.stack(kinds)), pairs

    def _repeats(self, draw: random.Random, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Random tokens, cut into chunks that come again later, in between more random tokens."""
        noise = np.random.default_rng(draw.getrandbits(64))
        ids = noise.integers(1, VOCABULARY, length)
        if draw.random() < 0.5:  # digits repeat far more than words do: practise on a small alphabet too
            ids = noise.choice(noise.integers(1, VOCABULARY, 64), length)
        answer = np.zeros(length, np.int8)
        chunk = draw.randrange(16, max(17, min(length // 4, 256)))
        start = length // 2
        while start + chunk <= length:
            source = draw.randrange(0, length // 2 - chunk)
            ids[start : start + chunk] = ids[source : source + chunk]
            answer[start + 6 : start + chunk] = REPEAT
            start += chunk
        return ids, answer

    def _needles(self, draw: random.Random, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Needles and questions spliced into a slice of text, as many as leave half the room to the text."""
        most = max(2, min(40, length // 60))
        count = draw.randrange(2, most + 1)
        facts = draw_needles(count, draw)
        pool = self.pools[draw.randrange(len(self.pools))]
        pieces: list[tuple[float, list[int], int]] = []
        used = 0
        for fact in facts:
            statement, question, reply = (self.encode(t) for t in (fact.statement, fact.question, fact.answer + "."))
            if used + len(statement) + len(question) + len(reply) > length * 0.8:
                break
            used += len(statement) + len(question) + len(reply)
            at = draw.random()
            pieces.append((at, statement, 0))
            pieces.append((at + (1 - at) * draw.random(), question + reply, len(reply)))
        pieces.sort(key=lambda piece: piece[0])
        room = length - used
        first = draw.randrange(len(pool) - room)
        text = pool[first : first + room]
        out: list[np.ndarray] = []
        answer = np.zeros(length, np.int8)
        done = position = 0
        for at, ids, reply in pieces:
            place = int(at * room)
            out += [text[done:place], np.array(ids)]
            position += place - done + len(ids)
            answer[position - reply : position] = NEEDLE
            done = place
        out.append(text[done:])
        return np.concatenate(out), answer


def losses(model: LlamaForCausalLM, ids: torch.Tensor, kind: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Mean loss of all tokens, of answer tokens, and (for the log) of needle answers alone."""
    with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        logits = model.lm_head(hidden)
    token_loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    kind = kind[:, 1:].flatten()
    answers = token_loss[kind > 0]
    needles = token_loss.detach()[kind == NEEDLE]
    return token_loss.mean(), answers.sum() / max(1, len(answers)), needles.mean().item()


@torch.no_grad()
def retrieval(
    model: LlamaForCausalLM, encode: Callable[[str], list[int]], length: int, prompts: int, seed: int
) -> float:
    right = total = 0
    for index in range(prompts):
        prompt = needle_prompt(encode, length, seed=seed, index=index)
        ids = torch.tensor([prompt.token_ids])
        with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[0]
            for answer in prompt.answers:
                guess = model.lm_head(hidden[answer.start - 1 : answer.stop - 1]).argmax(-1)
                right += bool((guess == ids[0, answer.start : answer.stop]).all())
                total += 1
    return right / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="UTF-8 text files to train on")
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints and the log")
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--phases", type=json.loads, default=PHASES, help="JSON list of rows like PHASES")
    parser.add_argument("--start", type=Path, help="continue from the weights of this checkpoint (a new schedule)")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)

    sentences = [s for path in args.text for s in text_sentences(path.read_text(encoding="utf-8"))]
    sentences = sentences[: int(len(sentences) * 0.95)]  # the rest is never seen
    prose = Prose(f"train/{args.seed}")
    invented = [prose.sentence() for _ in range(60_000)]
    facts = [f for n in range(300) for f in draw_needles(8, random.Random(f"tokenizer/{n}"))]
    if not (args.work / "tokenizer").exists():
        train_tokenizer(sentences + invented + [f.statement + f.question + f.answer for f in facts]).save_pretrained(
            args.work / "tokenizer"
        )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.work / "tokenizer")

    def encode(text: str) -> list[int]:
        return tokenizer._tokenizer.encode(text, add_special_tokens=False).ids

    pools = [
        np.array([i for e in tokenizer._tokenizer.encode_batch(part) for i in e.ids]) for part in (sentences, invented)
    ]
    batches = Batches(encode, pools, args.seed)
    model = new_model(args.layers, args.seed)
    if args.start:
        model.load_state_dict(torch.load(args.start, weights_only=True)["model"])
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, pools {[len(p) for p in pools]} tokens", flush=True)

    decay = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}], betas=(0.9, 0.98)
    )
    state, log = args.work / "state.pt", args.work / "log.jsonl"
    step = phase = begun = 0  # begun: the step at which this phase began
    recent: list[float] = []
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step, phase, begun, recent = saved["step"], saved["phase"], saved["begun"], saved["recent"]
        print(f"continuing at step {step}", flush=True)

    def save() -> None:
        part = state.with_suffix(".part")
        torch.save(
            {
                "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "step": step, "phase": phase, "begun": begun, "recent": recent,
            },
            part,
        )  # fmt: skip
        part.replace(state)

    began = time.time()
    while phase < len(args.phases):
        length, tokens, most, rate, enough, weight = args.phases[phase]
        after = args.phases[min(phase + 1, len(args.phases) - 1)][3] if phase + 1 < len(args.phases) else rate * 0.1
        rate = min(rate * (after / rate) ** ((step - begun) / most), args.phases[0][3] * (step + 1) / 50)
        for group in optimizer.param_groups:
            group["lr"] = rate
        pairs: list[tuple[int, int, int]] = []
        if weight:
            ids, kind, pairs = batches.spread(step, length, tokens, sentences)
        else:
            ids, kind = batches(step, length, tokens)
        text_loss, answer_loss, needle_loss = losses(model, ids, kind)
        standing = block_loss(pairs)
        optimizer.zero_grad()
        (text_loss + answer_loss + weight * standing).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if not math.isnan(needle_loss):
            recent = [*recent[-19:], needle_loss]
        ended = step - begun >= most or (len(recent) == 20 and sum(recent) / 20 < enough)
        if step % (20 if length < 8192 else 2) == 0 or ended:
            row = {
                "step": step, "length": length, "text_loss": text_loss.item(), "answer_loss": answer_loss.item(),
                "needle_loss": sum(recent) / len(recent) if recent else None,
                "block_loss": standing.item(), "norm": norm.item(), "rate": rate,
                "seconds": time.time() - began,
            }  # fmt: skip
            if ended:
                lengths = [n for n in (512, 2048, 8192) if n <= 4 * length]
                row["retrieval"] = {n: retrieval(model, encode, n, 8, 10_000) for n in lengths}
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
        if ended:
            phase, begun, recent = phase + 1, step, []
        if ended or step % (100 if length < 8192 else 3) == 0:
            save()

    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
