"""LightningDataModules."""

from mm_lightning.data.mnist import MNISTDataModule, load_mnist
from mm_lightning.data.tensor_batches import TensorBatches

__all__ = ["MNISTDataModule", "TensorBatches", "load_mnist"]
