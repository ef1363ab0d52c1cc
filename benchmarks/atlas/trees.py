"""Forests fitted by scikit-learn, written as `mergewell.prediction.forest` reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from sklearn.ensemble import HistGradientBoostingRegressor

from mergewell.prediction.forest import Forest

RISING, FALLING = 1, -1


def fit(
    rows: np.ndarray,
    values: np.ndarray,
    names: Sequence[str],
    *,
    weights: np.ndarray | None = None,
    trees: int = 200,
    leaf: int = 20,
    rate: float = 0.06,
    leaves: int = 12,
    share: float = 0.5,
    monotone: Mapping[str, int] | None = None,
    seed: int = 0,
) -> Forest:
    """Return trees fitted to rows [N, F] by squared error, each row with its weight."""
    model = HistGradientBoostingRegressor(
        max_iter=trees, learning_rate=rate, max_leaf_nodes=leaves, min_samples_leaf=leaf,
        l2_regularization=1.0, max_features=share, early_stopping=False, random_state=seed,
        monotonic_cst=[(monotone or {}).get(name, 0) for name in names],
    )  # fmt: skip
    model.fit(rows, values, sample_weight=weights)
    nodes = [tree[0].nodes for tree in model._predictors]
    sizes = np.array([len(one) for one in nodes])
    starts = np.concatenate([[0], sizes.cumsum()[:-1]]).astype(np.int32)
    offsets, every = np.repeat(starts, sizes), np.concatenate(nodes)
    leaf_nodes = every["is_leaf"].astype(bool)
    return Forest(
        start=np.array([float(np.ravel(model._baseline_prediction)[0])]),
        roots=starts,
        feature=np.where(leaf_nodes, -1, every["feature_idx"]).astype(np.int32),
        threshold=every["num_threshold"].astype(float),
        missing_left=every["missing_go_to_left"].astype(bool),
        left=(every["left"] + offsets).astype(np.int32),
        right=(every["right"] + offsets).astype(np.int32),
        value=np.where(leaf_nodes, every["value"], 0.0).astype(float),
    )
