"""ToMe as published (arXiv 2210.09461, appendix D), written from the formulas in NumPy float64: what plans are held to."""

from __future__ import annotations

import numpy as np


class PublishedMerge:
    """The published matching of (B, N, d) and its merges of (B, N, C), one image and one token at a time."""

    def __init__(self, metric: np.ndarray, num_merged: int, class_token: bool = False, distill_token: bool = False):
        self.batch, self.tokens, _ = metric.shape
        self.num_merged = max(0, min(num_merged, (self.tokens - class_token - distill_token) // 2))
        self.distill_token = distill_token
        self.images = (
            [self._match(image, class_token) for image in metric.astype(np.float64)] if self.num_merged else []
        )

    def _match(self, metric, class_token):
        """(kept tokens of a in their output order, [(token of a, token of b that it is merged into)])"""
        unit = metric / np.linalg.norm(metric, axis=1, keepdims=True)
        scores = unit[::2] @ unit[1::2].T
        if class_token:
            scores[0] = -np.inf
        if self.distill_token:
            scores[:, 0] = -np.inf
        partner, best = scores.argmax(1), scores.max(1)
        order = np.argsort(-best, kind="stable")
        kept = order[self.num_merged :]
        if class_token:
            kept = np.sort(kept)
        return 2 * kept, [(2 * a, 2 * partner[a] + 1) for a in order[: self.num_merged]]

    def groups(self, image: int) -> list[list[int]]:
        """The tokens of each output, the one that gives it its place first."""
        if not self.num_merged:
            return [[token] for token in range(self.tokens)]
        kept, edges = self.images[image]
        first = [[token] for token in kept]
        second = [[token, *(a for a, b in edges if b == token)] for token in range(1, self.tokens, 2)]
        if self.distill_token:
            return [first[0], second[0], *first[1:], *second[1:]]
        return first + second

    def source_map(self) -> np.ndarray:
        source = np.zeros((self.batch, self.tokens), dtype=np.int64)
        for image in range(self.batch):
            for output, members in enumerate(self.groups(image)):
                source[image, members] = output
        return source

    def merge(self, x: np.ndarray, mode: str = "mean") -> np.ndarray:
        reduce = {"mean": np.mean, "sum": np.sum, "max": np.max}[mode]
        return np.stack([[reduce(x[i, m], axis=0) for m in self.groups(i)] for i in range(self.batch)])

    def merge_weighted(self, x: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """sizes (B, N)"""
        merged = self.merge(sizes[..., None], "sum")
        return self.merge(x * sizes[..., None], "sum") / merged, merged[..., 0]

    def unmerge(self, x: np.ndarray) -> np.ndarray:
        return np.take_along_axis(x, self.source_map()[..., None], axis=1)
