"""LightningDataModules."""

from mm_lightning.data.arrays import ArraysDataModule
from mm_lightning.data.huggingface import HuggingFaceDataModule
from mm_lightning.data.image_folder import ImageFolderDataModule, ImageTensorDataModule
from mm_lightning.data.mnist import MNISTDataModule, load_mnist
from mm_lightning.data.spirals import SpiralsDataModule, two_spirals
from mm_lightning.data.tensor_batches import TensorBatches
from mm_lightning.data.tensor_data_module import TensorDataModule

__all__ = [
    "ArraysDataModule",
    "HuggingFaceDataModule",
    "ImageFolderDataModule",
    "ImageTensorDataModule",
    "MNISTDataModule",
    "SpiralsDataModule",
    "TensorBatches",
    "TensorDataModule",
    "load_mnist",
    "two_spirals",
]
