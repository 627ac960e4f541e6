"""Gradient-boosted regression trees, fitted by scikit-learn and kept as plain arrays.

A checkpoint must not need pickle, so `Trees` holds the arrays of scikit-learn's fitted trees and predicts with its
compiled predictor. Importing scikit-learn takes a second, so only the functions that compute with it do.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

# The fields of scikit-learn's nodes that a prediction reads, and their types in a checkpoint; all splits are numeric.
_FIELDS = {
    "value": np.float64,
    "feature_idx": np.int64,
    "num_threshold": np.float64,
    "missing_go_to_left": np.uint8,
    "left": np.int64,  # uint32 in scikit-learn, for which torch lacks arithmetic
    "right": np.int64,
    "is_leaf": np.uint8,
}

# Trees are fitted in rounds; validation rows decide how many rounds are kept.
_TREES_OF_ROUND, _MOST_ROUNDS = 50, 8
_PATIENCE = 2

# The best of three settings on the validation windows of hourly electricity demand (docs/results.md).
_SETTINGS = {"learning_rate": 0.1, "l2_regularization": 1.0, "min_samples_leaf": 60, "max_leaf_nodes": 63}

ROUNDS = _MOST_ROUNDS


@dataclass(frozen=True, eq=False)
class Trees:
    """Boosted regression trees.

    Attributes:
        features: the number of features.
        baseline: the prediction before the first tree.
        roots: the index of each tree's root in `nodes`, (trees,).
        nodes: all trees' nodes, one tree after the other: an array for each field of scikit-learn's nodes.
    """

    features: int
    baseline: float
    roots: np.ndarray
    nodes: Mapping[str, np.ndarray]

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Predict from features, (rows, features) float64 with NaN where unknown, to (rows,) float64."""
        from sklearn.ensemble._hist_gradient_boosting.common import PREDICTOR_RECORD_DTYPE
        from sklearn.ensemble._hist_gradient_boosting.predictor import TreePredictor
        from sklearn.utils._openmp_helpers import _openmp_effective_n_threads

        records = np.zeros(len(self.nodes["value"]), PREDICTOR_RECORD_DTYPE)
        for name in _FIELDS:
            records[name] = self.nodes[name]
        no_categories, threads = np.zeros((0, 8), np.uint32), _openmp_effective_n_threads()
        result = np.full(len(features), self.baseline)
        for own in np.split(records, self.roots[1:]):
            tree = TreePredictor(own, no_categories, no_categories)
            result += tree.predict(features, no_categories, np.zeros(0, np.uint32), threads)
        return result

    def as_dict(self) -> dict:
        """Convert to numbers and tensors, as a checkpoint keeps them."""
        nodes = {name: torch.from_numpy(values.copy()) for name, values in self.nodes.items()}
        return {"features": self.features, "baseline": self.baseline, "roots": torch.from_numpy(self.roots), **nodes}

    @classmethod
    def from_dict(cls, kept: Mapping) -> Self:
        """Restore trees from `as_dict`.

        Raises:
            ValueError: if they are damaged: scikit-learn's predictor trusts every index.
        """
        nodes = {}
        for name, dtype in _FIELDS.items():
            values = kept[name].numpy()
            if values.ndim != 1 or values.dtype != dtype:
                raise ValueError(f"{name} has another shape or type")
            nodes[name] = values
        trees = cls(kept["features"], kept["baseline"], kept["roots"].numpy(), nodes)
        trees._check()
        return trees

    def _check(self) -> None:
        """Refuse trees that would read beyond the features or the nodes, never end, or predict no finite number."""
        count, nodes = len(self.nodes["value"]), self.nodes
        if any(len(values) != count for values in nodes.values()) or not np.isfinite(self.baseline):
            raise ValueError("its trees have incomplete nodes")
        roots = self.roots
        if roots.dtype != np.int64 or roots.ndim != 1 or not len(roots) or roots[0] != 0:
            raise ValueError("its trees have no roots")
        sizes = np.diff(roots, append=count)
        if (sizes < 1).any() or not np.isfinite(nodes["value"]).all():
            raise ValueError("its trees have no roots or no finite values")
        splits = np.flatnonzero(nodes["is_leaf"] == 0)
        number = np.repeat(np.arange(len(roots)), sizes)[splits]
        own = splits - roots[number]
        for side in ("left", "right"):  # a child comes after its parent, so that each walk ends
            child = nodes[side][splits]
            if (child <= own).any() or (child >= sizes[number]).any():
                raise ValueError("its trees have a child that is no node")
        feature = nodes["feature_idx"][splits]
        if (feature < 0).any() or (feature >= self.features).any() or np.isnan(nodes["num_threshold"][splits]).any():
            raise ValueError("its trees split by a feature that is none")


def fit_trees(
    features: np.ndarray,
    targets: np.ndarray,
    validation: tuple[np.ndarray, np.ndarray],
    after_round: Callable[[], None] = lambda: None,
) -> Trees:
    """Fit boosted trees; keep as many as do best on validation rows.

    Args:
        features: (rows, features) float64, NaN where unknown.
        targets: (rows,) float64.
        validation: features and targets of other rows.
        after_round: called after each of at most `ROUNDS` rounds.
    """
    from sklearn.ensemble import HistGradientBoostingRegressor

    model = HistGradientBoostingRegressor(
        **_SETTINGS, max_iter=_TREES_OF_ROUND, early_stopping=False, warm_start=True, random_state=0
    )
    # scikit-learn cannot bin a feature without a single value; as a constant it is never split by.
    features = np.where(np.isnan(features).all(axis=0), 0.0, features)
    best, kept = np.inf, 0
    for number in range(1, _MOST_ROUNDS + 1):
        model.set_params(max_iter=number * _TREES_OF_ROUND).fit(features, targets)
        error = np.square(model.predict(validation[0]) - validation[1]).mean()
        after_round()
        if error < best:
            best, kept = error, number
        elif number - kept >= _PATIENCE:
            break
    trees = [tree for (tree,) in model._predictors[: kept * _TREES_OF_ROUND]]
    sizes = [len(tree.nodes) for tree in trees]
    nodes = np.concatenate([tree.nodes for tree in trees])
    kept_nodes = {name: np.ascontiguousarray(nodes[name], dtype) for name, dtype in _FIELDS.items()}
    return Trees(features.shape[1], float(model._baseline_prediction.item()), np.cumsum([0, *sizes[:-1]]), kept_nodes)
