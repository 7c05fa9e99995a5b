"""Draw four heads of the model inside: one local, one sink, one previous-token and one retrieval head.

    python scripts/plot_heads.py --out docs/heads.png

Each is found by its score on one prompt, not named by hand: the share of its attention mass that goes to the last 128
tokens but the previous one, to the previous token, to the digits of a needle being copied, to the first 4 tokens. The
picture shows the mass of 64-token tiles (for the previous-token head, of single tokens near the diagonal).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from sparseprefill import AttentionInputs, BlockGrid, BlockIndex, patch_model
from sparseprefill.evals import load_model
from sparseprefill.prompts import needle_prompt

LENGTH, BLOCK = 2048, 64


class Captured:
    """Dense attention that keeps its inputs (but not the two blocks a pattern is tried on when a model is patched)."""

    def __init__(self) -> None:
        self.layers: list[AttentionInputs] = []

    def build_index(self, inputs: AttentionInputs, grid: BlockGrid) -> BlockIndex:
        if inputs.queries == LENGTH:
            self.layers.append(inputs)
        return BlockIndex.dense(inputs, grid)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/heads.png"))
    args = parser.parse_args()
    model, tokenizer = load_model()
    prompt = needle_prompt(lambda text: tokenizer(text, add_special_tokens=False)["input_ids"], LENGTH, seed=4)
    ids = torch.tensor([prompt.token_ids])
    captured = Captured()
    with torch.no_grad(), patch_model(model, captured, min_length=0, observe=False):
        model(input_ids=ids)

    shares = []  # [layers x heads, queries, keys]
    for inputs in captured.layers:
        key = inputs.key[0].repeat_interleave(inputs.group_size, 0)
        logits = inputs.query[0] @ key.mT * inputs.scale
        shares.append(logits.masked_fill(~inputs.visible_mask()[0], -torch.inf).softmax(-1))
    share = torch.cat(shares)
    names = [(layer, head) for layer in range(len(shares)) for head in range(shares[0].shape[0])]

    slot = torch.arange(LENGTH)
    distance = slot[:, None] - slot
    rows = slot >= 256
    past = (share * (distance == 1))[:, rows].sum(-1).mean(-1)
    near = (share * ((distance >= 0) & (distance < 128)))[:, rows].sum(-1).mean(-1) - past
    sink = share[:, rows, :4].sum(-1).mean(-1)
    copied = torch.zeros(len(names))
    for answer in prompt.answers:
        wanted = prompt.token_ids[answer.start : answer.stop]
        source = round(answer.depth * LENGTH)
        while prompt.token_ids[source : source + len(wanted)] != wanted:
            source += 1
        for n in range(len(wanted)):
            copied += share[:, answer.start - 1 + n, source + n]
    copied /= sum(answer.stop - answer.start for answer in prompt.answers)

    found: dict[str, int] = {}
    scores: dict[str, float] = {}
    for name, score in (("previous token", past), ("retrieval", copied), ("sink", sink), ("local", near)):
        order = score.argsort(descending=True).tolist()
        found[name] = next(h for h in order if h not in found.values())
        scores[name] = score[found[name]].item()
        print(f"{name}: layer {names[found[name]][0]}, head {names[found[name]][1]}, score {scores[name]:.2f}")

    figure = Figure(figsize=(11.5, 3.4), layout="constrained")
    for axis, (name, head) in zip(figure.subplots(1, 4), sorted(found.items()), strict=True):
        layer, number = names[head]
        if name == "previous token":
            picture = share[head, 512:544, 512:544].numpy() + 1e-6
            axis.set_xlabel("key (tokens 512 to 543)")
            axis.set_ylabel("query")
        else:
            tiles = share[head].unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
            picture = (tiles.sum(3).mean(1) if name != "retrieval" else tiles.sum(3).amax(1)).numpy() + 1e-6
            axis.set_xlabel("key block (64 tokens)")
            axis.set_ylabel("query block" + (" (its largest value)" if name == "retrieval" else ""))
        image = axis.imshow(picture, norm=LogNorm(1e-4, 1), cmap="magma")
        axis.set_title(f"{name} ({scores[name]:.0%})\nlayer {layer}, head {number}", fontsize=11)
    figure.colorbar(image, ax=figure.axes, label="attention mass", shrink=0.85)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
