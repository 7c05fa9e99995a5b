"""Clusters inside segments of a prompt, made while it is run: spherical K-means of each segment by itself.

After the wave index of Chen et al., "RetroInfer", 2025, arXiv:2505.02922, without its last iteration, which puts keys
into clusters of other segments: here a segment is finished when its last key is there, so that it may be used behind
it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparseprefill.contracts import AttentionInputs
from sparseprefill.kernels.low_bit import accurate

_NUMBERS = 1 << 24  # products of keys and centroids that are held at one time


@dataclass(frozen=True, slots=True, eq=False)
class SegmentClusters:
    """Clusters of whole segments, counted from each batch row's first valid key."""

    label: Tensor  # int64 [batch, kv_heads, segments, tokens]: which cluster of its segment each key is in
    centroid: Tensor  # float32 or float64 [batch, kv_heads, segments, clusters, head_dim]: means of keys as they are
    size: Tensor  # int64 [batch, kv_heads, segments, clusters]

    @staticmethod
    def of(inputs: AttentionInputs, segment: int, clusters: int, iterations: int) -> SegmentClusters:
        """Cluster every segment of `segment` tokens that may be whole; at least one, whole or not.

        Keys are centred by the mean of their segment. First centroids are the directions of keys at even distances, so
        that nothing is drawn. In each iteration a key goes to the centroid with the largest inner product, and
        centroids become means of length 1; one that got no key stays. What does not count (padding, slots beyond the
        last) is in no cluster: its label is `clusters`.
        """
        batch, kv_heads, keys, dim = inputs.key.shape
        anchor = inputs.anchor()
        count = max(1, inputs.last_key // segment)
        slot = anchor[:, None] + torch.arange(count * segment, device=inputs.device)
        real = slot < inputs.last_key
        place = slot.clamp(max=keys - 1)
        if inputs.key_valid is not None:
            real = real & inputs.key_valid.gather(1, place)
        key = inputs.key.gather(2, place[:, None, :, None].expand(-1, kv_heads, -1, dim)).to(accurate(inputs.key))
        key = key.masked_fill(~real[:, None, :, None], 0.0).unflatten(2, (count, segment)).flatten(0, 2)
        real = real.unflatten(1, (count, segment))[:, None].expand(-1, kv_heads, -1, -1).flatten(0, 2)
        together = max(1, _NUMBERS // (segment * clusters))
        parts = [
            _kmeans(own, counts, clusters, iterations)
            for own, counts in zip(key.split(together), real.split(together), strict=True)
        ]
        label, centroid, size = (torch.cat(each) for each in zip(*parts, strict=True))
        shape = (batch, kv_heads, count)
        return SegmentClusters(label.unflatten(0, shape), centroid.unflatten(0, shape), size.unflatten(0, shape))


def _kmeans(key: Tensor, real: Tensor, clusters: int, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Labels [segments, tokens], centroids [segments, clusters, dim] and sizes [segments, clusters]."""
    tokens = key.shape[1]
    weight = real.to(key.dtype)
    mean = (key * weight[..., None]).sum(1, keepdim=True) / weight.sum(1)[:, None, None].clamp(min=1)
    centred = (key - mean) * weight[..., None]
    first = ((torch.arange(clusters, device=key.device) + 0.5) * tokens / clusters).to(torch.int64)
    centroid = torch.nn.functional.normalize(centred[:, first], dim=-1)
    for _ in range(iterations):
        label = (centred @ centroid.mT).argmax(-1).masked_fill(~real, clusters)
        total, size = _sums(centred, label, clusters)
        unit = torch.nn.functional.normalize(total, dim=-1)
        centroid = torch.where((size > 0)[..., None], unit, centroid)
    label = (centred @ centroid.mT).argmax(-1).masked_fill(~real, clusters)
    total, size = _sums(key, label, clusters)
    return label, total / size.clamp(min=1)[..., None], size


def _sums(key: Tensor, label: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Sums [segments, clusters, dim] of the keys of each label, and how many they are; those of no cluster left out."""
    segments, _, dim = key.shape
    total = key.new_zeros(segments, clusters + 1, dim).scatter_add_(1, label[..., None].expand_as(key), key)
    size = torch.zeros(segments, clusters + 1, dtype=torch.int64, device=key.device)
    size.scatter_add_(1, label, torch.ones_like(label))
    return total[:, :-1], size[:, :-1]
