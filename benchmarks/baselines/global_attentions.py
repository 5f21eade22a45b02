"""Attention over all tokens of a map, for cost against resolution beside shifted windows.

Each takes qkv (B, *S, 3, H, D) and gives (B, *S, H, D), differentiable, in plain PyTorch. They
answer other questions than windows do: what is compared is their cost, never their results.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

KEPT_TOKENS = 256  # Linformer's k
FEATURES = 256  # Performer's m
CLUSTER = 256  # Routing's tokens a cluster


def _sequences(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, (B, H, T, D) each."""
    if qkv.ndim < 5 or qkv.shape[-3] != 3:
        raise ValueError(f"expected qkv (B, *S, 3, H, D), got {tuple(qkv.shape)}")
    return qkv.flatten(1, -4).permute(2, 0, 3, 1, 4).unbind(0)


def _check_columns(x: Tensor, columns: int, expected: str) -> None:
    if x.ndim != 2 or x.shape[1] != columns:
        raise ValueError(f"expected {expected}, got {tuple(x.shape)}")


def _as_map(out: Tensor, qkv: Tensor) -> Tensor:
    return out.transpose(1, 2).reshape(*qkv.shape[:-3], *qkv.shape[-2:])


def global_attention(qkv: Tensor) -> Tensor:
    """Every token sees every token, by `scaled_dot_product_attention`: T² in tokens."""
    return _as_map(F.scaled_dot_product_attention(*_sequences(qkv)), qkv)


def projection(tokens: int, kept: int = KEPT_TOKENS, seed: int = 0) -> Tensor:
    """(kept, tokens) of normal numbers over √kept, as Linformer draws before it learns."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(kept, tokens, generator=generator) / math.sqrt(kept)


def linformer(qkv: Tensor, projection: Tensor) -> Tensor:
    """Keys and values projected to as many as `projection` (k, T) has rows, shared by heads.

    Wang et al., "Linformer: Self-Attention with Linear Complexity", 2020, eq. 7.
    """
    q, k, v = _sequences(qkv)
    tokens = k.shape[2]
    _check_columns(projection, tokens, f"a projection (k, {tokens}) for {tokens} tokens")
    return _as_map(F.scaled_dot_product_attention(q, projection @ k, projection @ v), qkv)


def directions(head_dim: int, features: int = FEATURES, seed: int = 0) -> Tensor:
    """(m, D): blocks of orthogonal directions with the lengths of normal vectors (ibid., §2.4)."""
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for _ in range(-(-features // head_dim)):
        q, r = torch.linalg.qr(torch.randn(head_dim, head_dim, generator=generator))
        # with the signs that QR leaves open no direction is more likely than another
        blocks.append((q * r.diagonal().sign()).T)
    lengths = torch.randn(features, head_dim, generator=generator).norm(dim=1, keepdim=True)
    return torch.cat(blocks)[:features] * lengths


def performer(qkv: Tensor, directions: Tensor) -> Tensor:
    """Softmax by positive random features φ(x) = exp(ωx − ‖x‖²/2), linear in tokens.

    Choromanski et al., "Rethinking Attention with Performers", 2021, lemma 1, with q and k scaled
    by D^−¼. The largest exponent is taken off, of each query and of all keys of a head: both cancel
    in the quotient.
    """
    q, k, v = _sequences(qkv)
    _check_columns(directions, q.shape[-1], f"directions (m, {q.shape[-1]})")
    scale = q.shape[-1] ** -0.25

    def exponents(x: Tensor) -> Tensor:
        x = x * scale
        return x @ directions.T - x.square().sum(-1, keepdim=True) / 2  # (B, H, T, m)

    q_exponents, k_exponents = exponents(q), exponents(k)
    q_features = (q_exponents - q_exponents.amax(-1, keepdim=True)).exp()
    k_features = (k_exponents - k_exponents.amax((-2, -1), keepdim=True)).exp()
    total = q_features @ k_features.sum(-2).unsqueeze(-1)  # (B, H, T, 1)
    return _as_map(q_features @ (k_features.transpose(-2, -1) @ v) / total, qkv)


def centroids(head_dim: int, clusters: int, seed: int = 0) -> Tensor:
    """(c, D) unit vectors, where Routing attention's k-means begins."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(clusters, head_dim, generator=generator), dim=-1)


def routing(qkv: Tensor, centroids: Tensor, cluster: int = CLUSTER) -> Tensor:
    """Each centroid's `cluster` nearest queries see its `cluster` nearest keys.

    T^1.5 where there are √T clusters. Roy et al., "Efficient Content-Based Sparse Attention with
    Routing Transformers", 2021, alg. 1, without causality, q and k routed apart. A token of several
    clusters has the mean of what they give; one of none, zeros. The centroids stay as they are.
    """
    q, k, v = _sequences(qkv)
    _check_columns(centroids, q.shape[-1], f"centroids (c, {q.shape[-1]})")
    tokens, cluster = q.shape[2], min(cluster, q.shape[2])

    def nearest(x: Tensor) -> Tensor:
        """(B, H, c, cluster): the tokens that are nearest to each centroid."""
        with torch.no_grad():
            near = centroids @ F.normalize(x, dim=-1).transpose(-2, -1)
        return near.topk(cluster, dim=-1).indices

    def gather(x: Tensor, where: Tensor) -> Tensor:
        where = where.flatten(-2).unsqueeze(-1).expand(-1, -1, -1, x.shape[-1])
        return x.gather(2, where).unflatten(2, (len(centroids), cluster))

    of_queries, of_keys = nearest(q), nearest(k)
    out = F.scaled_dot_product_attention(
        gather(q, of_queries), gather(k, of_keys), gather(v, of_keys)
    )
    where = of_queries.flatten(-2).unsqueeze(-1)
    rows = where.expand(-1, -1, -1, v.shape[-1])
    summed = torch.zeros_like(v).scatter_add(2, rows, out.flatten(2, 3))
    ones = torch.ones_like(where, dtype=v.dtype)
    count = v.new_zeros(*v.shape[:2], tokens, 1).scatter_add(2, where, ones)
    return _as_map(summed / count.clamp(min=1), qkv)
