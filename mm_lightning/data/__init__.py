"""LightningDataModules."""

from mm_lightning.data.mnist import MNISTDataModule, load_mnist
from mm_lightning.data.spirals import SpiralsDataModule, two_spirals
from mm_lightning.data.tensor_batches import TensorBatches
from mm_lightning.data.tensor_data_module import TensorDataModule

__all__ = ["MNISTDataModule", "SpiralsDataModule", "TensorBatches", "TensorDataModule", "load_mnist", "two_spirals"]
