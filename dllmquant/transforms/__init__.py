"""Function-preserving transforms of a model's weights."""

from dllmquant.transforms.outliers import plant_outliers

__all__ = ["plant_outliers"]
