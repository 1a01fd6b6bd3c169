"""LightningDataModules."""

from mm_lightning.data.arrays import ArraysDataModule
from mm_lightning.data.cifar import CIFAR10DataModule, CIFAR100DataModule
from mm_lightning.data.huggingface import HuggingFaceDataModule
from mm_lightning.data.image_folder import ImageFolderDataModule, ImageTensorDataModule
from mm_lightning.data.mnist import MNISTDataModule, load_mnist
from mm_lightning.data.official import OfficialDataModule
from mm_lightning.data.spirals import SpiralsDataModule, two_spirals
from mm_lightning.data.svhn import SVHNDataModule
from mm_lightning.data.tensor_batches import TensorBatches
from mm_lightning.data.tensor_data_module import TensorDataModule
from mm_lightning.data.tiny_imagenet import TinyImageNetDataModule

__all__ = [
    "ArraysDataModule",
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "HuggingFaceDataModule",
    "ImageFolderDataModule",
    "ImageTensorDataModule",
    "MNISTDataModule",
    "OfficialDataModule",
    "SVHNDataModule",
    "SpiralsDataModule",
    "TensorBatches",
    "TensorDataModule",
    "TinyImageNetDataModule",
    "load_mnist",
    "two_spirals",
]
